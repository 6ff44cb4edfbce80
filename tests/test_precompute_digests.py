"""The digest table saves reading, survives torn writes, and forgets nothing that was whole."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from vggt_cache.precompute import digests as digests_module
from vggt_cache.precompute.digests import DigestTable, read_in_state, settled, state_hash
from vggt_cache.store.rows import hash_array

STAT = (1000, 10**18 + 5, 10**18 + 7, 42)


def _row(number: int) -> tuple[bytes, bytes]:
    return state_hash(f"frame{number}.png", STAT), hashlib.sha256(str(number).encode()).digest()


def _known(table: DigestTable, rows: list[tuple[bytes, bytes]]) -> list[bool]:
    known, digests = table.lookup(hash_array(state for state, _ in rows))
    for is_known, found, (_, digest) in zip(known, digests, rows, strict=True):
        assert not is_known or found.tobytes() == digest
    return known.tolist()


def test_rows_of_all_processes_are_found_by_each(tmp_path):
    one, two = DigestTable(str(tmp_path)), DigestTable(str(tmp_path))
    one.append([_row(1), _row(2)])
    two.append([_row(3)])
    two.append([_row(4)])
    assert _known(two, [_row(n) for n in range(6)]) == [False] * 6
    two.reload()
    assert _known(two, [_row(n) for n in range(6)]) == [False, True, True, True, True, False]
    assert _known(DigestTable(str(tmp_path)), [_row(n) for n in range(1, 5)]) == [True] * 4


def _files(table: DigestTable) -> list[str]:
    return sorted(os.listdir(table._folder.path))


def test_of_rows_of_one_state_the_newest_counts_in_a_file_and_across_files(tmp_path):
    (state, old), (_, new), (_, newest) = _row(1), _row(2), _row(3)
    table, reader = DigestTable(str(tmp_path)), DigestTable(str(tmp_path))

    def seen() -> list[bytes]:
        tables = reader, DigestTable(str(tmp_path))
        reader.reload()
        return [known.lookup(hash_array([state]))[1].tobytes() for known in tables]

    for digest in (old, new, old):
        table.append([(state, digest)])
        assert seen() == [digest] * 2
    DigestTable(str(tmp_path)).append([(state, newest)])
    assert seen() == [newest] * 2
    table.append([(state, old)])  # appended last, to the file that is older
    assert seen() == [newest] * 2
    assert len(reader) == 1


def test_a_correction_is_newer_than_all_even_where_another_clock_is_ahead_or_the_own_file_is_older(tmp_path):
    (state, old), (_, new) = _row(1), _row(2)
    table = DigestTable(str(tmp_path))
    table.append([_row(5)])
    (own,) = _files(table)
    ahead = tmp_path / "digests" / f"{int(own[:12], 16) + 10**9:012x}-{0:016x}.rows"
    other = DigestTable(str(tmp_path / "other"))
    other.append([(state, old)])
    (tmp_path / "other" / "digests" / _files(other)[0]).rename(ahead)
    table.reload()
    for _ in range(2):
        table.correct({state: new, _row(5)[0]: _row(5)[1]})
        table.reload()
        assert table.lookup(hash_array([state]))[1].tobytes() == new
        assert len(_files(table)) == 3, "what is known already is not written again"
    assert (tmp_path / "digests" / _files(table)[-1]).stat().st_size == 24 + 48


def test_a_name_at_the_end_of_time_leaves_readable_names(tmp_path):
    folder = tmp_path / "digests"
    folder.mkdir()
    (folder / f"{'f' * 12}-{0:016x}.rows").touch()
    DigestTable(str(tmp_path)).append([_row(1)])
    assert _known(DigestTable(str(tmp_path)), [_row(1)]) == [True]


def test_a_row_tells_the_state_before_reading_and_none_where_that_changed(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    assert read_in_state(str(path)) == (b"one", b""), "written just now, it may change within the same tick"
    state = (3, 10**18 + 1, 10**18 + 1, 7)
    monkeypatch.setattr(digests_module, "file_state", lambda path: state)
    assert read_in_state(str(path)) == (b"one", state_hash(str(path), state))
    states = iter([state, (3, 10**18 + 2, 10**18 + 2, 7)])
    monkeypatch.setattr(digests_module, "file_state", lambda path: next(states))
    assert read_in_state(str(path)) == (b"one", b"")


@pytest.mark.parametrize("change", range(4))
def test_any_change_of_a_file_makes_its_row_unknown(tmp_path, change):
    table = DigestTable(str(tmp_path))
    table.append([_row(1)])
    table.reload()
    changed = list(STAT)
    changed[change] += 1
    known, _ = table.lookup(hash_array([state_hash("frame1.png", tuple(changed))]))
    assert not known.any()


def test_a_torn_file_gives_its_whole_chunks_at_every_length(tmp_path):
    table = DigestTable(str(tmp_path))
    table.append([_row(1), _row(2)])
    table.append([_row(3)])
    (path,) = (tmp_path / "digests").iterdir()
    whole = path.read_bytes()
    first_chunk = 24 + 2 * 48
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        expected = length >= first_chunk
        assert _known(DigestTable(str(tmp_path)), [_row(1), _row(2), _row(3)]) == [expected, expected, False]


def test_a_flipped_bit_is_never_believed(tmp_path):
    table = DigestTable(str(tmp_path))
    table.append([_row(1)])
    (path,) = (tmp_path / "digests").iterdir()
    whole = bytearray(path.read_bytes())
    for position in range(len(whole)):
        whole[position] ^= 1
        path.write_bytes(whole)
        assert _known(DigestTable(str(tmp_path)), [_row(1)]) == [False]
        whole[position] ^= 1


def test_a_chunk_that_claims_to_be_huge_takes_no_memory(tmp_path):
    import tracemalloc

    folder = tmp_path / "digests"
    folder.mkdir()
    (folder / f"{0:012x}-{0:016x}.rows").write_bytes(
        b"VGFCdig1" + (1 << 30).to_bytes(8, "little") + bytes(8) + bytes(48)
    )
    tracemalloc.start()
    assert len(DigestTable(str(tmp_path))) == 0
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_no_folder_and_no_permission_mean_no_rows(tmp_path):
    blocked = tmp_path / "digests"
    blocked.write_text("a file where the folder should be")
    table = DigestTable(str(tmp_path))
    table.append([_row(1)])
    assert len(table) == 0
    known, _ = table.lookup(np.zeros((0, 2), np.uint64))
    assert known.shape == (0,)


def test_a_file_changed_just_now_is_not_trusted_by_its_time():
    fine, coarse = 10**18 + 123, 10**18
    assert not settled((1, fine, fine, 1), fine + 10_000_000)
    assert settled((1, fine, fine, 1), fine + 100_000_000)
    assert not settled((1, fine - 10**12, fine, 1), fine + 10_000_000), "mtime set back, ctime just now"
    assert not settled((1, coarse, coarse, 1), coarse + 1_000_000_000)
    assert settled((1, coarse, coarse, 1), coarse + 3_000_000_000)
