"""Training from the cache is the same training: whole runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from janusvln.demo.tiny_qwen import write_tiny_qwen
from janusvln.features.coverage import measure_coverage
from janusvln.train.command import main
from janusvln.train.trainer import FeatureTrainer
from small_data import plan_of, write_image
from train_kit import Kit, largest_difference, logged
from vggt_cache.store import FeatureCache

STEPS = 30
SAME = 1e-5
"""Relative; what float32 noise between batches of different composition may make."""


def refusal(capfd: pytest.CaptureFixture[str], flags: list[str]) -> str:
    """The one sentence with which a run ends before it begins."""
    assert main(flags) != 0
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[ERROR] ")]
    return sentence


@pytest.mark.promise("The same training", "Never VGGT where it is not needed")
@pytest.mark.parametrize(
    ("context", "batch", "accumulation"),
    [
        ("frame", 1, 2),
        ("causal", 2, 1),
        *(
            pytest.param(*settings, marks=pytest.mark.slow)
            for settings in itertools.product(("frame", "causal"), (1, 2), (1, 2))
            if settings not in [("frame", 1, 2), ("causal", 2, 1)]
        ),
    ],
)
def test_losses_and_gradients_are_those_of_live_training(
    kit: Kit, tmp_path: Path, context: str, batch: int, accumulation: int
) -> None:
    more = [
        "--max_steps",
        STEPS,
        "--per_device_train_batch_size",
        batch,
        "--gradient_accumulation_steps",
        accumulation,
    ]
    assert main(kit.flags(tmp_path / "live", *more, context=context, cached=False)) == 0
    assert main(kit.flags(tmp_path / "cached", *more, context=context)) == 0
    live, cached = logged(tmp_path / "live"), logged(tmp_path / "cached")
    assert len(live) == STEPS
    assert largest_difference(live, cached) < SAME
    assert not [entry for entry in live if "cache_hit_rate" in entry]  # no cache is not a hit rate of 0
    assert {entry["cache_hit_rate"] for entry in cached} == {1.0}
    assert {entry["encode_ms"] for entry in cached} == {0.0}


def test_the_features_matter_to_the_loss(kit: Kit, tmp_path: Path) -> None:
    """Else the comparisons of this file would say nothing."""
    for lam in ("0.2", "0.0"):
        assert main(kit.flags(tmp_path / lam, "--max_steps", 3, "--lam", lam)) == 0
    assert largest_difference(logged(tmp_path / "0.2"), logged(tmp_path / "0.0")) > 1e-4


def test_packed_batches_train_as_padded_ones_do(kit: Kit, tmp_path: Path) -> None:
    more = ["--max_steps", 6, "--per_device_train_batch_size", 2]
    for packed in (True, False):
        assert main(kit.flags(tmp_path / str(packed), *more, "--data_flatten", packed)) == 0
    assert largest_difference(logged(tmp_path / "True"), logged(tmp_path / "False")) < 1e-4


def test_grouping_by_length_and_workers_change_no_feature(kit: Kit, tmp_path: Path) -> None:
    more = ["--max_steps", 6, "--per_device_train_batch_size", 2, "--group_by_modality_length", "True"]
    assert main(kit.flags(tmp_path / "workers", *more, "--dataloader_num_workers", 2)) == 0
    assert main(kit.flags(tmp_path / "alone", *more)) == 0
    assert largest_difference(logged(tmp_path / "workers"), logged(tmp_path / "alone")) < 1e-7
    assert main(kit.flags(tmp_path / "random", *more[:4])) == 0
    assert largest_difference(logged(tmp_path / "random"), logged(tmp_path / "alone")) > 1e-4


def test_what_one_run_has_staged_the_next_trains_from_without_reading_the_cache(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, local = tmp_path / "cache", tmp_path / "local"
    shutil.copytree(kit.cache, cache)
    flags = ["--max_steps", 3, "--vggt_cache_stage", local, "--vggt_cache_stage_limit", "3MB"]

    def trained(name: str) -> list[dict[str, Any]]:
        given = kit.flags(tmp_path / name, *flags)
        given[given.index("--vggt_cache_dir") + 1] = str(cache)
        assert main(given) == 0
        return logged(tmp_path / name)

    through = trained("through")
    assert {entry["cache_staged_rate"] for entry in through} == {0.0}
    assert f"[INFO] 0 features are staged in {local}\n" in capfd.readouterr().out
    for path in cache.rglob("*.safetensors"):  # where the records are, whoever reads them ends the run
        path.chmod(0o644)
        with open(path, "r+b") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            file.seek(begin)
            file.write(bytes(path.stat().st_size - begin))
    staged = trained("staged")
    assert {entry["cache_staged_rate"] for entry in staged} == {1.0}
    assert largest_difference(through, staged) == 0.0
    (count,) = re.findall(r"\[INFO\] (\d+) features are staged in", capfd.readouterr().out)
    assert int(count) >= 24  # 3 steps of 8 samples, and what was read ahead


def test_a_stage_that_cannot_hold_the_data_is_told_before_the_first_step(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGT_CACHE_STAGE", str(tmp_path / "local"))
    monkeypatch.setenv("VGGT_CACHE_STAGE_LIMIT", "200K")
    assert main(kit.flags(tmp_path / "out", "--max_steps", 1)) == 0
    told = capfd.readouterr().out
    assert f"[WARN] {tmp_path / 'local'} has room for 200.0 KiB of the " in told
    assert "% of the reads of each epoch will be local" in told
    monkeypatch.setenv("VGGT_CACHE_STAGE_LIMIT", "some")
    assert "'some', which is not a size" in refusal(capfd, kit.flags(tmp_path / "out", "--max_steps", 1))
    monkeypatch.delenv("VGGT_CACHE_STAGE")
    monkeypatch.setenv("VGGT_CACHE_STAGE_LIMIT", "2TB")
    assert "has no effect without --vggt_cache_stage" in refusal(capfd, kit.flags(tmp_path / "out"))


# ---------------------------------------------------------------- what is said


def test_the_start_says_what_the_guide_promises(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGT_CACHE_DIR", str(kit.cache))
    monkeypatch.setenv("VGGT_CACHE_DEBUG", "1")
    flags = kit.flags(tmp_path, "--max_steps", 1)
    at = flags.index("--vggt_cache_dir")
    del flags[at : at + 2]
    assert main(flags) == 0
    out = capfd.readouterr().out
    assert f"[INFO] VGGT feature cache enabled: {kit.cache}\n" in out
    assert "[INFO] Coverage of this data set: 32/32 images are in the cache (100.0 %)\n" in out
    assert "[DEBUG] Using cached features for sample " in out


def test_live_training_says_so(kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(kit.flags(tmp_path, "--max_steps", 1, cached=False)) == 0
    assert "[INFO] No feature cache: VGGT runs in every step; frame-" in capfd.readouterr().out


def test_tensorboard_gets_the_figures(kit: Kit, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*kit.flags(tmp_path, "--max_steps", 2), "--report_to", "tensorboard"]
    assert main(flags) == 0
    (events,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    names = ("loss", "cache_hit_rate", "cache_wait_ms", "cache_read_mb_per_s", "encode_ms")
    assert {f"train/{name}" for name in names} <= set(tags)


# ---------------------------------------------------------------- refusals


def test_a_flag_that_contradicts_the_cache_is_refused(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sentence = refusal(capfd, kit.flags(tmp_path, "--image_size", 70))
    assert "--image_size 70 (the cache: 56)" in sentence


def test_a_directory_without_a_model_is_refused(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = kit.flags(tmp_path / "out", "--max_steps", 1)
    flags[flags.index("--model_name_or_path") + 1] = str(tmp_path)
    assert f"--model_name_or_path {tmp_path} has no tokenizer" in refusal(capfd, flags)


@pytest.mark.promise("Never the wrong context")
def test_a_model_trained_with_another_context_is_refused(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(kit.flags(tmp_path / "frame", "--max_steps", 1)) == 0
    capfd.readouterr()
    flags = kit.flags(tmp_path / "causal", "--max_steps", 1, context="causal")
    flags[flags.index("--model_name_or_path") + 1] = str(tmp_path / "frame")
    assert "was trained with features of context frame" in refusal(capfd, flags)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_is_one_sentence(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    data = tmp_path / "data"
    shutil.copytree(kit.data, data)
    for image in data.glob("ep0/*.png"):
        image.unlink()
    flags = kit.flags(tmp_path / "out", "--max_steps", 30, "--dataloader_num_workers", workers)
    flags[flags.index("--train_data_root") + 1] = str(data)
    sentence = refusal(capfd, flags)
    assert "train.jsonl:" in sentence
    assert "does not exist" in sentence


def test_known_gaps_stop_a_run_that_must_not_miss_before_it_begins(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Precompute has seen all images, and then shards were lost."""
    cache = tmp_path / "cache"
    shutil.copytree(kit.cache, cache)
    for shard in cache.glob("frame-*/shards/*"):
        shard.unlink()
    flags = kit.flags(tmp_path / "out", "--max_steps", 5, "--vggt_cache_dir", cache)
    assert "32 of the 32 features that this data needs are not in" in refusal(capfd, flags)
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_an_image_replaced_in_place_is_never_given_its_old_feature(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(kit.data, data)
    for number, image in enumerate(sorted(data.glob("*/*.png"))):
        write_image(image, 5000 + number)
    flags = kit.flags(tmp_path / "out", "--max_steps", 5)
    flags[flags.index("--train_data_root") + 1] = str(data)
    assert "32 of the 32 features that this data needs are not in" in refusal(capfd, flags)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_launchers_number_that_is_none_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    assert main(["--output_dir", str(tmp_path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"[ERROR] the environment's {name} is 'x', which is not a whole number: ")


def test_a_launchers_number_that_is_empty_says_nothing(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    assert main(kit.flags(tmp_path, "--max_steps", 1)) == 0


# ---------------------------------------------------------------- filling


@pytest.mark.parametrize("context", ["frame", pytest.param("causal", marks=pytest.mark.slow)])
def test_the_first_epoch_fills_the_cache_and_the_second_reads_it(
    kit: Kit, tmp_path: Path, context: str
) -> None:
    more: list[Any] = ["--num_train_epochs", 2, "--per_device_train_batch_size", 2]
    assert main(kit.flags(tmp_path / "live", *more, context=context, cached=False)) == 0
    filling = ["--vggt_cache_dir", tmp_path / "cache", "--vggt_cache_miss", "fill"]
    assert main(kit.flags(tmp_path / "fill", *more, *filling, context=context, cached=False)) == 0
    live, filled = logged(tmp_path / "live"), logged(tmp_path / "fill")
    assert largest_difference(live, filled) < SAME
    assert [entry["cache_hit_rate"] for entry in filled] == [0.0] * 16 + [1.0] * 16
    with FeatureCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 32
        coverage = measure_coverage(plan_of(kit.data, cache.spec.context), cache)
    assert (coverage.present, coverage.unknown) == (32, 0)


@pytest.mark.slow
def test_a_disk_that_is_really_full_does_not_stop_training(
    kit: Kit, tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The features of this data are a little more than the disk holds."""
    more: list[Any] = ["--num_train_epochs", 2, "--per_device_train_batch_size", 2]
    assert main(kit.flags(tmp_path / "live", *more, cached=False)) == 0
    filling = ["--vggt_cache_dir", small_disk / "cache", "--vggt_cache_miss", "fill"]
    assert main(kit.flags(tmp_path / "fill", *more, *filling, cached=False)) == 0
    found = logged(tmp_path / "fill")
    assert largest_difference(logged(tmp_path / "live"), found) < SAME
    err = capfd.readouterr().err
    assert err.count("[WARN] from now on features are computed here and not stored") == 1
    assert "the disk is full" in err
    lost = int(found[-1]["features_not_stored"])
    assert lost > 0
    assert f"[WARN] {lost} of 32 features that were computed here are not stored in {small_disk}" in err
    with FeatureCache.open(small_disk / "cache") as cache:
        assert len(cache) == 32 - lost


# ---------------------------------------------------------------- resuming


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(kit: Kit, tmp_path: Path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", 5, "--disable_tqdm", "True"]
    more = [*saving, "--num_train_epochs", 2, "--per_device_train_batch_size", 2]
    assert main(kit.flags(tmp_path / "whole", *more)) == 0
    flags = kit.flags(tmp_path / "killed", *more)
    # Killed in the second epoch, whose order of samples is another one.
    _kill_when(tmp_path / "killed" / "checkpoint-20" / "trainer_state.json", flags)
    assert not (tmp_path / "killed" / "trainer_state.json").exists()
    for later in (25, 30, 32):
        shutil.rmtree(tmp_path / "killed" / f"checkpoint-{later}", ignore_errors=True)
    torn = tmp_path / "killed" / "checkpoint-25"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    assert main(flags) == 0
    whole, resumed = logged(tmp_path / "whole"), logged(tmp_path / "killed")
    assert len(whole) == 32
    assert largest_difference(whole, resumed) == 0.0


def test_a_finished_run_that_is_started_again_is_left_as_it_is(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = kit.flags(tmp_path, "--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4)
    assert main(flags) == 0
    before = logged(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert main(flags) == 0
    assert f"[SUCCESS] Nothing is left to train: {tmp_path / 'checkpoint-4'}" in capfd.readouterr().out
    assert logged(tmp_path) == before
    assert (tmp_path / "model.safetensors").exists()


def test_a_model_that_was_half_written_at_the_end_is_mended_from_the_last_checkpoint(
    kit: Kit, tmp_path: Path
) -> None:
    """Nor does the model of an earlier end stay, where a run that was made longer is killed before it saves its own."""
    flags = kit.flags(tmp_path, "--save_strategy", "steps", "--save_steps", 1, "--max_steps", 2)
    assert main(flags) == 0
    earlier = (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    for left in (earlier, earlier[:1000]):
        (tmp_path / "model.safetensors").write_bytes(left)
        shutil.copy(tmp_path / "checkpoint-1" / "trainer_state.json", tmp_path)
        assert main(flags) == 0
        last = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
        found = load_file(tmp_path / "model.safetensors")
        assert last.keys() == found.keys()
        assert all(torch.equal(found[name], last[name]) for name in last)
        assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_checkpoint_is_due_is_one_sentence_and_the_run_goes_on_later(
    kit: Kit, tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 1, "--max_steps", 2]
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    flags = kit.flags(small_disk / "out", *more)
    assert main([*flags[:-1], "1"]) == 0
    capfd.readouterr()
    written = [small_disk / "out" / "checkpoint-1" / name for name in ("model.safetensors", "optimizer.pt")]
    model, optimizer = (path.stat().st_size for path in written)
    filler = small_disk / "filler"
    for room in (model // 2, model + optimizer // 2):
        filler.write_bytes(b"0" * (shutil.disk_usage(small_disk).free - room))
        assert "so training ends here, and the last checkpoint before it is kept" in refusal(capfd, flags)
        filler.unlink()
        (whole,) = (small_disk / "out").glob("checkpoint-*/trainer_state.json")
        assert whole.parent.name == "checkpoint-1"
        shutil.rmtree(small_disk / "out" / "checkpoint-2", ignore_errors=True)
    assert main(flags) == 0
    assert "Resuming from" in capfd.readouterr().out


def test_memory_that_runs_out_is_one_sentence(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: FeatureTrainer, *_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(FeatureTrainer, "training_step", step)
    sentence = refusal(capfd, kit.flags(tmp_path, "--max_steps", 1))
    assert "memory has run out (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0" in sentence
    assert "PER_DEVICE_BATCH_SIZE" in sentence


def test_an_optimizer_that_cannot_be_had_is_one_sentence(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sentence = refusal(capfd, kit.flags(tmp_path, "--max_steps", 1, "--optim", "galore_adamw"))
    assert "--optim galore_adamw cannot be used here (" in sentence


SAVING = ["--save_strategy", "steps", "--save_steps", 2]


@pytest.fixture(scope="module")
def trained(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on `frame` features, with checkpoint-2 and checkpoint-4."""
    output_dir = tmp_path_factory.mktemp("trained") / "out"
    assert main(kit.flags(output_dir, *SAVING, "--max_steps", 4)) == 0
    return output_dir


def other_vggt(kit: Kit, directory: Path) -> Path:
    """The same encoder with one weight changed."""
    shutil.copytree(kit.vggt, directory)
    weights = load_file(directory / "model.safetensors")
    name = "aggregator.frame_blocks.0.mlp.fc1.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] += 1
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.promise("Never the wrong context")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("differs", ["context", "weights_digest", "image_size", "resize_mode", "alpha"])
def test_a_checkpoint_trained_with_other_features_is_not_resumed(
    kit: Kit, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str], differs: str, named: bool
) -> None:
    output_dir = tmp_path / "out" if named else shutil.copytree(trained, tmp_path / "out")
    checkpoint = (trained if named else output_dir) / "checkpoint-4"
    flags: list[object] = [*SAVING, "--max_steps", 8]
    if named:
        flags += ["--resume_from_checkpoint", checkpoint]
    if differs == "context":
        given = kit.flags(output_dir, *flags, context="causal")
    else:
        flags += {
            "weights_digest": ["--vggt_model_path", other_vggt(kit, tmp_path / "vggt")],
            "image_size": ["--image_size", 70],
            "resize_mode": ["--resize_mode", "pad"],
            "alpha": ["--alpha", "drop"],
        }[differs]
        given = kit.flags(output_dir, *flags, cached=False)
    sentence = refusal(capfd, given)
    assert f"{checkpoint} was trained with features of {differs} " in sentence
    assert not (output_dir / "checkpoint-6").exists()


def test_a_run_goes_on_with_features_that_differ_by_rounding_and_says_so(
    kit: Kit, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cache may be converted to another dtype while its run is stopped."""
    output_dir = shutil.copytree(trained, tmp_path / "out")
    flags = kit.flags(output_dir, "--max_steps", 5, "--feature_dtype", "bfloat16", cached=False)
    assert main(flags) == 0
    out = capfd.readouterr().out
    assert "features of feature_dtype float32, and goes on with feature_dtype bfloat16" in out
    assert f"Resuming from {output_dir / 'checkpoint-4'}" in out


def test_what_is_no_checkpoint_and_one_that_does_not_say_its_features_are_refused(
    kit: Kit, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sentence = refusal(capfd, kit.flags(tmp_path / "out", "--resume_from_checkpoint", tmp_path))
    assert f"--resume_from_checkpoint {tmp_path} is no directory of a checkpoint" in sentence
    assert "holds no complete checkpoint" in refusal(
        capfd, kit.flags(tmp_path / "out", "--resume_from_checkpoint", "True")
    )
    checkpoint = shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    fields = json.loads((checkpoint / "config.json").read_text())
    for written in (json.dumps({**fields, "feature_spec": None}), "torn"):
        (checkpoint / "config.json").write_text(written)
        sentence = refusal(capfd, kit.flags(tmp_path / "out", "--resume_from_checkpoint", checkpoint))
        assert f"{checkpoint} does not say which features it was trained with" in sentence


@pytest.mark.parametrize("name", ["num_hidden_layers", "lam"])
def test_a_model_that_is_built_otherwise_is_not_gone_on_with(
    kit: Kit, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    other = write_tiny_qwen(tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    if name == "lam":
        fields["lam"] = 0.5
    else:
        fields["text_config"] |= {name: 1, "layer_types": fields["text_config"]["layer_types"][:1]}
        weights = load_file(other / "model.safetensors")
        kept = {key: weights[key] for key in weights if ".layers.1." not in key}
        save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(fields))
    out = shutil.copytree(trained, tmp_path / "out")
    sentence = refusal(capfd, kit.flags(out, *SAVING, "--max_steps", 6, "--model_name_or_path", other))
    assert f"checkpoint-4 holds a model with {name} " in sentence


def _kill_when(path: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "janusvln.train", *flags]
    # As many threads as in this process: sums are rounded in the order in which threads share them.
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        while not path.exists():
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.02)
        _wait_for_json(path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_json(path: Path) -> None:
    while True:
        try:
            json.loads(path.read_text())
        except ValueError:
            time.sleep(0.01)
        else:
            return
