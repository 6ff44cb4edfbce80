"""A request to stop is never taken for the fault of what was in hand when it came."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from small_data import SIZE, write_dataset
from test_store_processes import child, finish
from trials.toy_encoder import ToyCheckpoint, toy_encoder
from vggt_cache import frames
from vggt_cache.cli import main
from vggt_cache.precompute.plan import Plan
from vggt_cache.precompute.stop import StoppedError, StopRequest


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run precompute; whenever an image is decoded, SIGTERM comes so many times. Returns the exit code."""
    write_dataset(tmp_path / "data", episodes=1, steps=3)
    decode = frames._open

    def precompute(*flags: str, signals: int) -> int:
        def decode_and_stop(data: bytes):
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
            return decode(data)

        monkeypatch.setattr(frames, "_open", decode_and_stop)
        place = ["--data_root", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
        with toy_encoder(ToyCheckpoint()):
            return main(["precompute", "--vggt_model_path", "toy", *place, *SIZE, *flags])

    return precompute


def test_a_second_signal_while_an_image_is_decoded_does_not_make_that_image_a_damaged_one(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(signals=2) == 143
    assert capsys.readouterr().err.endswith("[ERROR] stopped by SIGTERM\n")
    assert not (tmp_path / "cache" / "failures.jsonl").exists()


def test_a_dry_run_ends_at_a_signal_that_comes_while_an_image_is_decoded(
    run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--dry_run", signals=1) == 143
    assert capsys.readouterr().err.endswith("[ERROR] stopped by SIGTERM\n")


def test_a_stop_that_a_library_turns_into_an_error_of_its_own_is_a_stop(
    run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def passes(plan: Plan, features: object) -> tuple[int, int]:
        try:
            signal.raise_signal(signal.SIGTERM)
        except StoppedError as error:
            raise TypeError("no common dtype") from error
        raise AssertionError("the signal had no effect")

    monkeypatch.setattr(Plan, "passes", passes)
    assert run("--context", "causal", signals=0) == 143
    assert capsys.readouterr().err.endswith("[ERROR] stopped by SIGTERM\n")


def signal_at_line(number: int, body: Callable[[], object]) -> int:
    """Run `body`; before its line `number`, those of what it calls counted too, SIGTERM comes. Returns its lines."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == number:
                signal.raise_signal(signal.SIGTERM)
        return trace

    sys.settrace(trace)
    try:
        body()
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize(
    "doing",
    [lambda stop: stop.wait(0.01), lambda stop: signal.raise_signal(signal.SIGTERM)],
    ids=["waiting", "handling another signal"],
)
def test_a_signal_may_come_at_any_line_of_what_stopping_does(doing: Callable[[StopRequest], object]) -> None:
    def at_line(number: int) -> int:
        stop = StopRequest()
        with stop.listening(), stop.deferred(), suppress(StoppedError):
            return signal_at_line(number, lambda: doing(stop))
        return 0

    def everywhere(fd: int) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        lines = at_line(0)
        assert lines > 3
        for number in range(1, lines + 1):
            at_line(number)

    with child(everywhere) as (process, _):
        assert finish(process) == 0
