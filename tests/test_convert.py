"""Rewriting a store with another codec: every key served as before, at whatever moment it is killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from codec_kit import BF16, INT8, KEYS, NUMBERS, write_packed
from store_kit import (
    DAMAGE_WARNING,
    TracedFileSystem,
    equal,
    holds,
    make_feature,
    make_key,
    no_descriptor_leaks,
    save_index,
    shard_path,
    shards_dir,
    temp_files,
    write_shard,
)
from vggt_cache.cli import main
from vggt_cache.codec.lossless import Lossless
from vggt_cache.errors import CacheAccessError, CommitError, SettingsError
from vggt_cache.store import Converted, FeatureCache, convert, describe, prune
from vggt_cache.store.header import parse_header

pytestmark = DAMAGE_WARNING


def converted(cache_dir: Path, codec: str = "lossless", **options: object) -> list[Converted]:
    return list(convert(cache_dir, BF16, codec, **{"dry_run": False, **options}))


def codecs(cache_dir: Path) -> dict[str, int]:
    return dict(describe(cache_dir).stores[0].codecs)


def files(cache_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards_dir(cache_dir).iterdir()}


def some_shards(cache_dir: Path) -> None:
    """Three plain shards and a packed one, with older copies of other values in between."""
    write_shard(cache_dir, {1: make_feature(8), 2: make_feature(2)})
    write_shard(cache_dir, {3: make_feature(9), 4: make_feature(4)})
    write_packed(cache_dir, {1: make_feature(1), 5: make_feature(5)})
    write_shard(cache_dir, {3: make_feature(3)})


ALL = (1, 2, 3, 4, 5)


def test_there_and_back_changes_no_feature(tmp_path: Path) -> None:
    some_shards(tmp_path)
    with no_descriptor_leaks():
        done = converted(tmp_path)
    assert [one.records for one in done] == [1, 1, 1]
    assert not any(one.problem for one in done)
    assert codecs(tmp_path) == {"lossless": 4}
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, ALL)
    assert converted(tmp_path) == []
    converted(tmp_path, "none")
    assert codecs(tmp_path) == {"none": 4}
    for use_index in (True, False):
        with FeatureCache.open(tmp_path, use_index=use_index) as cache:
            assert holds(cache, ALL)


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    some_shards(tmp_path)
    before = files(tmp_path)
    assert [(one.records, one.bytes_after) for one in converted(tmp_path, dry_run=True)] == [(1, 0)] * 3
    assert files(tmp_path) == before


def test_a_shard_without_a_record_that_is_served_goes(tmp_path: Path) -> None:
    old = write_shard(tmp_path, {1: make_feature(8)})
    write_packed(tmp_path, [1])
    assert [(one.shard, one.records, one.problem) for one in converted(tmp_path)] == [(old, 0, "")]
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])


# ---------------------------------------------------------------- killed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("target", ["lossless", pytest.param("none", marks=pytest.mark.slow)])
def test_killed_at_any_moment_every_key_is_served_and_the_next_call_goes_on(
    tmp_path: Path, target: str
) -> None:
    """A process dies at each operation on the file system in turn, without any of its cleaning up."""
    position, died = 0, True
    while died:
        place = tmp_path / str(position)
        some_shards(place)
        child = os.fork()
        if not child:

            def kill(name: str, at: int, call: object, limit: int = position) -> object:
                if at == limit:
                    os._exit(9)
                return call()  # type: ignore[operator]

            converted(place, target, fs=TracedFileSystem(kill))
            os._exit(0)
        died = os.waitpid(child, 0)[1] != 0
        with FeatureCache.open(place) as cache:
            assert holds(cache, ALL), position
        assert not any(one.problem for one in converted(place, target))
        assert set(codecs(place)) == {target}
        with FeatureCache.open(place) as cache:
            assert holds(cache, ALL), position
        position += 1 if 20 <= position < 60 else 6
    assert position > 60


def test_a_failing_disk_leaves_the_old_shard(tmp_path: Path) -> None:
    write_shard(tmp_path, NUMBERS)
    before = files(tmp_path)

    def fail(name: str, at: int, call: object) -> object:
        if name == "fsync":
            raise OSError(5, "Input/output error")
        return call()  # type: ignore[operator]

    with pytest.raises(CommitError):
        converted(tmp_path, fs=TracedFileSystem(fail))
    assert files(tmp_path) == before
    assert not temp_files(tmp_path)


# ---------------------------------------------------------------- nothing is believed


def test_a_codec_that_gives_other_bytes_back_is_found_out_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, NUMBERS)
    before, encode = files(tmp_path), Lossless.encode

    def wrong(self: Lossless, feature: memoryview, *rest: int) -> memoryview:
        changed = bytearray(feature)
        changed[7] ^= 1
        return encode(self, memoryview(changed), *rest)

    monkeypatch.setattr(Lossless, "encode", wrong)
    with pytest.raises(CommitError, match="is changed by codec lossless"):
        converted(tmp_path)
    assert files(tmp_path) == before


def test_bytes_that_change_on_their_way_to_the_disk_are_found_out(tmp_path: Path) -> None:
    write_packed(tmp_path, NUMBERS)
    before = files(tmp_path)

    class Flipping(TracedFileSystem):
        def pwrite(self, fd: int, data: bytes, offset: int) -> int:
            changed = bytearray(data)
            if len(changed) == 48:
                changed[9] ^= 4
            return os.pwrite(fd, changed, offset)

    with pytest.raises(CommitError, match="is changed by codec none"):
        converted(tmp_path, "none", fs=Flipping())
    assert files(tmp_path) == before


def test_a_committed_shard_that_does_not_read_back_is_withdrawn(tmp_path: Path) -> None:
    write_shard(tmp_path, NUMBERS)
    before = files(tmp_path)

    class Rotting(TracedFileSystem):
        """The last byte changes when the file is given its name."""

        def link(self, source: str, target: str, *, dir_fd: int) -> None:
            os.link(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            path = shards_dir(tmp_path) / target
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    with pytest.raises(CommitError, match="does not read back"):
        converted(tmp_path, fs=Rotting())
    assert files(tmp_path) == before


def damage_last_byte(path: Path) -> None:
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_shard_with_a_damaged_record_is_kept_and_named(tmp_path: Path) -> None:
    bad, good = write_shard(tmp_path, NUMBERS), write_shard(tmp_path, [4])
    damage_last_byte(shard_path(tmp_path, bad))
    before = files(tmp_path)[bad]
    first, second = converted(tmp_path)
    assert (first.shard, first.records) == (bad, 0)
    assert "does not match its checksum" in first.problem
    assert (second.shard, second.problem) == (good, "")
    assert files(tmp_path)[bad] == before
    assert codecs(tmp_path) == {"lossless": 1, "none": 1}


def test_the_older_copy_of_a_damaged_record_is_kept(tmp_path: Path) -> None:
    """`prune --damaged` would bring it back."""
    old = write_shard(tmp_path, [1])
    damage_last_byte(write_packed(tmp_path, [1]))
    (one,) = converted(tmp_path)
    assert (one.shard, one.records) == (old, 0)
    assert "does not match its checksum" in one.problem
    prune(tmp_path, damaged=True, dry_run=False)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])


def test_damaged_and_foreign_shards_are_left_alone(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    garbage, newer = (shard_path(tmp_path, write_shard(tmp_path, [n])) for n in (2, 3))
    for path in (garbage, newer):
        path.chmod(0o644)
    garbage.write_bytes(b"garbage")
    newer.write_bytes(newer.read_bytes().replace(b'"format_version":"1"', b'"format_version":"7"'))
    before = files(tmp_path)
    assert len(converted(tmp_path)) == 1
    after = files(tmp_path)
    assert all(after[path.name] == before[path.name] for path in (garbage, newer))


# ---------------------------------------------------------------- others who use the store


def test_a_reader_with_an_older_snapshot_is_told_to_refresh(tmp_path: Path) -> None:
    write_shard(tmp_path, NUMBERS)
    save_index(tmp_path)
    with FeatureCache.open(tmp_path) as cache, FeatureCache.open(tmp_path) as reading:
        assert equal(reading.get_by_key(KEYS[1]), make_feature(1))
        converted(tmp_path)
        assert equal(reading.get_by_key(KEYS[2]), make_feature(2)), "its file is still open"
        with pytest.raises(CacheAccessError, match="refresh"):
            cache.get_by_key(KEYS[1])
        cache.refresh()
        assert holds(cache, NUMBERS)


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    for number in ALL:
        write_shard(tmp_path, [number])
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            converted(tmp_path)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    converted(tmp_path)
    prune(tmp_path, dry_run=False)
    assert codecs(tmp_path) == {"lossless": len(files(tmp_path))}
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, ALL)


def test_a_codec_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_packed(tmp_path, NUMBERS, INT8)
    with pytest.raises(SettingsError, match="kept in int8"):
        list(convert(tmp_path, INT8, "lossless"))
    assert list(convert(tmp_path, INT8, "none")) == []


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def test_the_command_shows_then_does_then_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_shard(tmp_path, NUMBERS)
    code, out, _ = run(capsys, "convert", tmp_path, "--codec", "lossless")
    assert code == 0
    assert f"would convert {name}: 3 features" in out
    assert "run again with --yes" in out
    assert list(files(tmp_path)) == [name]
    code, out, _ = run(capsys, "convert", tmp_path, "--codec", "lossless", "--yes")
    assert code == 0
    assert f"converted {name}: 3 features" in out
    assert "1 shard converted" in out
    code, out, _ = run(capsys, "info", tmp_path)
    assert "codec        lossless (1 shard); features" in out
    assert run(capsys, "verify", tmp_path)[0] == 0
    code, out, _ = run(capsys, "convert", tmp_path, "--codec", "lossless", "--yes")
    assert (code, out) == (0, "nothing to convert: all shards have this codec\n")
    (path,) = shards_dir(tmp_path).iterdir()
    assert parse_header(path.read_bytes(), "x").codec == "lossless"


def test_the_command_names_what_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_shard(tmp_path, NUMBERS)
    damage_last_byte(shard_path(tmp_path, name))
    code, out, _ = run(capsys, "convert", tmp_path, "--codec", "lossless", "--yes")
    assert code == 1
    assert f"[WARN] {name} was kept as it is: record {make_key(3).hex()}" in out


def test_the_command_asks_which_store_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path, NUMBERS)
    write_packed(tmp_path, NUMBERS, INT8)
    code, _, err = run(capsys, "convert", tmp_path, "--codec", "lossless")
    assert code == 2
    assert "say which one is meant" in err
    assert (
        run(capsys, "convert", tmp_path, "--codec", "lossless", "--fingerprint", BF16.fingerprint[:9])[0] == 0
    )
