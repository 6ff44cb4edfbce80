"""`precompute` from flags to exit code, on real files with the real encoder; only the images are tiny."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch

from small_data import SIZE, history, write_annotations, write_dataset, write_episode, write_image
from vggt_cache import FeatureCache, PixelCache
from vggt_cache.cli import main
from vggt_cache.encoder import Checkpoint
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.identity import feature_key, frame_digest
from vggt_cache.precompute.estimate import time_sentence
from vggt_cache.store import list_stores


@pytest.fixture
def data(tmp_path):
    """Two episodes of six steps: 12 images, 12 samples."""
    write_dataset(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, data, small_checkpoint, capsys):
    """Run precompute with further flags; returns (exit code, stdout, stderr)."""

    def precompute(*flags: object, data_root: Path = data) -> tuple[int, str, str]:
        capsys.readouterr()
        arguments = ["precompute", "--vggt_model_path", small_checkpoint, "--data_root", data_root]
        code = main([*map(str, arguments), "--cache_dir", str(tmp_path / "cache"), *SIZE, *map(str, flags)])
        return code, *capsys.readouterr()

    return precompute


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def records(cache_dir: Path, context: str = "frame") -> dict[bytes, torch.Tensor]:
    with FeatureCache.open(cache_dir, context=context) as cache:
        found = {key: cache.get_by_key(key) for key in cache}
    assert all(feature is not None for feature in found.values())
    return found


# ---------------------------------------------------------------- what is said


def test_the_guides_lines_stand_in_the_output_word_for_word(run, data, cache_dir):
    code, out, err = run("--verify")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("[")]
    expected = [
        f"[INFO] Scanning data root: {data}",
        "[INFO] Found 1 JSONL files",
        "[INFO] Total samples: 12",
        "[INFO] Unique images to process: 12",
        "[INFO] Model loaded successfully",
        "[SUCCESS] Processed 12 images",
        f"[INFO] Cache directory: {cache_dir}",
        "[INFO] Verification: 12/12 valid, 0 invalid",
    ]
    assert [line for line in lines if line in expected] == expected
    assert re.search(r"Processing: 100%\|.*12/12", err)


def test_in_causal_context_the_noun_is_features_and_sharing_is_told(run):
    code, out, _ = run("--context", "causal", "--verify")
    assert code == 0
    assert "[INFO] 12 samples, 12 distinct frame lists; frame passes: 42 before sharing, 12 after" in out
    assert "[INFO] Unique features to process: 12" in out
    assert "[SUCCESS] Processed 12 features" in out
    assert "[INFO] Verification: 12/12 valid, 0 invalid" in out


def test_every_flag_may_be_written_with_dashes(tmp_path, data, small_checkpoint, capsys):
    arguments = [
        "precompute",
        "--vggt-model-path",
        small_checkpoint,
        "--data-root",
        data,
        "--cache-dir",
        tmp_path / "c",
    ]
    arguments += [
        "--image-size",
        "56",
        "--device",
        "cpu",
        "--num-workers",
        "0",
        "--batch-size",
        "4",
        "--max-samples",
        "2",
    ]
    arguments += [
        "--skip-existing",
        "--feature-dtype",
        "float32",
        "--resize-mode",
        "pad",
        "--compute-dtype",
        "float32",
    ]
    assert main(list(map(str, arguments))) == 0
    assert "Processed 2 images" in capsys.readouterr().out


# ---------------------------------------------------------------- what is stored


def test_a_stored_frame_feature_is_the_encoders_output_for_that_image(run, data, cache_dir, small_checkpoint):
    run("--feature_dtype", "float32")
    encoder = Checkpoint.open(str(small_checkpoint)).load()
    with FeatureCache.open(cache_dir) as cache:
        path = data / "ep1" / "0003.png"
        pixels = torch.from_numpy(decode_frame(read_frame(path), cache.spec.preprocessing))
        stored = cache.get([data / "ep0" / "0000.png", path])
        assert stored.shape == (3, 4, 768)
        torch.testing.assert_close(stored, encoder.frame_features(pixels[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.promise("Never a wrong feature")
def test_a_stored_causal_feature_is_that_of_its_list_and_of_no_other(run, data, cache_dir):
    run("--context", "causal", "--feature_dtype", "float32")
    run("--feature_dtype", "float32")
    frames = [data / "ep1" / f"{step:04d}.png" for step in range(4)]
    with (
        FeatureCache.open(cache_dir, context="causal") as causal,
        FeatureCache.open(cache_dir, context="frame") as frame,
    ):
        feature = causal.get(frames)
        assert feature is not None
        assert causal.get(frames[1:]) is None
        assert causal.get(frames[::-1]) is None
        assert not torch.allclose(feature, frame.get(frames), atol=1e-2)
        torch.testing.assert_close(causal.get(frames[:1]), frame.get(frames[:1]), atol=1e-5, rtol=1e-5)


def test_replacing_an_image_loses_its_feature_even_with_size_and_time_restored(run, data, cache_dir):
    run("--context", "causal")
    frames = [data / "ep0" / f"{step:04d}.png" for step in range(3)]
    before = os.stat(frames[1])
    content = bytearray(frames[1].read_bytes())
    content[-20] ^= 1  # in the checksum of the last chunk: the same size, another file
    with FeatureCache.open(cache_dir) as cache:
        assert cache.get(frames) is not None
        frames[1].write_bytes(content)
        os.utime(frames[1], ns=(before.st_atime_ns, before.st_mtime_ns))
        after = os.stat(frames[1])
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert cache.get(frames) is None
        assert cache.get(frames[:1]) is not None


def test_equal_images_under_two_names_are_stored_once(run, data, cache_dir):
    shutil.copy(data / "ep0" / "0000.png", data / "ep0" / "0001.png")
    code, out, _ = run("--verify")
    assert code == 0
    assert "Processed 11 images" in out
    assert "12/12 valid" in out
    assert len(records(cache_dir)) == 11


# ---------------------------------------------------------------- what is not computed again


@pytest.mark.promise("Never VGGT where it is not needed")
def test_a_second_run_computes_nothing_opens_no_image_and_loads_no_model(run, monkeypatch):
    run()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an unchanged run must not do this")

    monkeypatch.setattr("vggt_cache.precompute.digests.read_frame", refuse)
    monkeypatch.setattr(Checkpoint, "load", refuse)
    code, out, _ = run()
    assert code == 0
    assert "[INFO] Unique images to process: 0" in out
    assert "[INFO] Already in the cache: 12" in out
    assert "[SUCCESS] Processed 0 images" in out


@pytest.fixture
def states_never_change(monkeypatch):
    """Every file has one state for ever, as where another file is put in its place unnoticed."""
    state = (1, 10**18 + 1, 10**18 + 1, 7)
    monkeypatch.setattr("vggt_cache.precompute.digests.file_state", lambda path: state)
    monkeypatch.setattr("vggt_cache.samples.paths.state_of", lambda status: state)


@pytest.mark.parametrize("verify", ["command", "flag"])
@pytest.mark.usefixtures("states_never_change")
def test_another_file_of_the_same_state_is_found_by_verification_and_computed_after_it(
    run, data, cache_dir, capsys, verify
):
    run()
    write_image(data / "ep0" / "0003.png", 777)
    code, out, _ = run(*(["--verify"] if verify == "flag" else []))
    assert "Processed 0 images" in out, "nothing but the bytes tells that file from the one before"
    if verify == "command":
        code = main(["verify", str(cache_dir), "--data_root", str(data)])
        out = capsys.readouterr().out
    assert (code, "11/12 valid" in out) == (1, True)
    code, out, _ = run("--verify")
    assert code == 0
    assert "Processed 1 images" in out
    assert "12/12 valid" in out


@pytest.mark.usefixtures("states_never_change")
def test_a_cache_that_cannot_be_written_to_is_verified_and_nothing_said_of_that(
    run, data, cache_dir, capsys, monkeypatch
):
    run()
    shutil.rmtree(cache_dir / "digests")
    monkeypatch.setattr(os, "makedirs", _read_only)
    assert main(["verify", str(cache_dir), "--data_root", str(data)]) == 0
    assert "WARN" not in capsys.readouterr().out
    assert not (cache_dir / "digests").exists()


def _read_only(*arguments: object, **options: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_added_data_costs_only_what_is_new(run, data, cache_dir):
    run("--context", "causal")
    names = write_episode(data, "ep9", 4, seed=9)
    write_annotations(data / "more.jsonl", [[names[frame] for frame in history(step)] for step in range(4)])
    before = records(cache_dir, "causal")
    _, out, _ = run("--context", "causal")
    assert "Unique features to process: 4" in out
    assert "Processed 4 features" in out
    after = records(cache_dir, "causal")
    assert before.keys() < after.keys()


def test_a_lost_digest_table_costs_reading_and_no_computing(run, cache_dir):
    run()
    shutil.rmtree(cache_dir / "digests")
    _, out, _ = run()
    assert "Unique images to process: 12" in out
    assert "Processed 0 images" in out


def test_no_skip_existing_computes_everything_again(run, cache_dir):
    run()
    before = records(cache_dir)
    _, out, _ = run("--no-skip_existing")
    assert "Processed 12 images" in out
    after = records(cache_dir)
    assert before.keys() == after.keys()


def test_max_samples_takes_the_first_images_and_the_rest_can_follow(run, data, cache_dir):
    _, out, _ = run("--max_samples", 5)
    assert "Processed 5 images" in out
    with FeatureCache.open(cache_dir, root=data) as cache:
        assert [cache.get([f"ep0/{step:04d}.png"]) is not None for step in range(6)] == [True] * 5 + [False]
    _, out, _ = run("--max_samples", -1)
    assert "Processed 7 images" in out


def test_batch_size_workers_and_order_do_not_change_a_feature(run, cache_dir, tmp_path):
    for context in ("frame", "causal"):
        run("--context", context, "--feature_dtype", "float32", "--batch_size", 1)
        alone = records(cache_dir, context)
        shutil.rmtree(cache_dir)
        run("--context", context, "--feature_dtype", "float32", "--batch_size", 5, "--num_workers", 2)
        together = records(cache_dir, context)
        shutil.rmtree(cache_dir)
        assert alone.keys() == together.keys()
        for key, feature in alone.items():
            torch.testing.assert_close(feature, together[key], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- bad inputs


def bad_file(path: Path, kind: str) -> None:
    good = path.read_bytes()
    path.unlink()
    if kind == "corrupt":
        path.write_bytes(good[:60] + bytes(100) + good[160:])
    elif kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "not an image":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "huge":
        path.write_bytes(good[:16] + (100_000).to_bytes(4, "big") * 2 + good[24:])
    elif kind == "folder":
        path.mkdir()


KINDS = ["missing", "corrupt", "truncated", "not an image", "empty", "huge", "folder"]


@pytest.mark.promise("Never silent")
@pytest.mark.parametrize("context", ["frame", "causal"])
def test_bad_files_cost_one_line_each_and_the_run_goes_on(run, data, cache_dir, context):
    names = write_episode(data, "bad", len(KINDS), seed=5)
    write_annotations(data / "bad.jsonl", [[name] for name in names])
    for name, kind in zip(names, KINDS, strict=True):
        bad_file(data / name, kind)
    code, out, _ = run("--context", context, "--verify")
    assert code == 3
    warned = [line for line in out.splitlines() if line.startswith(f"[WARN] {data}/bad/")]
    assert len(warned) == len(KINDS)
    assert all(line.count(f"{data}/bad/") == 1 for line in warned), "a path is named once"
    failures = [json.loads(line) for line in (cache_dir / "failures.jsonl").read_text().splitlines()]
    assert {entry["path"] for entry in failures} == {str(data / name) for name in names}
    assert all(entry["reason"] and entry["time"] for entry in failures)
    assert f"[WARN] {len(KINDS)} inputs could not be used" in out
    assert f"Verification: 12/{12 + len(KINDS)} valid, {len(KINDS)} invalid" in out
    run("--context", context)
    assert len((cache_dir / "failures.jsonl").read_text().splitlines()) == len(KINDS), (
        "known failures are not repeated"
    )


def test_a_bad_frame_costs_only_the_lists_that_contain_it(run, data, cache_dir):
    (data / "ep0" / "0003.png").write_bytes(b"no image")
    code, out, _ = run("--context", "causal")
    assert code == 3
    assert "Processed 9 features" in out  # ep0 steps 0..2, ep1 all six


def test_frames_of_two_sizes_in_one_list_are_refused_by_name(run, data):
    write_image(data / "ep0" / "0002.png", 1, size=(48, 64))
    code, out, _ = run("--context", "causal")
    assert code == 3
    assert "have different patch grids" in out
    assert "Processed 8 features" in out
    assert run()[0] == 0, "images alone may have any size"


def test_bad_annotations_are_named_by_line(run, data, cache_dir):
    with open(data / "train.jsonl", "a") as file:
        file.write('{"images": ["ep0/0000.png"\n{"images": [7]}\n')
    code, out, _ = run()
    assert code == 3
    assert re.search(r"\[WARN\] .*train\.jsonl:13: ", out)
    assert re.search(r"\[WARN\] .*train\.jsonl:14: ", out)
    failures = [json.loads(line)["path"] for line in (cache_dir / "failures.jsonl").read_text().splitlines()]
    assert failures == [f"{data}/train.jsonl:13", f"{data}/train.jsonl:14"]
    assert "Processed 12 images" in out


def test_a_worker_that_dies_costs_one_file(run, data, monkeypatch, tmp_path):
    """The decoder is made to kill its process on one image, as a crash in a C library would."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def kill(event, details):\n"
        f"    if event == 'open' and str(details[0]) == {str(data / 'ep0' / '0002.png')!r}:\n"
        "        if 'vggt_cache.cli' not in sys.modules: os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(kill)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))
    code, out, _ = run("--num_workers", 2)
    assert code == 3
    assert f"[WARN] {data}/ep0/0002.png: the process that decoded it died" in out
    assert "Processed 11 images" in out


# ---------------------------------------------------------------- limits of the machine


def test_out_of_memory_halves_the_batch_and_goes_on(run, monkeypatch, cache_dir):
    from vggt_cache.encoder import Encoder

    real = Encoder.frame_features

    def small_device(self, pixels):
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pixels)

    monkeypatch.setattr(Encoder, "frame_features", small_device)
    code, out, _ = run("--batch_size", 8, "--verify")
    assert code == 0
    assert "[WARN] out of memory: going on with --batch_size 4" in out
    assert "[WARN] out of memory: going on with --batch_size 2" in out
    assert "12/12 valid" in out


def test_out_of_memory_in_the_causal_walk_loses_nothing(run, monkeypatch):
    from vggt_cache.encoder import Encoder

    real = Encoder.extend

    def small_device(self, tokens, *arguments, **options):
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, *arguments, **options)

    monkeypatch.setattr(Encoder, "extend", small_device)
    code, out, _ = run("--context", "causal", "--verify")
    assert code == 0
    assert "12/12 valid" in out


def test_memory_that_runs_out_half_way_repeats_no_feature(run, monkeypatch):
    """The first batch fits, a later one does not: what was done is not done again."""
    from vggt_cache.encoder import Encoder

    real, calls = Encoder.frame_features, []

    def shrinking_device(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pixels)

    monkeypatch.setattr(Encoder, "frame_features", shrinking_device)
    monkeypatch.setattr("vggt_cache.precompute.run.break_even", lambda *measured: "")  # which encodes too
    code, out, _ = run("--batch_size", 4, "--verify")
    assert code == 0
    assert "Processed 12 images" in out
    assert calls == [4, 4, 2, 2, 2, 2]


def test_a_device_too_small_for_one_frame_is_an_error_that_says_what_to_do(run, monkeypatch, capsys):
    from vggt_cache.encoder import Encoder

    def full(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "frame_features", full)
    code, _, err = run()
    assert code == 1
    assert "[ERROR] cpu is out of memory with a batch of one frame" in err


def test_a_device_too_small_for_the_weights_is_an_error_that_says_what_to_do(run, monkeypatch):
    def full(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Checkpoint, "load", full)
    code, _, err = run()
    assert code == 1
    assert "[ERROR] cpu is out of memory with the encoder's weights alone" in err


def test_too_little_disk_is_refused_before_anything_is_computed(run, monkeypatch, cache_dir):
    monkeypatch.setattr("vggt_cache.precompute.estimate.free_bytes", lambda directory: 1000)
    code, out, err = run()
    assert code == 2
    assert re.search(r"\[ERROR\] the features need .* but .*cache has 1000 B free", err)
    assert "Model loaded" not in out
    assert run("--force")[0] == 0


def test_a_failing_disk_ends_the_run_and_keeps_what_was_committed(run, monkeypatch, cache_dir):
    from vggt_cache.errors import CommitError
    from vggt_cache.store import ShardWriter

    monkeypatch.setenv("VGGT_CACHE_SHARD_BYTES", "1")
    real, commits = ShardWriter.commit, []

    def commit(self):
        commits.append(1)
        if len(commits) > 1:
            self.abort()
            raise CommitError("the disk is full")
        return real(self)

    monkeypatch.setattr(ShardWriter, "commit", commit)
    code, _, err = run("--batch_size", 1)
    assert code == 2
    assert "[ERROR] the disk is full" in err
    assert len(records(cache_dir)) == 1


@pytest.mark.parametrize("thread", ["feature-writer", "shard-committer"])
@pytest.mark.parametrize("where", ["the shard", "the queue"])
def test_running_out_of_memory_is_one_sentence_and_the_next_run_goes_on(
    run, monkeypatch, cache_dir, where, thread
):
    """Of the threads that write and commit, also while they wait: nobody may wait for a thread that has gone."""
    from queue import Queue

    from vggt_cache.store import ShardWriter

    step = "append" if thread == "feature-writer" else "commit"
    owner, name = (ShardWriter, step) if where == "the shard" else (Queue, "get")
    real, fallen = getattr(owner, name), []

    def full_once(*arguments, **options):
        if threading.current_thread().name == thread and not fallen:
            fallen.append(1)
            raise MemoryError
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, full_once)
    code, _, err = run()
    assert code == 1
    assert "[ERROR] this process has no memory left: what is committed stays" in err
    assert run()[0] == 0
    assert len(records(cache_dir)) == 12


@pytest.mark.parametrize("name", ["VGGT_CACHE_SHARD_BYTES", "RANK", "WORLD_SIZE"])
def test_a_number_of_the_environment_that_is_none_is_refused_before_anything_is_read(
    run, monkeypatch, cache_dir, name
):
    monkeypatch.setenv(name, "plenty")
    code, out, err = run()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"[ERROR] the environment's {name} is 'plenty', which is not a ")
    assert not cache_dir.exists()


def test_features_that_are_not_finite_are_not_stored(run, monkeypatch):
    from vggt_cache.encoder import Encoder

    real = Encoder.frame_features

    def overflowing(self, pixels):
        features = real(self, pixels)
        features[0, 0, 0, 0] = 1e5
        return features

    monkeypatch.setattr(Encoder, "frame_features", overflowing)
    code, out, _ = run("--feature_dtype", "float16", "--batch_size", 4, "--verify")
    assert code == 3
    assert "9/12 valid, 3 invalid" in out
    assert "its feature is not finite in float16" in out
    assert "Processed 9 images" in out


# ---------------------------------------------------------------- dry run


def test_a_dry_run_tells_what_it_takes_and_writes_nothing(run, cache_dir, data):
    code, out, _ = run("--dry_run", "--context", "causal")
    assert code == 0
    assert re.search(r"\[INFO\] Disk: \d+\.\d KiB for 12 features of \d+\.\d KiB; .* free", out)
    assert re.search(r"\[INFO\] Precomputing takes about .* pays for itself from epoch \d+ on", out)
    assert "[INFO] Dry run: nothing was computed or written" in out
    assert not cache_dir.exists()


@pytest.mark.parametrize(("precompute_s", "epoch"), [(4.0, 1), (10.0, 1), (10.1, 2), (25.0, 3)])
def test_the_cache_pays_from_the_epoch_by_whose_end_it_has_cost_less(precompute_s, epoch):
    said = time_sentence(precompute_s=precompute_s, live_epoch_s=10.0, measured_passes=8)
    assert f"pays for itself from epoch {epoch} on" in said


def test_a_dry_run_counts_what_is_there_already(run):
    run("--max_samples", 5)
    _, out, _ = run("--dry_run")
    assert "Unique images to process: 7" in out


# ---------------------------------------------------------------- Qwen2.5-VL's side


def qwen(folder: Path, *, patch_size: int = 14) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"vision_config": {"patch_size": patch_size, "spatial_merge_size": 2}})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 784, "max_pixels": 12_845_056})
    )
    return folder


def test_a_model_with_another_patch_size_is_refused(run, tmp_path):
    code, _, err = run("--model_path", qwen(tmp_path / "qwen", patch_size=16))
    assert code == 2
    assert "works on patches of 16 pixels, VGGT on 14" in err


def test_pixel_limits_that_would_resize_the_frames_are_told(run, tmp_path):
    """Those of training: its defaults, whatever the model's directory says, or what is given to both."""
    model = qwen(tmp_path / "qwen")
    code, out, _ = run("--model_path", model)
    assert code == 0
    assert "[WARN] frames of 2x4 patches have 1568 pixels, outside the model's 12544 to 451584" in out
    _, out, _ = run("--model_path", model, "--min_pixels", 784, "--max_pixels", 1000, "--no-skip_existing")
    assert "[WARN] frames of 2x4 patches have 1568 pixels, outside the model's 784 to 1000" in out
    _, out, _ = run("--model_path", model, "--min_pixels", 784, "--no-skip_existing")
    assert "[WARN]" not in out


def test_the_limits_are_those_that_training_takes_where_no_flag_says_otherwise():
    from janusvln.train.arguments import DataArguments
    from vggt_cache.precompute.settings import PrecomputeSettings

    training, given = (
        DataArguments(train_data_root="x"),
        PrecomputeSettings(vggt_model_path="v", data_root="x", cache_dir="y"),
    )
    assert (given.min_pixels, given.max_pixels) == (training.min_pixels, training.max_pixels)


def test_a_directory_without_a_model_is_refused(run, tmp_path):
    code, _, err = run("--model_path", tmp_path)
    assert code == 2
    assert "config.json cannot be read" in err


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--image_size", "500"], "image_size is 500, which is not a positive multiple of 14"),
        (["--batch_size", "0"], "--batch_size 0 is not a number of frames"),
        (["--num_workers", "-1"], "--num_workers -1 is negative"),
        (["--max_samples", "0"], "--max_samples 0 selects nothing"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--layer", "7"], "layer"),
        (["--recompute", "-1"], "--recompute -1 is negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(run, flags, sentence):
    code, _, err = run(*flags)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("[ERROR]")]
    assert sentence in line
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said(run):
    code, _, err = run("--device", "cuda:0")
    assert code == 2
    assert "[ERROR] --device cuda:0 asks for a GPU, but this PyTorch" in err


@pytest.mark.parametrize("flag", ["--no_such_flag", "--batch", "--data_roo=x"])
def test_unknown_and_abbreviated_flags_are_refused(run, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        run(flag)
    assert ended.value.code == 2
    assert "[ERROR] unrecognized arguments" in capsys.readouterr().err


def test_data_that_is_not_there_is_said(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(data_root=tmp_path / "nowhere")[0] == 2
    code, _, err = run(data_root=tmp_path / "empty")
    assert code == 2
    assert err.count("[ERROR]") == 1


def test_an_encoder_that_is_not_there_is_said(tmp_path, data, capsys):
    arguments = ["precompute", "--data_root", str(data), "--cache_dir", str(tmp_path / "cache")]
    assert main(arguments) == 2
    assert "--vggt_model_path is missing" in capsys.readouterr().err
    assert main([*arguments, "--vggt_model_path", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- identity by pixels


@pytest.mark.parametrize("context", ["frame", "causal"])
def test_what_was_made_from_files_is_found_by_a_trainer_that_has_their_pixels(run, data, cache_dir, context):
    assert run("--context", context)[0] == 0
    with FeatureCache.open(cache_dir, context=context) as cache:
        for path in sorted(data.rglob("*.png"))[:1]:
            pixels = decode_frame(read_frame(path), cache.spec.preprocessing)
            image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
            assert torch.equal(cache.get([image], strict=True), cache.get([path], strict=True))
            assert cache.get([image.flip(2)]) is None


def test_what_a_trainer_stored_by_pixels_is_not_computed_again_from_files(run, data, cache_dir):
    assert run()[0] == 0
    (by_files,) = list_stores(cache_dir)
    stored = records(cache_dir)
    pixels = {}
    for path in data.rglob("*.png"):
        key = feature_key(by_files, [frame_digest(path.read_bytes())])
        if key in stored:
            pixels[key] = decode_frame(path.read_bytes(), by_files.preprocessing)
    assert len(pixels) == 12
    shutil.rmtree(cache_dir)
    cache = PixelCache(cache_dir, by_files, fill=True)
    for key, levels in pixels.items():
        cache.put(cache.keys([torch.from_numpy(levels).permute(2, 0, 1)[None]]), stored[key][None])
    cache.close()

    code, out, _ = run("--verify")
    assert code == 0
    assert "[SUCCESS] Processed 0 images" in out
    assert "[INFO] Verification: 12/12 valid, 0 invalid" in out
    code, out, _ = run()  # the pairs are noted now: nothing is decoded
    assert "[INFO] Unique images to process: 0" in out
    assert "[INFO] Already in the cache: 12" in out
    with FeatureCache.open(cache_dir, spec=by_files) as files:
        assert len(files) == 0
        assert all(torch.equal(files.get_by_key(key), feature) for key, feature in stored.items())
