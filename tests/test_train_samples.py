"""What a run is sure to fail on ends it before its first step, or is left out, the same from start to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from janusvln.data.check import SampleCheck
from janusvln.data.dataset import sentence_of, sources_of
from janusvln.features import computed
from janusvln.train.command import main
from janusvln.train.run import TrainingRun
from janusvln.train.trainer import FeatureTrainer
from small_data import write_image
from train_data_kit import make_dataset, talk, write_frames, write_records
from train_kit import Kit, logged, write_kit
from train_processes_kit import ROOT, start
from vggt_cache.errors import DataError
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.samples import iter_samples

FRAMES = 8
Record = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Kit:
    return write_kit(tmp_path_factory.mktemp("base"), small_checkpoint)


def good(number: int) -> Record:
    return {"images": [f"{number}.png"], "conversations": talk("<image>go", "STOP")}


def cut_short(root: Path) -> None:
    data = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(data[: len(data) // 2])


def emptied(root: Path) -> None:
    (root / "1.png").write_bytes(b"")


def removed(root: Path) -> None:
    (root / "1.png").unlink()


def too_small(root: Path) -> None:
    write_image(root / "1.png", 1, (640, 20))


def as_it_is(root: Path) -> None:
    pass


def no_json(root: Path) -> None:
    lines = (root / "train.jsonl").read_text().splitlines()
    lines[1] = lines[1][:-2]
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")


# Those that name no frame at all may be refused where they are read, or later.
BAD: dict[str, tuple[Record, Callable[[Path], None], str]] = {
    "cut short": (good(1), cut_short, "1.png: it is damaged or cut short"),
    "empty file": (good(1), emptied, "1.png: it is empty"),
    "missing": (good(1), removed, "does not exist"),
    "flat": (good(1), too_small, "1.png"),
    "tag without frame": ({"conversations": talk("<image>go", "STOP")}, as_it_is, "<image>"),
    "frame in another field": (
        {"img": "1.png", "conversations": talk("<image>go", "STOP")}, as_it_is, "<image>",
    ),
    "frame without tag": (good(1) | {"conversations": talk("go", "STOP")}, as_it_is, "has 0 <image> tags"),
    "video": (good(1) | {"video": "a.mp4"}, as_it_is, "names a video"),
    "video tag": (good(1) | {"conversations": talk("<video>go", "STOP")}, as_it_is, "has a <video> tag"),
    "empty answer": (good(1) | {"conversations": talk("<image>go", " ")}, as_it_is, "has an empty answer"),
    "no JSON": (good(1), no_json, "is not valid JSON"),
    "messages": (
        {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>go"}]}, as_it_is, "in messages",
    ),
}  # fmt: skip


def write_data(root: Path, name: str) -> str:
    """Eight samples of one frame, of which the second is bad; returns the sentence that is expected."""
    write_frames(root, FRAMES)
    bad, spoil, sentence = BAD[name]
    write_records(root, [good(number) if number != 1 else bad for number in range(FRAMES)])
    spoil(root)
    return sentence


def cached(kit: Kit, data: Path, cache: Path, **more: Any) -> int:
    return precompute(
        PrecomputeSettings(
            vggt_model_path=str(kit.vggt), data_root=str(data), cache_dir=str(cache), image_size=56,
            feature_dtype="float32", num_workers=0, device="cpu", **more,
        )
    )  # fmt: skip


def flags_of(kit: Kit, data: Path, cache: Path, output_dir: Path, *more: object) -> list[str]:
    given = [*kit.flags(output_dir), "--train_data_root", str(data), "--vggt_cache_dir", str(cache)]
    return [*given, *map(str, more)]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the model is loaded."""

    def fail(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(TrainingRun, "_model", fail)


def refusal(capfd: pytest.CaptureFixture[str], flags: list[str]) -> str:
    assert main(flags) == 2
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[ERROR] ")]
    return sentence


@pytest.mark.parametrize("name", BAD)
def test_a_sample_that_cannot_be_trained_on_ends_the_run_before_it_begins(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_model: None, name: str
) -> None:
    expected = write_data(tmp_path / "data", name)
    cached(base, tmp_path / "data", tmp_path / "cache")
    capfd.readouterr()
    sentence = refusal(capfd, flags_of(base, tmp_path / "data", tmp_path / "cache", tmp_path / "out"))
    assert "1 of the 8 samples cannot be trained on" in sentence
    assert f"{tmp_path / 'data' / 'train.jsonl'}:2 " in sentence
    assert expected in sentence
    assert "--bad_samples skip" in sentence


def test_files_that_are_left_out_are_told_by_training_too(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_model: None
) -> None:
    write_data(tmp_path / "data", "missing")
    (tmp_path / "data" / "episodes.json").write_text('{"episodes": []}')
    cached(base, tmp_path / "data", tmp_path / "cache")
    capfd.readouterr()
    assert main(flags_of(base, tmp_path / "data", tmp_path / "cache", tmp_path / "out")) == 2
    reason = "is one JSON object, not a list of samples or JSON Lines"
    assert capfd.readouterr().out.count(f"[INFO] left out: {tmp_path}/data/episodes.json ({reason})") == 1


def test_frames_of_a_sample_that_differ_in_size_are_found_in_the_cache(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_model: None
) -> None:
    write_frames(tmp_path / "data", FRAMES)
    write_image(tmp_path / "data" / "1.png", 1, (64, 64))
    pair = {"images": ["0.png", "1.png"], "conversations": talk("<image><image>go", "STOP")}
    write_records(tmp_path / "data", [good(number) for number in range(FRAMES)] + [pair])
    assert cached(base, tmp_path / "data", tmp_path / "cache") == 0
    sentence = refusal(capfd, flags_of(base, tmp_path / "data", tmp_path / "cache", tmp_path / "out"))
    assert "1 of the 9 samples" in sentence
    assert "has frames of different sizes" in sentence


def test_the_longest_sample_is_made_before_the_run_begins(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_model: None
) -> None:
    write_frames(tmp_path / "data", FRAMES)
    long = good(1) | {"conversations": talk("<image>go " + "on and on " * 40, "STOP")}
    write_records(tmp_path / "data", [good(number) if number != 1 else long for number in range(FRAMES)])
    assert cached(base, tmp_path / "data", tmp_path / "cache") == 0
    flags = flags_of(base, tmp_path / "data", tmp_path / "cache", tmp_path / "out", "--model_max_length", 300)
    assert "over --model_max_length 300" in refusal(capfd, flags)


def test_what_is_left_out_is_told_and_stays_the_same_when_the_run_is_resumed(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_data(data, "cut short")
    assert cached(base, data, tmp_path / "cache") == 3
    more = [
        "--bad_samples",
        "skip",
        "--per_device_train_batch_size",
        1,
        "--num_train_epochs",
        2,
        "--save_strategy",
        "steps",
        "--save_steps",
        3,
    ]
    flags = flags_of(base, data, tmp_path / "cache", out, *more)
    assert main(flags) == 0
    said = capfd.readouterr().out
    assert "[WARN] 1 of 8 samples are left out" in said
    assert "it is damaged or cut short" in said
    assert "Coverage of this data set: 7/7 images are in the cache (100.0 %)" in said
    (entry,) = [json.loads(line) for line in (out / "skipped_samples.jsonl").read_text().splitlines()]
    assert (entry["number"], entry["sample"]) == (1, "train.jsonl:2")
    whole = logged(out)
    assert len(whole) == 14  # two epochs of the seven others
    for step in (9, 12, 14):
        shutil.rmtree(out / f"checkpoint-{step}")
    write_image(data / "1.png", 1)  # mended meanwhile: the run goes on with the samples it began with
    assert main(flags) == 0
    assert [entry["loss"] for entry in logged(out)] == [entry["loss"] for entry in whole]
    shutil.rmtree(out / "checkpoint-14")
    emptied(data)
    (data / "2.png").write_bytes(b"")
    sentence = refusal(capfd, flags)
    assert "2.png: it is empty" in sentence
    assert "mend them, since a run that is resumed goes on with the samples it began with" in sentence


def test_a_run_that_leaves_samples_out_and_is_stopped_goes_on_with_the_same_ones(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write_data(data, "cut short")
    assert cached(base, data, tmp_path / "cache") == 3
    skipping = ["--bad_samples", "skip", "--per_device_train_batch_size", 1, "--num_train_epochs", 2]

    def flags(name: str) -> list[str]:
        return flags_of(base, data, tmp_path / "cache", tmp_path / name, *skipping)

    assert main(flags("whole")) == 0
    (checkpoint,) = stopped_at(3, flags("out"), monkeypatch, tmp_path / "out")
    list_file = tmp_path / "out" / "skipped_samples.jsonl"
    listed = list_file.read_text()
    write_image(data / "1.png", 1)
    for other in ("", listed.replace('"number": 1', '"number": 2')):
        list_file.write_text(other)
        if not other:
            list_file.unlink()  # with the image mended, one sample more would be seen
        sentence = refusal(capfd, flags("out"))
        assert f"{checkpoint} was written by a skipped_samples.jsonl of 1 sample (digest " in sentence
        assert "some samples of this epoch would come twice and others never" in sentence
    list_file.write_text(listed)
    assert main(flags("out")) == 0
    assert "[WARN] 1 of 8 samples are left out" in capfd.readouterr().out
    losses = [[entry["loss"] for entry in logged(tmp_path / name)] for name in ("whole", "out")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 14


def stopped_at(step: int, flags: list[str], monkeypatch: pytest.MonkeyPatch, output_dir: Path) -> list[Path]:
    """Train until this step, in which SIGTERM comes; returns the checkpoints."""
    real = FeatureTrainer.training_step

    def train(self: FeatureTrainer, *given: Any, **more: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureTrainer, "training_step", train)
        assert main(flags) == 143
    return list(output_dir.glob("checkpoint-*"))


def test_an_unreadable_list_of_what_is_left_out_is_told(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_model: None
) -> None:
    (tmp_path / "skipped_samples.jsonl").write_text('{"number"')
    sentence = refusal(capfd, base.flags(tmp_path))
    assert "skipped_samples.jsonl cannot be read" in sentence
    assert "give it back, or start anew" in sentence


# ---------------------------------------------------------------- the longest samples


TEXTS = (
    "go on ",
    "walk",
    "x" * 150,
    "走到厨房左转，然后停下。" * 5,
    "e\u0301\u0958\ufb2c" * 8,
    "=-" * 30,
    "\n\n 12 ",
)


@pytest.mark.parametrize("known", [True, False], ids=["sizes known", "sizes not known"])
def test_the_samples_that_are_too_long_are_those_that_a_step_would_refuse(
    tmp_path: Path, known: bool
) -> None:
    """Whatever they are written in: the number of words tells little of the number of tokens."""
    random = Random(0)
    names = write_frames(tmp_path, 3)
    records: list[Record] = []
    for _ in range(40):
        images = names[: random.randint(0, 3)]
        text = "".join(random.choices(TEXTS, k=random.randint(1, 6)))
        records.append({"images": images, "conversations": talk("<image>" * len(images) + text, "STOP")})
    write_records(tmp_path, records)
    dataset = make_dataset(tmp_path)
    lengths = sorted(len(dataset[at]["input_ids"]) for at in range(len(dataset)))
    for limit in (lengths[0] - 1, *lengths[::4], lengths[-2], lengths[-1], 100_000):
        dataset = make_dataset(tmp_path, model_max_length=limit)
        refused = {}
        for at in range(len(dataset)):
            try:
                dataset[at]
            except DataError as error:
                refused[at] = sentence_of(error)
        sources = sources_of(str(tmp_path), None, None)
        check = SampleCheck(iter_samples(sources, on_problem=lambda problem: None), str(tmp_path), dataset)
        if known:
            check.grids.note(np.arange(len(check.plan.frames)), (3, 4))
        to_be_made = check.judge_lengths()
        found = {at: f"the sample {dataset.index[at].source} {reason}" for at, reason in check.unfit.items()}
        if known:
            assert not to_be_made
            assert found == refused
        else:
            assert found.items() <= refused.items()
            assert refused.keys() <= found.keys() | set(to_be_made)
            assert all(records[at]["images"] for at in to_be_made)
    assert not refused


@pytest.mark.parametrize("way", ["cached", "live"])
def test_a_sample_of_few_words_and_many_tokens_is_too_long_before_the_run_begins(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_model: None, way: str
) -> None:
    write_frames(tmp_path / "data", FRAMES)
    wordy = good(1) | {"conversations": talk("<image>go " + "on and on " * 20, "STOP")}
    long = good(2) | {"conversations": talk("<image>" + "走到厨房左转，然后停下。" * 12, "STOP")}
    write_records(tmp_path / "data", [wordy, long, *(good(number) for number in range(3, FRAMES))])
    dataset = make_dataset(tmp_path / "data")
    words, tokens = dataset.lengths, [len(dataset[at]["input_ids"]) for at in (0, 1)]
    assert words[0] > words[1]
    assert tokens[0] < tokens[1]
    assert cached(base, tmp_path / "data", tmp_path / "cache") == 0
    more = ["--train_data_root", tmp_path / "data", "--model_max_length", tokens[1] - 1]
    if way == "cached":
        flags = flags_of(base, tmp_path / "data", tmp_path / "cache", tmp_path / "out", *more)
    else:
        flags = base.flags(tmp_path / "out", *more, cached=False)
    sentence = refusal(capfd, flags)
    assert f"train.jsonl:2 has {tokens[1]} tokens with its 1 frames" in sentence
    assert "1 of the 7 samples" in sentence


# ---------------------------------------------------------------- coverage, and an encoder that will be needed


@pytest.mark.parametrize("way", ["copied", "linked"])
@pytest.mark.parametrize("context", ["frame", "causal"])
def test_coverage_is_of_the_images_contents_wherever_they_lie(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], way: str, context: str
) -> None:
    data = tmp_path / "elsewhere"
    if way == "copied":
        shutil.copytree(base.data, data)
    else:
        data.symlink_to(base.data)
    flags = [*base.flags(tmp_path / "out", "--max_steps", 1, context=context), "--train_data_root", str(data)]
    assert main(flags) == 0
    assert "Coverage of this data set: 32/32 " in capfd.readouterr().out
    (entry,) = logged(tmp_path / "out")
    assert entry["cache_hit_rate"] == 1.0


@pytest.mark.parametrize("fault", ["none given", "absent", "other weights"])
def test_an_encoder_that_will_be_needed_is_opened_before_the_run_begins(
    base: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_model: None, fault: str
) -> None:
    write_frames(tmp_path / "data", FRAMES)
    write_records(tmp_path / "data", [good(number) for number in range(FRAMES)])
    assert cached(base, tmp_path / "data", tmp_path / "cache", max_samples=6) == 0
    flags = flags_of(
        base, tmp_path / "data", tmp_path / "cache", tmp_path / "out", "--vggt_cache_miss", "encode"
    )
    at = flags.index("--vggt_model_path")
    if fault == "none given":
        del flags[at : at + 2]
    if fault == "other weights":
        flags[at + 1] = str(other_vggt(base, tmp_path / "vggt"))
    assert main(flags) == 2
    out, err = capfd.readouterr()
    assert "[WARN] 2 of the 8 images that this data needs are not in the cache: VGGT computes them" in out
    assert "up to 2 frame passes in every epoch" in out
    expected = {"none given": "is not given", "absent": "/no/vggt", "other weights": "holds another encoder"}
    assert expected[fault] in err


def other_vggt(kit: Kit, directory: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(kit.vggt, directory)
    weights = load_file(directory / "model.safetensors")
    name = "aggregator.frame_blocks.0.mlp.fc1.weight"
    weights[name] = weights[name] + 1
    save_file(weights, directory / "model.safetensors")
    return directory


def test_an_encoder_that_was_opened_is_not_read_again_for_the_first_miss(
    base: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_frames(tmp_path / "data", FRAMES)
    write_records(tmp_path / "data", [good(number) for number in range(FRAMES)])
    assert cached(base, tmp_path / "data", tmp_path / "cache", max_samples=6) == 0
    opened: list[object] = []
    real = computed.Checkpoint.open
    monkeypatch.setattr(
        computed.Checkpoint, "open", lambda *given, **more: opened.append(given) or real(*given, **more)
    )
    more = ["--vggt_cache_miss", "encode", "--vggt_model_path", base.vggt, "--num_train_epochs", 1]
    assert main(flags_of(base, tmp_path / "data", tmp_path / "cache", tmp_path / "out", *more)) == 0
    assert len(opened) == 1


# ---------------------------------------------------------------- all ranks


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_all_ranks_leave_out_the_same_samples_or_all_stop(base: Kit, tmp_path: Path, policy: str) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_data(data, "cut short")
    write_records(data, [good(number) for number in range(FRAMES)] + [good(0)])
    assert cached(base, data, tmp_path / "cache") == 3
    zero = ["--deepspeed", ROOT / "scripts" / "zero3.json", "--per_device_train_batch_size", 1]
    flags = flags_of(base, data, tmp_path / "cache", out, "--bad_samples", policy, *zero)
    log = tmp_path / "log"
    code = start(flags, log=log).wait(timeout=240)
    text = log.read_text()
    if policy == "skip":
        assert code == 0, text[-3000:]
        assert len(logged(out)) == 3 * 4  # three epochs of eight samples on two ranks
        return
    assert code != 0
    for who in ("", "[rank 1] "):
        assert f"[ERROR] {who}1 of the 9 samples cannot be trained on" in text
