"""The commands and the trainer with a cache in a bucket: the same keys, bits and losses as from a directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import golden_recipe
from bucket_kit import SECRET, Proxy, Request
from janusvln.train.command import main as train
from train_kit import Kit, largest_difference, logged
from vggt_cache import CachedAggregator, CachedModule
from vggt_cache.cli import main
from vggt_cache.encoder import EncoderConfig
from vggt_cache.store import FeatureCache
from vggt_module import with_golden_weights


def records(cache_dir: str | Path) -> dict[bytes, torch.Tensor]:
    with FeatureCache.open(cache_dir, context="frame") as cache:
        return {key: cache.get_by_key(key) for key in cache}


def flags_of(kit: Kit, bucket: str) -> list[str]:
    flags = [
        "precompute",
        "--vggt_model_path",
        str(kit.vggt),
        "--data_root",
        str(kit.data),
        "--cache_dir",
        bucket,
    ]
    return [
        *flags,
        "--image_size",
        "56",
        "--feature_dtype",
        "float32",
        "--device",
        "cpu",
        "--num_workers",
        "0",
    ]


def precomputed(kit: Kit, bucket: str, *more: str) -> int:
    return main([*flags_of(kit, bucket), *more])


def trained(kit: Kit, output_dir: Path, cache_dir: str | Path, *more: str) -> list[dict[str, Any]]:
    flags = kit.flags(output_dir, "--max_steps", 3, *more)
    flags[flags.index("--vggt_cache_dir") + 1] = str(cache_dir)
    assert train(flags) == 0
    return logged(output_dir)


def test_precompute_fills_a_bucket_and_training_reads_from_it(
    kit: Kit, bucket: str, s3: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert precomputed(kit, bucket, "--verify") == 0
    first = capfd.readouterr()
    assert f"[INFO] Cache directory: {bucket}\n" in first.out
    assert "[INFO] Verification: 32/32 valid, 0 invalid\n" in first.out
    there, here = records(bucket), records(kit.cache)
    assert there.keys() == here.keys()
    assert all(torch.equal(there[key], here[key]) for key in here)

    assert precomputed(kit, bucket) == 0
    assert "[INFO] Already in the cache: 32\n" in capfd.readouterr().out
    assert main(["verify", bucket]) == 0
    assert main(["info", bucket]) == 0
    # A worker of the loader is forked from a process that uses the bucket, and uses it not.
    steps = trained(kit, tmp_path, bucket, "--dataloader_num_workers", "1")
    assert {entry["cache_hit_rate"] for entry in steps} == {1.0}
    told = capfd.readouterr()
    assert f"[INFO] VGGT feature cache enabled: {bucket}\n" in told.out
    assert SECRET not in first.out + first.err + told.out + told.err


@pytest.mark.slow
def test_the_commands_look_after_a_cache_in_a_bucket(
    kit: Kit, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precomputed(kit, bucket, "--max_samples", "4") == 0
    assert main(["verify", bucket]) == 0
    assert "4/4 valid, 0 invalid" in capsys.readouterr().out
    assert main(["verify", bucket, "--data_root", str(kit.data)]) == 1
    assert f"prune {bucket} --damaged" in capsys.readouterr().out
    assert precomputed(kit, bucket, "--max_samples", "4", "--no-skip_existing") == 0
    capsys.readouterr()
    assert main(["prune", bucket, "--yes"]) == 0
    assert f"removed {bucket}/frame-" in capsys.readouterr().out
    assert main(["info", bucket, "--json"]) == 0
    (store,) = json.loads(capsys.readouterr().out)["stores"]
    assert (store["entries"], store["shards"], store["indexed"]) == (4, 1, True)
    assert main(["convert", bucket, "--codec", "none", "--yes"]) == 0
    assert "nothing to convert" in capsys.readouterr().out
    assert precomputed(kit, bucket, "--dry_run") == 0
    assert "; a bucket has no limit\n" in capsys.readouterr().out
    assert main(["doctor", bucket]) == 0
    assert " 0 fail" in capsys.readouterr().out
    assert main(["prune", bucket, "--spec", store["fingerprint"][:8], "--yes"]) == 0
    assert main(["info", bucket]) == 2


def test_a_wrapped_encoder_finds_in_a_bucket_what_another_has_put_there(
    small_config: EncoderConfig, bucket: str
) -> None:
    module = with_golden_weights(small_config)
    pixels = [golden_recipe.image(7, 42, 56, step) for step in range(2)]
    images = torch.stack(pixels).permute(0, 3, 1, 2).float()[None] / 255
    with torch.no_grad():
        filling, finding = CachedAggregator(module, bucket), CachedAggregator(module, bucket, miss="error")
        computed = filling(images)[0][-2]
        filling.close()
        assert torch.equal(finding(images)[0][-2], computed)
        finding.close()


def test_a_wrapped_module_finds_in_a_bucket_what_another_has_put_there(bucket: str) -> None:
    module, inputs = torch.nn.Linear(4, 4).eval().requires_grad_(False), torch.rand(3, 4)
    with torch.no_grad():
        filling = CachedModule(module, bucket)
        computed = filling(inputs)
        filling.close()
        finding = CachedModule(module, bucket, miss="error")
        assert torch.equal(finding(inputs), computed)
        finding.close()


@pytest.mark.slow
def test_processes_share_the_work_in_a_bucket_and_one_that_is_killed_costs_nothing(
    kit: Kit, bucket: str, s3: Proxy, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "vggt_cache", *flags_of(kit, bucket), "--batch_size", "1"]
    environment = {**os.environ, "VGGT_CACHE_SHARD_BYTES": "1"}  # a shard for each batch
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    until_s = time.monotonic() + 240
    while sum(is_shard_put(request) for request in s3.requests) < 4 and time.monotonic() < until_s:
        time.sleep(0.01)
    processes[0].kill()
    assert [process.wait(240) for process in processes] == [-signal.SIGKILL, 0, 0]
    assert main(["verify", bucket, "--data_root", str(kit.data)]) == 0
    assert "32/32 valid, 0 invalid" in capfd.readouterr().out
    there, here = records(bucket), records(kit.cache)
    assert there.keys() == here.keys()
    assert all(torch.allclose(there[key], here[key], atol=1e-4) for key in here)  # batches of another size


def is_shard_put(request: Request) -> bool:
    return request.kind == "PUT" and request.path.endswith(".safetensors")


@pytest.mark.slow
def test_training_fills_a_bucket(kit: Kit, bucket: str, tmp_path: Path) -> None:
    miss = ["--vggt_cache_miss", "fill", "--vggt_model_path", str(kit.vggt), "--image_size", "56"]
    first = trained(kit, tmp_path / "first", bucket, *miss, "--feature_dtype", "float32")
    assert {entry["cache_hit_rate"] for entry in first} == {0.0}
    miss[1] = "encode"
    again = trained(kit, tmp_path / "again", bucket, *miss)
    assert {entry["cache_hit_rate"] for entry in again} == {1.0}
    assert largest_difference(first, again) < 1e-5
