"""What fails around the work of a run is one sentence and an exit code, or nothing; it never hides the right error."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from small_data import SIZE, write_dataset
from trials.replaced_images import SETTLE_S
from trials.toy_encoder import ToyCheckpoint, toy_encoder
from vggt_cache.cli import main
from vggt_cache.errors import OutOfMemoryError
from vggt_cache.precompute import decode, encode, pipeline
from vggt_cache.precompute import run as run_module
from vggt_cache.precompute.claims import Claims

_CLAIM_OR_MARK = re.compile(r"[0-9a-f]{32}\.(\d+|alive)")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run precompute on three images; returns exit code, stdout, stderr."""
    write_dataset(tmp_path / "data", episodes=1, steps=3)

    def precompute(*flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        place = ["--data_root", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
        with toy_encoder(ToyCheckpoint()):
            code = main(["precompute", "--vggt_model_path", "toy", *place, *SIZE, *flags])
        return code, *capsys.readouterr()

    return precompute


def sentence(err: str) -> str:
    """The one line that is no progress bar."""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("[ERROR]")]
    return line


def refuse_files(monkeypatch: pytest.MonkeyPatch, number: int, names: re.Pattern[str], flag: int) -> None:
    real = os.open

    def refusing(path: str, flags: int, *arguments: object, **options: object) -> int:
        if flags & flag and names.fullmatch(os.path.basename(path)):
            raise OSError(number, os.strerror(number))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("what", [r"[0-9a-f]{32}\.alive", r"[0-9a-f]{32}\.\d+"])
def test_claims_that_cannot_be_made_end_the_run_in_a_sentence(
    run, monkeypatch, number: int, what: str
) -> None:
    refuse_files(monkeypatch, number, re.compile(what), os.O_CREAT)
    code, _, err = run()
    assert code == 2
    assert re.search(rf"no work can be claimed.*{os.strerror(number)}.*write permission", sentence(err))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_where_nothing_is_missing_nothing_is_claimed_and_nothing_need_be_writable(
    run, monkeypatch, number: int
) -> None:
    time.sleep(SETTLE_S)
    assert run()[0] == 0
    refuse_files(monkeypatch, number, re.compile(r".*"), os.O_CREAT)
    code, out, err = run("--verify")
    assert (code, "Traceback" in err) == (0, False)
    assert "3/3 valid" in out


def test_a_store_that_vanishes_while_it_is_worked_on_is_a_sentence(run, monkeypatch, tmp_path: Path) -> None:
    def vanish(*arguments: object) -> bytes:
        if (tmp_path / "cache").exists():
            (tmp_path / "cache").rename(tmp_path / "elsewhere")
        return key(*arguments)

    key = pipeline.feature_key
    monkeypatch.setattr(pipeline, "feature_key", vanish)
    code, _, err = run()
    assert code == 2
    assert str(tmp_path / "cache") in sentence(err)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_claim_that_cannot_be_given_back_does_not_end_a_good_run(run, monkeypatch, number: int) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    real = Claims.release

    def failing(claims: Claims, block: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            real(claims, block)

    monkeypatch.setattr(Claims, "release", failing)
    code, out, err = run()
    assert (code, "Traceback" in err) == (0, False)
    assert "Processed 3 images" in out


def test_a_claim_that_cannot_be_given_back_does_not_hide_what_ended_the_run(run, monkeypatch) -> None:
    def out_of_memory(*arguments: object) -> None:
        refuse_files(monkeypatch, errno.EIO, _CLAIM_OR_MARK, ~0)
        monkeypatch.setattr(os, "unlink", lambda *_, **__: os.rmdir("/nowhere"))
        raise OutOfMemoryError("the right error")

    monkeypatch.setattr(encode.BatchEncoder, "frames", out_of_memory)
    code, _, err = run()
    assert code == 1
    assert sentence(err) == "[ERROR] the right error"


def test_a_run_whose_decoder_hangs_says_what_it_waits_for(run, monkeypatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(run_module.Reporter, "warn", lambda reporter, text: said.append(text))
    monkeypatch.setenv("VGGT_CACHE_CLAIM_TTL_S", "0.01")
    real = decode.decode_file

    def slow(path: str, *arguments: object) -> object:
        while path.endswith("0001.png") and not said:
            time.sleep(0.01)
        return real(path, *arguments)

    monkeypatch.setattr(decode, "decode_file", slow)
    assert run()[0] == 0
    waiting = [text for text in said if "nothing has moved for" in text and "0001.png" in text]
    assert re.search(
        rf"waiting for the decoding of {tmp_path}/data/ep0/0001.png: .*kill -9 {os.getpid()}", waiting[0]
    )
