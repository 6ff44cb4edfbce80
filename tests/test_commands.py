"""The commands that look at a cache, and the damage they must find."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from small_data import SIZE, write_dataset, write_image
from vggt_cache import FeatureCache
from vggt_cache.cli import main
from vggt_cache.precompute.settings import PrecomputeSettings


@pytest.fixture(scope="module")
def made(small_checkpoint, tmp_path_factory):
    """Data, and a cache of it in both contexts. Tests must not change it."""
    root = tmp_path_factory.mktemp("made")
    write_dataset(root / "data", steps=4)
    for context in ("frame", "causal"):
        arguments = ["precompute", "--vggt_model_path", small_checkpoint, "--data_root", root / "data"]
        arguments += ["--cache_dir", root / "cache", "--context", context, *SIZE]
        assert main(list(map(str, arguments))) == 0
    return root


@pytest.fixture
def own(made, tmp_path):
    """A copy that the test may damage."""
    import shutil

    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def damage_a_record(cache_dir: Path, context: str) -> None:
    (shard,) = cache_dir.glob(f"{context}-*/shards/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)


# ---------------------------------------------------------------- verify


def test_standalone_verify_needs_no_model(made, capsys):
    """The guide's command as it stands."""
    code, out, _ = run(
        capsys,
        *("precompute", "--verify", "--context", "causal"),
        *("--cache_dir", made / "cache", "--data_root", made / "data"),
    )
    assert code == 0
    assert "[INFO] Verification: 8/8 valid, 0 invalid" in out


def test_standalone_verify_refuses_settings_of_another_cache(made, capsys):
    code, _, err = run(
        capsys,
        *("precompute", "--verify", "--context", "frame", "--image_size", 644),
        *("--cache_dir", made / "cache", "--data_root", made / "data"),
    )
    assert code == 2
    assert "[ERROR] --image_size 644 was given, but the cache was made with 56" in err


@pytest.mark.parametrize(
    ("flag", "value", "made_with"),
    [
        ("--image_size", 518, "56"),
        ("--image-size", 518, "56"),
        ("--layer", -1, "2"),
        ("--resize_mode", "pad", "crop"),
    ],
)
@pytest.mark.parametrize("command", ["precompute", "verify", "verify every record"])
def test_a_flag_that_is_given_counts_even_where_it_is_the_default(
    made, capsys, command, flag, value, made_with
):
    data = ["--data_root", made / "data"]
    given = {
        "precompute": ["precompute", "--verify", "--cache_dir", made / "cache", *data],
        "verify": ["verify", made / "cache", *data],
        "verify every record": ["verify", made / "cache"],
    }[command]
    code, _, err = run(capsys, *given, "--context", "frame", flag, value)
    assert code == 2
    name = flag.replace("-", "_").replace("__", "--")
    assert f"[ERROR] {name} {value} was given, but the cache was made with {made_with}" in err


@pytest.mark.parametrize(
    "given", [["--layer", -2], ["--compute_dtype", "auto"], ["--alpha", "white"], ["--image_size", 56]]
)
def test_a_flag_that_agrees_with_the_cache_is_welcome(made, capsys, given):
    assert run(capsys, "verify", made / "cache", "--context", "frame", *given)[0] == 0


def test_help_gives_each_default_once_and_it_is_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["precompute", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    defaults = re.findall(r"\(default: (\S+)\)", said)
    expected = [f.default for f in dataclasses.fields(PrecomputeSettings)]
    expected = [d for d in expected if d is not dataclasses.MISSING and d is not None and d is not False]
    assert defaults == ["on" if default is True else str(default) for default in expected]


def test_verify_lists_what_is_missing(own, capsys):
    image = write_image(own / "data" / "ep0" / "0002.png", seed=99)
    code, out, _ = run(capsys, "verify", own / "cache", "--data_root", own / "data", "--context", "frame")
    assert code == 1
    assert f"[WARN] invalid: {image}: missing" in out
    assert "[INFO] Verification: 7/8 valid, 1 invalid" in out


def test_verify_reads_the_bytes_even_if_size_and_time_are_as_before(own, capsys):
    import os

    path = own / "data" / "ep0" / "0002.png"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(capsys, "verify", own / "cache", "--data_root", own / "data", "--context", "frame")[0] == 1


@pytest.mark.parametrize("context", ["frame", "causal"])
def test_damage_is_found_removed_and_made_good(own, capsys, context, small_checkpoint):
    cache_dir, data = own / "cache", own / "data"
    damage_a_record(cache_dir, context)
    code, out, _ = run(capsys, "verify", cache_dir, "--context", context)
    assert code == 1
    assert "[INFO] Verification: 7/8 valid, 1 invalid" in out
    code, out, _ = run(capsys, "verify", cache_dir, "--context", context, "--data_root", data)
    assert code == 1
    assert "does not match its checksum" in out
    assert "prune" in out
    code, out, _ = run(capsys, "prune", cache_dir, "--damaged")
    assert "would remove" in out
    assert "run again with --yes" in out
    assert run(capsys, "prune", cache_dir, "--damaged", "--yes")[0] == 0
    flags = ["--vggt_model_path", small_checkpoint, "--data_root", data, "--cache_dir", cache_dir, *SIZE]
    code, out, _ = run(capsys, "precompute", *flags, "--context", context, "--verify")
    assert code == 0
    assert "Processed 1 " in out
    assert "8/8 valid, 0 invalid" in out
    assert run(capsys, "verify", cache_dir, "--context", context)[0] == 0


def test_recompute_agrees_and_finds_features_of_other_weights(own, capsys, small_checkpoint, monkeypatch):
    flags = [
        "--vggt_model_path",
        small_checkpoint,
        "--data_root",
        own / "data",
        "--cache_dir",
        own / "cache",
        *SIZE,
    ]
    for context in ("frame", "causal"):
        code, out, _ = run(capsys, "precompute", *flags, "--context", context, "--recompute", 5)
        assert code == 0
        error = float(re.search(r"Recomputed 5 features: largest relative error (\S+) ", out)[1])
        assert error < 0.01
    from vggt_cache.encoder import Encoder

    real = Encoder.frame_features
    monkeypatch.setattr(Encoder, "frame_features", lambda self, pixels: real(self, pixels).flip(-1))
    code, out, _ = run(capsys, "precompute", *flags, "--recompute", 5)
    assert code == 1
    assert "the cache holds wrong features" in out


def test_a_directory_with_two_caches_asks_which_one_is_meant(made, capsys):
    code, _, err = run(capsys, "verify", made / "cache")
    assert code != 0
    assert "frame" in err
    assert "causal" in err


@pytest.mark.parametrize("command", ["info", "verify", "prune"])
def test_what_is_no_cache_is_said_in_one_sentence(tmp_path, capsys, command):
    code, _, err = run(capsys, command, tmp_path / "nowhere")
    assert code != 0
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("[ERROR] ")


# ---------------------------------------------------------------- info, view, doctor


def test_info_tells_each_specification_and_its_size(made, capsys):
    code, out, _ = run(capsys, "info", made / "cache")
    assert code == 0
    assert "2 specifications" in out
    assert len(re.findall(r"entries +8 in 1 shard", out)) == 2
    code, out, _ = run(capsys, "info", made / "cache", "--json")
    found = json.loads(out)
    for store in found["stores"]:
        folder = made / "cache" / f"{store['spec']['context']}-{store['fingerprint'][:16]}"
        sizes = [
            path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "spec.json"
        ]
        assert store["disk_bytes"] == sum(sizes)
        assert store["reclaimable_bytes"] == 0


def test_view_draws_frames_beside_their_features(made, tmp_path, capsys):
    picture = tmp_path / "out.png"
    code, out, _ = run(
        capsys,
        "view",
        made / "cache",
        "--context",
        "causal",
        "--data_root",
        made / "data",
        "-o",
        picture,
        "--count",
        4,
    )
    assert code == 0
    assert "Drew 4 features" in out
    with Image.open(picture) as image:
        assert image.width >= 2 * 56


def test_view_of_data_that_is_not_cached_says_so(made, tmp_path, capsys):
    write_dataset(tmp_path / "other", steps=2)
    for number, path in enumerate(sorted((tmp_path / "other").rglob("*.png"))):
        write_image(path, seed=500 + number)
    code, _, err = run(
        capsys,
        "view",
        made / "cache",
        "--context",
        "frame",
        "--data_root",
        tmp_path / "other",
        "-o",
        tmp_path / "o.png",
    )
    assert code == 2
    assert "precompute them first" in err


def test_doctor_finds_this_disk_fit(tmp_path, capsys):
    code, out, _ = run(capsys, "doctor", tmp_path)
    assert code == 0
    assert "rename" in out


def test_an_interrupted_reader_of_our_output_is_no_error(made):
    import subprocess
    import sys

    done = subprocess.run(
        f"{sys.executable} -m vggt_cache info '{made / 'cache'}' --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("{")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- the documents


def test_the_readmes_api_example_names_what_exists(made):
    with FeatureCache.open(made / "cache", context="frame", root=made / "data") as cache:
        assert cache.spec.fingerprint
        assert cache.get(["ep0/0000.png", "ep1/0003.png"]).shape == (3, 4, 768)
        key = next(cache.keys())
        assert key in cache
        assert cache.get_by_key(key) is not None
        assert len(cache) == 8
        cache.refresh()
        assert cache.stats.hits == 2


def test_the_demo_runs_from_nothing_and_again(tmp_path, capsys, monkeypatch):
    """Smaller than `make demo`, the same path: data, encoder, both contexts, pictures, table."""
    from vggt_cache.demo import dataset
    from vggt_cache.demo import run as demo_run

    monkeypatch.setattr(
        demo_run, "write_dataset", lambda root: dataset.write_dataset(root, episodes=1, steps=3)
    )
    monkeypatch.setattr(demo_run, "IMAGE_SIZE", 56)
    for _ in range(2):
        code, out, _ = run(capsys, "demo", tmp_path / "demo")
        assert code == 0
        assert re.search(r"^frame +\d+ +3x4x768 ", out, re.MULTILINE)
        assert re.search(r"^causal +\d+ +3x4x768 ", out, re.MULTILINE)
    assert "Processed 0 features" in out
    assert (tmp_path / "demo" / "features_causal.png").exists()


@pytest.mark.parametrize("named", ["flag", "environment"])
def test_a_command_takes_the_cache_that_the_fingerprint_names(made, capsys, tmp_path, monkeypatch, named):
    """As training does: VGGT_CACHE_FINGERPRINT names one for every command that looks into a cache."""
    stores = json.loads(run(capsys, "info", made / "cache", "--json")[1])["stores"]
    (fingerprint,) = [one["fingerprint"] for one in stores if one["spec"]["context"] == "causal"]
    data = ["--data_root", made / "data"]
    commands = [
        ["verify", made / "cache"],
        ["verify", made / "cache", *data],
        ["view", made / "cache", *data, "-o", tmp_path / "view.png"],
        ["convert", made / "cache", "--codec", "none"],
        ["precompute", "--verify", "--cache_dir", made / "cache", *data],
    ]
    for command in commands if named == "environment" else commands[:4]:
        assert run(capsys, *command)[0] == 2
        if named == "flag":
            command += ["--fingerprint", fingerprint[:6]]
        else:
            monkeypatch.setenv("VGGT_CACHE_FINGERPRINT", fingerprint[:6])
        assert run(capsys, *command)[0] == 0
        if named == "environment":
            monkeypatch.setenv("VGGT_CACHE_FINGERPRINT", "0" * 8)
            assert "0" * 8 in run(capsys, *command)[2]
            monkeypatch.delenv("VGGT_CACHE_FINGERPRINT")


def test_a_second_specification_is_told_and_one_can_be_removed(own, capsys, small_checkpoint):
    cache_dir, data = own / "cache", own / "data"
    flags = ["--vggt_model_path", small_checkpoint, "--data_root", data, "--cache_dir", cache_dir, *SIZE]
    assert "[WARN]" not in run(capsys, "precompute", *flags)[1]  # one that is there already
    _, out, _ = run(capsys, "precompute", *flags, "--image_size", 70)
    (told,) = [line for line in out.splitlines() if line.startswith("[WARN]")]
    assert "VGGT_CACHE_FINGERPRINT=" in told
    (fingerprint,) = re.findall("VGGT_CACHE_FINGERPRINT=([0-9a-f]+)", told)
    assert fingerprint in run(capsys, "info", cache_dir)[1]
    code, out, _ = run(capsys, "prune", cache_dir, "--spec", fingerprint)
    assert code == 0
    assert "would remove" in out
    assert f"frame-{fingerprint}" in run(capsys, "info", cache_dir, "--json")[1]
    assert "freed" in run(capsys, "prune", cache_dir, "--spec", fingerprint, "--yes")[1]
    out = run(capsys, "info", cache_dir)[1]
    assert "2 specifications" in out
    assert fingerprint not in out
    assert run(capsys, "prune", cache_dir, "--spec", fingerprint)[0] != 0
    assert run(capsys, "prune", cache_dir, "--spec", "0", "--damaged")[0] == 2
