"""Settings of a training run: which features are meant, in which order samples come, what is trained."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from janusvln.demo import compare
from janusvln.features.coverage import measure_coverage
from janusvln.features.resolve import (
    WantedFeatures,
    check_resumed_with,
    check_trained_with,
    open_cache,
    summary,
    unfit,
)
from janusvln.train.arguments import TrainingArguments, parse_arguments
from janusvln.train.checkpoints import checkpoint_to_resume, given_checkpoint
from janusvln.train.learning import freeze, parameter_groups, part_of
from janusvln.train.order import EpochOrder, LengthGroupedOrder
from janusvln.train.ranks import Ranks
from janusvln.train.run_record import RunRecord
from janusvln.train.spellings import MEANINGLESS
from small_data import plan_of, write_dataset
from store_kit import make_spec, write_shard
from train_kit import small_spec
from train_processes_kit import ROOT
from vggt_cache.errors import (
    AmbiguousCacheError,
    CacheNotFoundError,
    DataError,
    NotACacheError,
    SettingsError,
)
from vggt_cache.identity import CONTEXTS, Preprocessing
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.store import FeatureCache


def opened(cache_dir: Path, wanted: WantedFeatures, **options: object) -> FeatureCache:
    arguments = {"fill": False, "location": None, "device": "cpu", **options}
    return open_cache(str(cache_dir), wanted, **arguments)  # type: ignore[arg-type]


class TestWhichCache:
    def test_without_flags_the_cache_says_what_features_are(self, tmp_path: Path) -> None:
        spec = make_spec(context="causal", image_size=644)
        write_shard(tmp_path, [1], spec)
        assert opened(tmp_path, WantedFeatures()).spec == spec

    @pytest.mark.parametrize(
        ("flag", "value"),
        [("context", "frame"), ("image_size", 518), ("layer", 1), ("resize_mode", "pad"), ("alpha", "drop"),
         ("feature_dtype", "float32"), ("compute_dtype", "bfloat16"), ("vggt_cache_fingerprint", "0000")],
    )  # fmt: skip
    def test_a_flag_that_contradicts_the_cache_is_refused_with_both_values(
        self, tmp_path: Path, flag: str, value: object
    ) -> None:
        write_shard(tmp_path, [1], make_spec(context="causal", image_size=644))
        with pytest.raises(SettingsError, match=rf"{flag} {value} \(the cache: .*contradicts"):
            opened(tmp_path, WantedFeatures(**{flag: value}))  # type: ignore[arg-type]

    def test_a_flag_that_agrees_changes_nothing(self, tmp_path: Path) -> None:
        spec = make_spec(context="causal", image_size=644)
        write_shard(tmp_path, [1], spec)
        wanted = WantedFeatures(
            context="causal", image_size=644, layer=-2, vggt_cache_fingerprint=spec.fingerprint[:8]
        )
        assert opened(tmp_path, wanted).spec == spec

    def test_of_several_caches_one_must_be_named(self, tmp_path: Path) -> None:
        frame, causal = make_spec(context="frame"), make_spec(context="causal")
        write_shard(tmp_path, [1], frame)
        write_shard(tmp_path, [1], causal)
        with pytest.raises(AmbiguousCacheError, match="--context or --vggt_cache_fingerprint"):
            opened(tmp_path, WantedFeatures())
        assert opened(tmp_path, WantedFeatures(context="causal")).spec == causal
        assert opened(tmp_path, WantedFeatures(vggt_cache_fingerprint=frame.fingerprint[:12])).spec == frame

    def test_no_cache_is_refused_and_fill_makes_one(self, tmp_path: Path, small_checkpoint: Path) -> None:
        missing = tmp_path / "new"
        with pytest.raises(CacheNotFoundError):
            opened(missing, WantedFeatures())
        tmp_path.joinpath("empty").mkdir()
        with pytest.raises(NotACacheError):
            opened(tmp_path / "empty", WantedFeatures())
        wanted = WantedFeatures(context="frame", image_size=56)
        cache = opened(missing, wanted, fill=True, location=str(small_checkpoint))
        assert (cache.spec.context, cache.spec.preprocessing.image_size, len(cache)) == ("frame", 56, 0)

    def test_what_nobody_says_is_as_janusvln_was_published(
        self, tmp_path: Path, small_checkpoint: Path
    ) -> None:
        spec = opened(tmp_path / "new", WantedFeatures(), fill=True, location=str(small_checkpoint)).spec
        assert (spec.context, spec.preprocessing.image_size, spec.feature_dtype) == (
            "causal",
            644,
            "bfloat16",
        )


class TestTrainedWith:
    def test_a_model_without_a_past_may_use_any_features(self) -> None:
        assert check_trained_with(None, make_spec(), "m") == []

    def test_the_same_features_are_welcome(self) -> None:
        assert check_trained_with(summary(make_spec()), make_spec(), "m") == []

    @pytest.mark.promise("Never the wrong context")
    @pytest.mark.parametrize(
        ("name", "value"), [("context", "causal"), ("layer", 1), ("weights_digest", "cd" * 32)]
    )
    def test_other_features_are_refused(self, name: str, value: object) -> None:
        trained = summary(make_spec()) | {name: value}
        with pytest.raises(SettingsError, match=rf"my/model was trained with features of {name} {value}"):
            check_trained_with(trained, make_spec(), "my/model")

    def test_another_image_size_is_said(self) -> None:
        (sentence,) = check_trained_with(summary(make_spec(image_size=644)), make_spec(), "m")
        assert "image_size 644, and goes on with image_size 518" in sentence

    @pytest.mark.parametrize(
        ("name", "changed"),
        [
            ("context", {"context": "causal"}),
            ("image_size", {"preprocessing": Preprocessing(image_size=644)}),
            ("resize_mode", {"preprocessing": Preprocessing(resize_mode="pad")}),
            ("alpha", {"preprocessing": Preprocessing(alpha="drop")}),
            ("fingerprint", {"computation_version": 2}),
            ("fingerprint", {"encoder": dataclasses.replace(make_spec().encoder, num_heads=2)}),
        ],
    )
    def test_a_run_goes_on_only_with_the_features_it_began_with(
        self, name: str, changed: dict[str, Any]
    ) -> None:
        before = dataclasses.replace(make_spec(), **changed)
        assert check_resumed_with(summary(before), before, "c") == []
        with pytest.raises(SettingsError, match=f"c was trained with features of {name} "):
            check_resumed_with(summary(before), make_spec(), "c")

    def test_roundings_may_differ_in_a_resumed_run_and_are_said(self) -> None:
        trained = summary(make_spec(feature_dtype="float32"))
        now = make_spec(feature_dtype="int8")
        now = dataclasses.replace(now, encoder=dataclasses.replace(now.encoder, compute_dtype="bfloat16"))
        sentences = check_resumed_with(trained, now, "c")
        assert "feature_dtype float32, and goes on with feature_dtype int8" in sentences[0]
        assert "compute_dtype float32, and goes on with compute_dtype bfloat16" in sentences[1]

    def test_what_a_checkpoint_does_not_say_is_not_compared(self) -> None:
        assert check_trained_with({"context": "frame"}, make_spec(), "m") == []


NEEDED = ["--model_name_or_path", "qwen", "--train_data_root", "data", "--output_dir", "out", "--use_cpu"]


class TestFlags:
    def test_the_published_launchers_flags_are_understood(self) -> None:
        given = """
            --vggt_model_path facebook/VGGT-1B --tune_mm_llm True --tune_mm_vision False --tune_mm_mlp True
            --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 2e-5
            --mm_projector_lr 1e-5 --vision_tower_lr 1e-6 --optim adamw_torch --model_max_length 163840
            --data_flatten False --max_pixels 451584 --min_pixels 12544 --num_train_epochs 1 --warmup_ratio 0.03
            --lr_scheduler_type cosine --weight_decay 0.01 --logging_steps 10 --save_steps 1000
            --save_total_limit 1 --gradient_checkpointing --dataloader_num_workers 8
            --group_by_modality_length true --seed 42 --report_to none --reference_frame first
            --evaluation_strategy no --lam 0.2 --max_history_images 8
        """
        model, data, features, training = parse_arguments([*NEEDED, *given.split()])
        assert (model.tune_mm_llm, model.tune_mm_vision, model.lam) == (True, False, 0.2)
        assert (data.max_pixels, data.max_history_images) == (451584, 8)
        assert features.vggt_model_path == "facebook/VGGT-1B"
        assert (training.mm_projector_lr, training.vision_tower_lr, training.warmup_steps) == (
            1e-5,
            1e-6,
            0.03,
        )
        assert training.group_by_modality_length
        assert not training.remove_unused_columns

    @pytest.mark.parametrize("name", sorted(MEANINGLESS))
    def test_a_flag_that_would_have_no_effect_is_refused(self, name: str) -> None:
        with pytest.raises(SettingsError, match=f"--{name}: "):
            parse_arguments([*NEEDED, f"--{name}", "1"])

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (["--no_such_flag", "1"], "no_such_flag"),
            (["--tune_mm_l", "True"], "tune_mm_l"),
            (["--reference_frame", "last"], "every released model was trained with first"),
            (["--annotation_path", "a.jsonl"], "exactly one"),
            (["--data_path", "d"], "--annotation_path"),
            (["--vggt_cache_miss", "error"], "needs a cache"),
            (["--vggt_cache_miss", "never", "--vggt_cache_dir", "c"], "none of encode, fill, error"),
            (["--vggt_cache_io", "mmap"], "none of auto, direct, buffered"),
            (["--context", "both"], "none of frame, causal, joint"),
            (["--max_samples", "0"], "selects nothing"),
            (["--distill_loss_weight", "2"], "no action head"),
            (["--train_sampling_strategy", "sequential"], "in random order, or by length"),
            (["--label_smoothing_factor", "0.1"], "replace the model's own loss"),
            (["--do_predict", "True"], "no evaluation data set"),
            (["--deepspeed", "/no/such.json"], "/no/such.json"),
            (["--evaluation_strategy", "steps", "--eval_steps", "5"], "evaluated in the simulator"),
            (["--mm_projector_lr", "-1"], "negative"),
            (["--action_weight", "-1"], "negative"),
            (["--learning_rate", "fast"], "learning_rate"),
            (["--enable_jit_checkpoint", "True"], "SIGTERM, SIGUSR1 or Ctrl-C writes one by itself: leave it out"),
            (["--load_best_model_at_end", "True"], "no evaluation data set that could say which"),
            (["--save_strategy", "best"], "no evaluation data set that could say which"),
            (["--ignore_data_skip", "True"], "see the first samples of its epoch twice"),
            (["--auto_find_batch_size", "True"], "some samples twice"),
            (["--use_liger_kernel", "True"], "replace the model's forward"),
            (["--report_to", "wandb"], r"-m pip install wandb, or give --report_to none"),
            (["--report_to", "wandbb"], "none of .*wandb"),
            (["--attn_implementation", "flash_attention_2"], "-m pip install flash-attn"),
            (["--bad_samples", "ignore"], "none of stop, skip"),
            (["--per_gpu_train_batch_size", "2"], "calls it --per_device_train_batch_size now"),
            (["--no_cuda"], "calls it --use_cpu now"),
            (["--group_by_length", "True"], "--group_by_modality_length True"),
            (["--save_safetensors", "True"], "always saved as safetensors"),
            (["--logging_dir", "runs"], "TENSORBOARD_LOGGING_DIR"),
        ],
    )  # fmt: skip
    def test_what_is_unknown_or_contradictory_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, more: list[str], sentence: str
    ) -> None:
        monkeypatch.delenv("VGGT_CACHE_DIR", raising=False)
        with pytest.raises(SettingsError, match=sentence):
            parse_arguments([*NEEDED, *more])

    def test_zero_3_that_does_not_gather_weights_is_refused(self, tmp_path: Path) -> None:
        """transformers would save no weights, with a warning, and the run end in success."""
        config = json.loads((ROOT / "scripts" / "zero3.json").read_text())
        for said in (False, None):
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = said
            if said is None:
                del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
            (tmp_path / "zero3.json").write_text(json.dumps(config))
            with pytest.raises(
                SettingsError, match="no checkpoint and no result would hold the model's weights"
            ):
                parse_arguments([*NEEDED, "--deepspeed", str(tmp_path / "zero3.json")])

    def test_the_environment_names_the_cache_unless_the_flag_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VGGT_CACHE_DIR", "/environment")
        assert parse_arguments(NEEDED)[2].vggt_cache_dir == "/environment"
        assert parse_arguments([*NEEDED, "--vggt-cache-dir", "/flag"])[2].vggt_cache_dir == "/flag"

    @pytest.mark.parametrize("section", ["optimizer", "scheduler"])
    def test_a_deepspeed_file_that_would_drop_the_learning_rates_is_refused(
        self, tmp_path: Path, section: str
    ) -> None:
        config = json.loads((ROOT / "scripts" / "zero2.json").read_text()) | {section: {"type": "X"}}
        (tmp_path / "zero.json").write_text(json.dumps(config))
        with pytest.raises(SettingsError, match=f"zero.json has the section {section}, .* learning rates"):
            parse_arguments([*NEEDED, "--deepspeed", str(tmp_path / "zero.json")])

    def test_a_deepspeed_file_that_contradicts_the_flags_is_refused_with_both_values(
        self, tmp_path: Path
    ) -> None:
        config = json.loads((ROOT / "scripts" / "zero2.json").read_text())
        (tmp_path / "zero.json").write_text(json.dumps(config | {"gradient_accumulation_steps": 4}))
        with pytest.raises(
            SettingsError, match=r'gradient_accumulation_steps=4, and the flags say .*=2.*"auto"'
        ):
            parse_arguments(
                [*NEEDED, "--deepspeed", str(tmp_path / "zero.json"), "--gradient_accumulation_steps", "2"]
            )

    def test_what_a_removed_flag_is_called_now_is_a_flag(self) -> None:
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        named = [
            text.split()[3].removeprefix("--") for text in MEANINGLESS.values() if " calls it --" in text
        ]
        assert named
        assert set(named) <= known

    def test_the_environment_tells_several_caches_apart(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        specs = [make_spec(context="frame", image_size=size) for size in (518, 644)]
        for spec in specs:
            write_shard(tmp_path, [1], spec)
        monkeypatch.setenv("VGGT_CACHE_FINGERPRINT", specs[1].fingerprint[:8])
        assert opened(tmp_path, parse_arguments(NEEDED)[2]).spec == specs[1]

    def test_the_encoder_that_is_named_tells_caches_of_one_context_apart(
        self, tmp_path: Path, small_checkpoint: Path
    ) -> None:
        ours, other = small_spec(small_checkpoint, "frame"), make_spec(context="frame")
        for spec in (ours, other):
            write_shard(tmp_path, [1], spec)
        with pytest.raises(AmbiguousCacheError, match="VGGT_CACHE_FINGERPRINT"):
            opened(tmp_path, WantedFeatures())
        assert opened(tmp_path, WantedFeatures(), location=str(small_checkpoint)).spec == ours


class TestOrder:
    def test_every_sample_comes_once_and_epochs_differ(self) -> None:
        order = EpochOrder(100, seed=1)
        first, again = list(order), list(order)
        order.set_epoch(1)
        assert sorted(first) == list(range(100))
        assert first == again != list(order)

    def test_another_seed_is_another_order(self) -> None:
        assert list(EpochOrder(100, seed=1)) != list(EpochOrder(100, seed=2))

    @pytest.mark.parametrize("count", [1, 7, 64, 1001])
    def test_grouping_loses_no_sample_and_brings_lengths_together(self, count: int) -> None:
        lengths = torch.randint(1, 3000, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        order = LengthGroupedOrder(lengths, group_size=4, seed=3)
        found = list(order)
        assert sorted(found) == list(range(count))
        if count > 100:
            spread = [max(group) - min(group) for group in _groups([lengths[at] for at in found], 4)]
            plain = [max(group) - min(group) for group in _groups(lengths, 4)]
            assert sum(spread) < sum(plain) / 5

    def test_a_group_that_is_not_full_shifts_no_other(self) -> None:
        lengths = [length for length in range(50) for _ in range(4)] + [1000]
        found = list(LengthGroupedOrder(lengths, group_size=4, seed=0))
        groups = _groups([lengths[at] for at in found], 4)
        assert all(len(group) == 4 for group in groups[:-1])


def _groups(values: list[int], size: int) -> list[list[int]]:
    return [values[at : at + size] for at in range(0, len(values), size)]


class _Parts(nn.Module):
    """The names of a JanusVLN model's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({
            "visual": nn.ModuleDict({"blocks": nn.Linear(2, 2), "merger": nn.Linear(2, 2)}),
            "language_model": nn.ModuleDict({"layers": nn.Linear(2, 2)}),
        })  # fmt: skip
        self.merger = nn.Linear(2, 2)
        self.action_head = nn.Linear(2, 2)
        self.lm_head = nn.Linear(2, 2)


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        ("flags", "trained"),
        [
            ([], {"added"}),
            (["--tune_mm_llm", "True"], {"added", "language"}),
            (["--tune_mm_mlp", "True"], {"added", "projector"}),
            (["--tune_mm_vision", "True"], {"added", "vision"}),
        ],
    )
    def test_flags_choose_the_parts(self, flags: list[str], trained: set[str]) -> None:
        model = _Parts()
        freeze(model, parse_arguments([*NEEDED, *flags])[0])
        assert {part_of(name) for name, value in model.named_parameters() if value.requires_grad} == trained

    def test_learning_rates_go_by_part_and_decay_by_name(self) -> None:
        model = _Parts()
        _, _, _, training = parse_arguments([
            *NEEDED, "--learning_rate", "1", "--mm_projector_lr", "2", "--vision_tower_lr", "3", "--weight_decay", "0.5"
        ])  # fmt: skip
        decaying = {name for name, _ in model.named_parameters() if name.endswith("weight")}
        groups = parameter_groups(model, training, decaying)
        rate_of = {id(value): (g["lr"], g["weight_decay"]) for g in groups for value in g["params"]}
        expected = {"language": 1.0, "added": 2.0, "projector": 2.0, "vision": 3.0}
        for name, value in model.named_parameters():
            assert rate_of[id(value)] == (expected[part_of(name)], 0.5 if name in decaying else 0.0), name

    def test_rates_that_are_not_given_are_the_learning_rate(self) -> None:
        training = parse_arguments([*NEEDED, "--learning_rate", "1"])[3]
        assert {group["lr"] for group in parameter_groups(_Parts(), training, set())} == {1.0}

    def test_a_rate_of_zero_is_zero(self) -> None:
        training = parse_arguments([*NEEDED, "--learning_rate", "1", "--mm_projector_lr", "0"])[3]
        assert {group["lr"] for group in parameter_groups(_Parts(), training, set())} == {0.0, 1.0}


class TestResuming:
    def make(self, root: Path, step: int, *, ranks: int = 1, state: str = "{}", **record: Any) -> Path:
        folder = root / f"checkpoint-{step}"
        folder.mkdir()
        for rank in range(ranks):
            (folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth")).write_bytes(b"")
        (folder / "optimizer.pt").write_bytes(b"")
        (folder / "scheduler.pt").write_bytes(b"")
        (folder / "trainer_state.json").write_text(state)
        replace(ALONE, **record).write(str(folder))
        return folder

    def test_the_latest_whole_checkpoint_is_taken(self, tmp_path: Path) -> None:
        for step in (5, 10, 100):
            self.make(tmp_path, step)
        self.make(tmp_path, 200, state='{"torn')
        for step, torn in ((300, "rng_state.pth"), (400, "optimizer.pt")):
            (self.make(tmp_path, step) / torn).unlink()
        assert checkpoint_to_resume(str(tmp_path), ALONE, alone()) == str(tmp_path / "checkpoint-100")

    def test_without_one_training_begins(self, tmp_path: Path) -> None:
        assert checkpoint_to_resume(str(tmp_path), ALONE, alone()) is None
        assert given_checkpoint("False", str(tmp_path), ALONE, alone()) is None

    def test_ranks_take_what_all_of_them_have(self, tmp_path: Path) -> None:
        self.make(tmp_path, 5, ranks=2)
        self.make(tmp_path, 10, ranks=2)
        other = json.dumps({"host": "b", "steps": [5]})
        assert checkpoint_to_resume(str(tmp_path), ALONE, _Answers(other)) == str(tmp_path / "checkpoint-5")

    def test_a_node_that_sees_none_is_told(self, tmp_path: Path) -> None:
        self.make(tmp_path, 5, ranks=2)
        with pytest.raises(DataError, match="none that is complete on b: to resume, all nodes must share"):
            checkpoint_to_resume(str(tmp_path), ALONE, _Answers(json.dumps({"host": "b", "steps": []})))

    @pytest.mark.parametrize("named", ["", "True", "path"])
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                {"world_size": 1},
                "was written by 2 processes with ZeRO-3, and this run has 1 process with ZeRO-3: the optimizer's state",
            ),
            ({"zero_stage": 2}, "and this run has 2 processes with ZeRO-2"),
            ({"zero_stage": None}, "and this run has 2 processes with no DeepSpeed"),
            (
                {"batch_size": 2, "accumulation": 4},
                "written by --per_device_train_batch_size 1, --gradient_accumulation_steps 1, and this run has "
                "--per_device_train_batch_size 2, --gradient_accumulation_steps 4: some samples of this epoch would",
            ),
            ({"seed": 7}, "--seed (or --data_seed) 7"),
            ({"by_length": True}, "--group_by_modality_length True"),
            ({"drop_last": True}, "--dataloader_drop_last True"),
            ({"samples": 33}, "a number of samples of 32, and this run has a number of samples of 33"),
            ({"samples_digest": "other"}, "annotations of digest d, and this run has annotations of digest other"),
            (
                {"skipped": "1 sample (digest 0)"},
                "a skipped_samples.jsonl of no samples, and this run has a skipped_samples.jsonl of 1 sample (digest "
                "0): some samples of this epoch would",
            ),
            (
                {"learning": {"loss_mean_over": "step", "learning_rate": 1e-5}},
                "written by --loss_mean_over micro_batch, --learning_rate 2e-05, and this run has --loss_mean_over "
                "step, --learning_rate 1e-05: it would be another training from here on",
            ),
            ({"seed": 7, "learning": {"loss_mean_over": "step"}}, "step: some samples of this epoch would"),
        ],
    )  # fmt: skip
    def test_what_another_run_wrote_is_never_begun_anew_nor_gone_on_from(
        self, tmp_path: Path, change: dict[str, Any], words: str, named: str
    ) -> None:
        wrote = {"world_size": 2, "zero_stage": 3}
        checkpoint = self.make(tmp_path, 5, ranks=2, **wrote)
        now = replace(ALONE, **{**wrote, **change})
        with pytest.raises(SettingsError, match=re.escape(words)):
            self.found(named, checkpoint, now)

    @pytest.mark.parametrize("named", ["", "True", "path"])
    def test_one_that_does_not_say_which_run_wrote_it_is_refused(self, tmp_path: Path, named: str) -> None:
        checkpoint = self.make(tmp_path, 5)
        (checkpoint / "run_record.json").unlink()
        with pytest.raises(SettingsError, match=r"has no run_record\.json"):
            self.found(named, checkpoint, ALONE)

    @pytest.mark.parametrize("named", ["", "True", "path"])
    @pytest.mark.parametrize("stage", [None, 2, 3])
    def test_one_without_an_optimizer_is_refused(self, tmp_path: Path, named: str, stage: int | None) -> None:
        checkpoint = self.make(tmp_path, 5, zero_stage=stage)
        (checkpoint / "optimizer.pt").unlink()
        with pytest.raises(SettingsError, match="holds no optimizer's state"):
            self.found(named, checkpoint, replace(ALONE, zero_stage=stage))

    def test_true_without_a_checkpoint_and_false_with_one_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            SettingsError, match=r"--resume_from_checkpoint True: .* holds no complete checkpoint"
        ):
            given_checkpoint("True", str(tmp_path), ALONE, alone())
        checkpoint = self.make(tmp_path, 5)
        assert given_checkpoint("True", str(tmp_path), ALONE, alone()) == str(checkpoint)
        with pytest.raises(SettingsError, match="holds checkpoint-5, which would be written over"):
            given_checkpoint("False", str(tmp_path), ALONE, alone())

    def test_a_record_has_every_flag_that_says_what_is_learned(self) -> None:
        """But for those that change no number, or how long the run is."""
        groups = parse_arguments(
            [*NEEDED, "--loss_mean_over", "step", "--mm_projector_lr", "3e-5", "--optim", "sgd"]
        )
        record = RunRecord.of(groups, samples=1, samples_digest="d", skipped="no samples")
        known = {"loss_mean_over": "step", "mm_projector_lr": 3e-5, "optim": "sgd", "tune_mm_llm": False}
        assert known.items() <= record.learning.items()
        model, data, _, _ = groups
        own = {field.name for group in (model, data) for field in dataclasses.fields(group)}
        elsewhere = {
            *(
                "model_name_or_path",
                "train_data_root",
                "annotation_path",
                "data_path",
                "max_samples",
                "bad_samples",
            ),
            *("reference_frame", "attn_implementation"),
            *(name for name in own if name.startswith("lora_")),
        }
        assert own - elsewhere <= record.learning.keys()

    def found(self, named: str, checkpoint: Path, record: RunRecord) -> str | None:
        """What is gone on from: without the flag, with `True`, or with the checkpoint's path."""
        if not named:
            return checkpoint_to_resume(str(checkpoint.parent), record, alone())
        given = named if named == "True" else str(checkpoint)
        return given_checkpoint(given, str(checkpoint.parent), record, alone())


class _Answers(Ranks):
    """Two ranks, of which the other one says this."""

    def __init__(self, other: str) -> None:
        super().__init__(None, 0, 2)
        self._other = other

    def exchange(self, name: str, text: str) -> list[str]:
        return [text, self._other]


ALONE = RunRecord(
    world_size=1, zero_stage=None, batch_size=1, accumulation=1, seed=42, by_length=False, drop_last=False, samples=32,
    samples_digest="d", skipped="no samples", learning={"loss_mean_over": "micro_batch", "learning_rate": 2e-5},
)  # fmt: skip


def alone() -> Ranks:
    return Ranks(None, 0, 1)


@pytest.mark.parametrize("context", ["frame", "causal"])
def test_coverage_is_known_without_opening_an_image(
    tmp_path: Path, small_checkpoint: Path, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write_dataset(data, episodes=1, steps=4)
    settings = PrecomputeSettings(
        vggt_model_path=str(small_checkpoint), data_root=str(data), cache_dir=str(tmp_path / "cache"), context=context,
        image_size=56, num_workers=0, device="cpu", max_samples=3,
    )  # fmt: skip
    assert precompute(settings) == 0
    monkeypatch.setattr("vggt_cache.frames.read_frame", None)
    cache = FeatureCache.open(tmp_path / "cache")
    coverage = measure_coverage(plan_of(data, context), cache)
    assert (coverage.total, coverage.present) == (4, 3)
    assert coverage.missing + coverage.unknown == 1
    for shard in (tmp_path / "cache").rglob("*.safetensors"):
        shard.unlink()
    lost = measure_coverage(plan_of(data, context), FeatureCache.open(tmp_path / "cache"))
    assert (lost.total, lost.present, lost.missing) == (4, 0, 4 - coverage.unknown)
    whole = dataclasses.replace(coverage, present=4, unknown=0)
    assert whole.sentence("image") == "Coverage of this data set: 4/4 images are in the cache (100.0 %)"


def test_the_demo_trains_in_the_contexts_that_the_trainer_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def note(folder: Path, flags: list[str], environment: dict[str, str]) -> compare.MeasuredRun:
        trained.append(flags[flags.index("--context") + 1])
        step = {"loss": 1.0, "samples_per_s": 1.0}
        return compare.MeasuredRun(steps=[step] * compare.STEPS, peak_bytes=0)

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(compare, "write_tiny_qwen", lambda path: path)
    monkeypatch.setattr(compare, "run_training", note)
    compare.compare(str(tmp_path))
    assert {*trained} == {context for context in CONTEXTS if not unfit(make_spec(context=context))}
