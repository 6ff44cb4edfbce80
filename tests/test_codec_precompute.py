"""`precompute` with a codec: the same features under the same keys, whatever packs them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from small_data import SIZE, write_dataset
from store_kit import equal
from vggt_cache import FeatureCache
from vggt_cache.cli import main
from vggt_cache.codec.quantise import decode_int8, encode_int8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, steps=3)
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def flags(checkpoint: Path, data: Path, cache_dir: Path) -> list[object]:
    return [
        "precompute",
        "--vggt_model_path",
        checkpoint,
        "--data_root",
        data,
        "--cache_dir",
        cache_dir,
        *SIZE,
    ]


def test_codecs_give_the_same_features_and_count_as_present_for_each_other(
    small_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = flags(small_checkpoint, data, tmp_path / "plain")
    packed = flags(small_checkpoint, data, tmp_path / "packed")
    assert run(capsys, *plain)[0] == 0
    code, out, _ = run(capsys, *packed, "--codec", "lossless", "--verify")
    assert code == 0
    assert "Verification: 6/6 valid" in out
    with FeatureCache.open(tmp_path / "plain") as one, FeatureCache.open(tmp_path / "packed") as other:
        assert list(one.keys()) == list(other.keys())
        assert all(equal(one.get_by_key(key), other.get_by_key(key)) for key in one)
    for command, codec in ((plain, "lossless"), (packed, "none")):
        assert "to process: 0" in run(capsys, *command, "--codec", codec)[1]
    shares = []
    for name in ("plain", "packed"):
        (store,) = json.loads(run(capsys, "info", tmp_path / name, "--json")[1])["stores"]
        shares.append((store["codecs"], store["stored_bytes"] / store["raw_bytes"]))
    assert shares[0] == ({"none": 1}, 1.0)
    assert shares[1][0] == {"lossless": 1}
    assert shares[1][1] < 0.75


def test_int8_has_a_store_of_its_own(
    small_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(small_checkpoint, data, tmp_path)
    assert run(capsys, *command)[0] == 0
    code, out, _ = run(capsys, *command, "--feature_dtype", "int8", "--verify", "--recompute", 3)
    assert code == 0
    assert "to process: 6" in out
    assert "Verification: 6/6 valid" in out
    assert float(re.search(r"largest relative error (\S+) ", out)[1]) < 0.01
    assert "2 specifications" in run(capsys, "info", tmp_path)[1]
    frame = next(data.rglob("*.png"))
    both = {}
    for folder in tmp_path.glob("frame-*"):
        with FeatureCache.open(tmp_path, fingerprint=folder.name.removeprefix("frame-")) as cache:
            both[cache.spec.feature_dtype] = cache.get([frame])
    exact = both["bfloat16"].view(-1, both["bfloat16"].shape[-1])
    assert equal(both["int8"].view(exact.shape), decode_int8(encode_int8(exact), *exact.shape))


def test_a_dry_run_counts_what_the_codec_takes(
    small_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*flags(small_checkpoint, data, tmp_path / "cache"), "--dry_run"]
    texts = [
        re.search(r"Disk: .* of (.*); ", run(capsys, *command, *more)[1])[1]
        for more in ([], ["--codec", "lossless"], ["--feature_dtype", "int8"])
    ]
    assert texts[1] == texts[0] + " at most (codec lossless)"
    sizes = [float(text.split()[0]) for text in texts]
    assert sizes[0] == sizes[1]
    assert 0.5 <= sizes[2] / sizes[0] < 0.6


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_lossless_is_for_bfloat16(
    dtype: str, small_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(small_checkpoint, data, tmp_path / "cache")
    code, _, err = run(capsys, *command, "--feature_dtype", dtype, "--codec", "lossless")
    assert code == 2
    assert err.startswith(f"[ERROR] codec lossless packs bfloat16, and these features are kept in {dtype}: ")
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_is_said_before_anything_is_computed(
    small_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, _, err = run(capsys, *flags(small_checkpoint, data, tmp_path / "cache"), "--codec", "lossless")
    assert code == 2
    assert "pip install 'vggt-feature-cache[codec]'" in err
    assert not (tmp_path / "cache").exists()
