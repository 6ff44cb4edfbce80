"""Reading logs of any size from the end, and following them."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor_kit import BANNER, ENDED, TOTAL, Counted, bar, metrics, training_log
from vggt_cache.monitor.logs import WatchedLog
from vggt_cache.monitor.progress import Progress
from vggt_cache.monitor.tail import (
    HEAD_BYTES,
    LONGEST_PIECE_BYTES,
    MIB,
    TAIL_BYTES,
    WINDOW_BYTES,
    Pieces,
    sampled_extents,
)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts all that is read of logs."""
    reading = Counted()
    monkeypatch.setattr("vggt_cache.monitor.tail.os.pread", reading)
    return reading


def opened(path: Path) -> WatchedLog:
    log = WatchedLog(str(path))
    log.refresh(2e9)
    return log


def shown(path: Path) -> Progress:
    log = opened(path)
    log.tail.close()
    return log.progress(None)


# ---------------------------------------------------------------- pieces


@given(st.lists(st.text(alphabet="ab\r\n\0", max_size=8)), st.integers(1, 5))
def test_pieces_do_not_depend_on_where_chunks_end(parts: list[str], length: int) -> None:
    data = "".join(parts).encode()
    whole, small = Pieces(cut=False), Pieces(cut=False)
    expected = whole.feed(data)
    got = [piece for at in range(0, len(data), length) for piece in small.feed(data[at : at + length])]
    assert (got, small.unfinished) == (expected, whole.unfinished)


def test_a_piece_without_its_beginning_is_dropped() -> None:
    pieces = Pieces(cut=True)
    assert pieces.feed(b"50/28710 [") == []
    assert pieces.unfinished == b""
    assert pieces.feed(b"46:15<1:00, 1s/it]\rnext\nun") == [b"next"]
    assert pieces.unfinished == b"un"


def test_a_line_without_end_takes_no_memory_and_its_rest_is_dropped() -> None:
    pieces = Pieces(cut=False)
    for _ in range(40):
        assert pieces.feed(b"x" * 10000) == []
        assert len(pieces.unfinished) <= LONGEST_PIECE_BYTES
    assert pieces.feed(b"rest\nnext\n") == [b"next"]


# ---------------------------------------------------------------- extents


@given(st.integers(0, 2**45), st.sampled_from(TAIL_BYTES))
def test_extents_are_ordered_disjoint_and_bounded(size: int, tail_bytes: int) -> None:
    extents = sampled_extents(size, tail_bytes)
    places = [place for extent in extents for place in extent]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, size)
    assert places[-1] - extents[-1][0] >= min(size, tail_bytes)
    assert sum(stop - start for start, stop in extents) <= 2 * HEAD_BYTES + tail_bytes + 80 * WINDOW_BYTES


def test_a_run_at_the_end_is_sampled_near_its_beginning_however_short_it_is() -> None:
    size, tail_bytes = 10**11, TAIL_BYTES[0]
    starts = [start for start, _ in sampled_extents(size, tail_bytes)]
    for power in range(1, 18):
        run = tail_bytes << power
        assert any(size - run <= start <= size - run // 2 for start in starts)


# ---------------------------------------------------------------- large logs


def write_large(path: Path, size: int, *, end: str) -> None:
    """A log of `size` bytes whose middle is a hole, as a log truncated under its writer has it."""
    with open(path, "wb") as file:
        file.write((BANNER + training_log(40, cache_hit_rate=1.0)).encode())
        file.truncate(size)
        file.seek(0, os.SEEK_END)
        file.write(("\n" + end).encode())


def test_a_gigabyte_is_opened_by_reading_some_megabytes(tmp_path: Path, counted: Counted) -> None:
    path = tmp_path / "train.log"
    end = "".join(
        bar(n, 20 + 18.5 * n) + (metrics(loss=1 / n) if n % 10 == 0 else "") for n in range(20000, 20100)
    )
    write_large(path, 10**9, end=end)
    known = shown(path)
    assert (known.step, known.total) == (20099, TOTAL)
    assert known.s_per_it == pytest.approx(18.5, rel=0.01)
    assert known.s_per_it_overall == pytest.approx(18.5, rel=0.001)
    assert known.samples_per_s == pytest.approx(64 / 18.5, rel=0.01)  # announced in the first lines
    assert counted.bytes < 8 * MIB
    assert counted.largest <= MIB


def test_even_without_a_step_near_the_end_the_reading_is_bounded(tmp_path: Path, counted: Counted) -> None:
    path = tmp_path / "train.log"
    write_large(path, 10**9, end="nothing of interest")
    known = shown(path)
    assert known.step == 40
    assert counted.bytes < 48 * MIB


def test_opening_takes_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    block = training_log(400, chatter=2000).encode()
    path.write_bytes(block * (24 * MIB // len(block)))
    tracemalloc.start()
    log = opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    log.tail.close()
    assert log.progress(None).step == 400
    assert peak < 2 * MIB


def test_much_chatter_between_steps_does_not_hide_the_speed(tmp_path: Path, counted: Counted) -> None:
    path = tmp_path / "train.log"
    path.write_text(training_log(600, chatter=35_000))
    known = shown(path)
    assert known.step == 600
    assert known.s_per_it == pytest.approx(18.5, rel=0.01)
    assert known.loss == pytest.approx(2 / 600, rel=0.01)
    assert counted.bytes < path.stat().st_size


def test_a_short_run_at_the_end_of_a_large_log_is_told_from_the_long_one_before(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text(
        training_log(2000, chatter=4000, s_per_it=80)
        + training_log(400, first=1500, chatter=4000, s_per_it=15)
    )
    known = shown(path)
    assert known.step == 1900
    assert known.s_per_it_overall == pytest.approx(15, rel=0.01)


def test_a_slow_run_at_the_beginning_is_told_from_the_long_one_after_it(tmp_path: Path) -> None:
    """Head and end alone would look like one run: step and time are both further on."""
    path = tmp_path / "train.log"
    path.write_text(
        training_log(300, chatter=4000, s_per_it=80)
        + training_log(4000, first=300, chatter=4000, s_per_it=15)
    )
    known = shown(path)
    assert known.step == 4300
    assert known.s_per_it_overall == pytest.approx(15, rel=0.001)


@pytest.mark.slow
def test_a_dense_log_of_a_hundred_megabytes(tmp_path: Path, counted: Counted) -> None:
    path = tmp_path / "train.log"
    chatter = 100_000_000 // TOTAL - 220
    path.write_text(BANNER + training_log(TOTAL, chatter=chatter, cache_hit_rate=0.99) + ENDED)
    assert path.stat().st_size > 95_000_000
    known = shown(path)
    assert (known.step, known.ended) == (TOTAL, True)
    assert known.s_per_it_overall == pytest.approx(18.5, rel=1e-3)
    assert counted.bytes < 8 * MIB


# ---------------------------------------------------------------- following


def test_the_newest_state_has_no_end_yet_and_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text(training_log(30))
    log = opened(path)
    assert log.progress(None).step == 30
    log.tail.close()


def test_what_is_added_in_any_portions_is_read_once(tmp_path: Path, counted: Counted) -> None:
    path = tmp_path / "train.log"
    path.touch()
    log = opened(path)
    text = training_log(100).encode() + metrics(loss=float("nan")).encode()
    with open(path, "ab", buffering=0) as file:
        for at in range(0, len(text), 97):
            file.write(text[at : at + 97])
            log.refresh(2e9)
    known = log.progress(None)
    log.tail.close()
    assert known.step == 100
    assert known.not_finite[0].lines == 1
    assert counted.bytes < 2 * len(text)  # a few guard bytes each time it reads the log


def test_a_number_that_is_half_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    text = bar(1, 18) + bar(2345, 36)
    path.write_text(text[: text.index("2345") + 2])
    log = opened(path)
    assert log.progress(None).step == 1
    path.write_text(text)
    log.refresh(2e9)
    assert log.progress(None).step == 2345
    log.tail.close()


def test_rotation_loses_nothing(tmp_path: Path) -> None:
    """The old file is read to its end, then the new one of that name."""
    path = tmp_path / "train.log"
    path.write_text(training_log(30))
    log = opened(path)
    with open(path, "a") as file:
        file.write("\n" + metrics(loss=0.5, cache_hit_rate=0.25))
    path.rename(tmp_path / "train.log.1")
    path.write_text(bar(31, 600))
    log.refresh(2e9)
    known = log.progress(None)
    log.tail.close()
    assert (known.step, known.loss, known.cache_hit_rate) == (31, 0.5, 0.25)


@pytest.mark.parametrize("steps", [5, 50])
def test_truncation_is_noticed_even_if_the_log_has_grown_again(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "train.log"
    path.write_text(training_log(30))
    log = opened(path)
    path.write_text(BANNER + training_log(steps))  # the same file, from its beginning
    log.refresh(2e9)
    known = log.progress(None)
    log.tail.close()
    assert (known.step, known.samples_per_s is None) == (steps, False)


def test_a_log_truncated_under_its_writer_begins_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text(training_log(30))
    log = opened(path)
    with open(path, "r+b") as file:
        file.truncate(0)
        file.seek(100_000)
        file.write(bar(31, 600).lstrip("\r").encode())
    log.refresh(2e9)
    assert log.progress(None).step == 31
    log.tail.close()


def test_a_log_that_is_removed_keeps_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text(training_log(30))
    log = opened(path)
    path.unlink()
    log.refresh(2e9)
    assert log.progress(None).step == 30
    log.tail.close()


def test_a_flood_between_two_looks_is_skipped_but_for_its_end(tmp_path: Path, counted: Counted) -> None:
    path = tmp_path / "train.log"
    path.write_text(training_log(30))
    log = opened(path)
    with open(path, "ab") as file:
        file.truncate(200 * MIB)
    with open(path, "ab") as file:
        file.write(training_log(60).encode())
    log.refresh(2e9)
    assert log.progress(None).step == 60
    assert counted.bytes < 20 * MIB
    log.tail.close()


def test_bytes_that_are_no_utf8_and_escapes_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    noise = b"\xff\xfe\x1b[31m\x80{'loss': \xe2\x96\n\x1b[A\x1b[2K"
    text = training_log(30).encode().replace("▍".encode(), b"\xe2\x96")
    path.write_bytes(noise.join([text[:1000] + b"\n", b"\r" + text]) + noise)
    assert shown(path).step == 30
