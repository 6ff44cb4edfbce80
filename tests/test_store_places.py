"""Where a cache lies makes no difference; what cannot be one is refused in one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from store_kit import (
    DAMAGE_WARNING,
    SPEC,
    TracedFileSystem,
    failing,
    holds,
    make_spec,
    no_descriptor_leaks,
    save_index,
    shard_path,
    shards_dir,
    temp_files,
    write_shard,
)
from vggt_cache.errors import (
    AmbiguousCacheError,
    CacheAccessError,
    CacheNotFoundError,
    CommitError,
    NotACacheError,
    SettingsError,
    SpecMismatchError,
)
from vggt_cache.store import FeatureCache, FileSystem, create_store, describe, list_stores
from vggt_cache.store.index import IndexFile, index_bytes
from vggt_cache.store.record import RecordTable

CAUSAL = make_spec(context="causal")


def fill(cache_dir: Path, *, indexed: bool) -> Path:
    write_shard(cache_dir, range(5))
    write_shard(cache_dir, range(3, 9))
    if indexed:
        save_index(cache_dir)
    return cache_dir


@pytest.fixture(params=["index", "no index"])
def filled(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return fill(tmp_path / "cache", indexed=request.param == "index")


def tree(folder: Path) -> list[tuple[str, int, int]]:
    """All that could tell that something was written: names, sizes, times of modification."""
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


# ---------------------------------------------------------------- anywhere


@pytest.mark.promise("any index, any place")
def test_moved_copied_and_linked_directories_give_the_same_answers(filled: Path, tmp_path: Path) -> None:
    with FeatureCache.open(filled) as cache:
        snapshot = cache.snapshot
    shutil.copytree(filled, tmp_path / "copy")
    filled.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    for place in ("copy", "moved", "link"):
        with FeatureCache.open(tmp_path / place) as cache:
            assert holds(cache, range(9))
            assert cache.snapshot == snapshot


def test_a_store_folder_that_is_a_link_to_another_disk_is_followed(filled: Path, tmp_path: Path) -> None:
    (filled / SPEC.short_name).rename(tmp_path / "other disk")
    (filled / SPEC.short_name).symlink_to(tmp_path / "other disk")
    with FeatureCache.open(filled) as cache:
        assert holds(cache, range(9))


def test_an_open_cache_goes_on_when_its_directory_is_moved(filled: Path, tmp_path: Path) -> None:
    with FeatureCache.open(filled) as cache:
        filled.rename(tmp_path / "moved")
        assert holds(cache, range(9))
        write_shard(tmp_path / "moved", [20])
        cache.refresh()
        assert holds(cache, [*range(9), 20])


def test_a_relative_path_is_meant_from_where_the_cache_was_opened(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(filled.parent)
    with FeatureCache.open("cache") as cache:
        monkeypatch.chdir("/")
        cache.refresh()
        assert holds(cache, range(9))


@contextmanager
def read_only_mount(cache_dir: Path, place: Path) -> Iterator[Path]:
    """The cache through a read-only mount: root is stopped by that and by no permission bits."""
    place.mkdir()
    for command in (["mount", "--bind", cache_dir, place], ["mount", "-o", "remount,ro,bind", place]):
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no read-only mount can be made here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def read_only(filled: Path, tmp_path: Path) -> Iterator[Path]:
    with read_only_mount(filled, tmp_path / "read-only") as place:
        yield place


@pytest.mark.promise("any index, any place")
@pytest.mark.filterwarnings("ignore:the index in:UserWarning")
def test_a_read_only_mount_gives_the_same_answers_and_refuses_writers_in_one_sentence(
    read_only: Path,
) -> None:
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "x").write_text("")
    with FeatureCache.open(read_only) as cache:
        assert holds(cache, range(9))
        assert cache.save_index() or not (read_only / SPEC.short_name / "index").exists()
    with pytest.raises(CommitError, match="mounted read-only"):
        create_store(read_only, CAUSAL)
    with pytest.raises(CommitError, match="mounted read-only"):
        write_shard(read_only, [1])


def test_reading_creates_and_changes_nothing(filled: Path) -> None:
    before = tree(filled)
    with FeatureCache.open(filled) as cache:
        assert holds(cache, range(9))
        cache.refresh()
    describe(filled)
    list_stores(filled)
    for missing in ("nowhere", "nowhere/else"):
        with pytest.raises(CacheNotFoundError):
            FeatureCache.open(filled / missing)
    assert tree(filled) == before


def test_a_cache_without_the_empty_folders_that_a_copy_may_lose_is_an_empty_cache(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    shards_dir(tmp_path).rmdir()
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [])
        write_shard(tmp_path, [1])
        cache.refresh()
        assert holds(cache, [1])


def test_an_index_that_names_a_file_outside_of_the_store_leads_nowhere(tmp_path: Path) -> None:
    """Its checksums fit: they protect from accidents and from nobody who means harm."""
    cache_dir = fill(tmp_path / "cache", indexed=True)
    outside = shard_path(cache_dir, write_shard(cache_dir, [20]))
    with FeatureCache.open(cache_dir) as cache:
        assert cache.save_index()
        names = [*cache.shard_names()[:2], "../../../" + "0" * 20 + ".safetensors"]
    outside.rename(shards_dir(cache_dir) / names[-1])
    index = cache_dir / SPEC.short_name / "index" / "rows"
    table = IndexFile(str(cache_dir / SPEC.short_name), SPEC.fingerprint, FileSystem()).load()
    assert table is not None
    index.write_bytes(b"".join(index_bytes(RecordTable(names, table.rows), SPEC.fingerprint)))
    with FeatureCache.open(cache_dir) as cache:
        assert holds(cache, range(9))


# ---------------------------------------------------------------- which store


def test_the_only_store_is_taken_without_being_named(tmp_path: Path) -> None:
    write_shard(tmp_path, [1], CAUSAL)
    with FeatureCache.open(tmp_path) as cache:
        assert cache.spec == CAUSAL
    assert list_stores(tmp_path) == [CAUSAL]


def test_of_several_stores_one_must_be_named(tmp_path: Path) -> None:
    specs = [SPEC, CAUSAL, make_spec(image_size=644)]
    for number, spec in enumerate(specs):
        write_shard(tmp_path, [number], spec)
    assert sorted(spec.short_name for spec in list_stores(tmp_path)) == sorted(s.short_name for s in specs)
    with pytest.raises(AmbiguousCacheError) as caught:
        FeatureCache.open(tmp_path)
    for words in ("3 caches", "context causal", "image size 644", "layer 0", "bfloat16", "--fingerprint"):
        assert words in str(caught.value)
    with pytest.raises(AmbiguousCacheError, match="2 caches"):
        FeatureCache.open(tmp_path, context="frame")
    for number, spec in enumerate(specs):
        for choice in (
            {"spec": spec},
            {"fingerprint": spec.fingerprint},
            {"fingerprint": spec.fingerprint[:6]},
        ):
            with FeatureCache.open(tmp_path, **choice) as cache:  # type: ignore[arg-type]
                assert cache.spec == spec
                assert holds(cache, [number])
    with FeatureCache.open(tmp_path, context="causal") as cache:
        assert cache.spec == CAUSAL


def test_a_cache_of_another_specification_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    for choice, words in (
        ({"spec": CAUSAL}, "context causal"),
        ({"context": "causal"}, "context causal"),
        ({"fingerprint": "0" * 64}, "fingerprint 0000"),
        ({"spec": SPEC, "context": "causal"}, "with context causal"),
    ):
        with pytest.raises(SpecMismatchError, match=words) as caught:
            FeatureCache.open(tmp_path, **choice)  # type: ignore[arg-type]
        assert SPEC.short_name in str(caught.value)


@pytest.mark.parametrize(
    "choice",
    [
        {"context": "both"},
        {"context": ""},
        {"fingerprint": ""},
        {"fingerprint": "../../etc"},
        {"fingerprint": "XY"},
    ],
)
def test_an_impossible_choice_is_refused(tmp_path: Path, choice: dict[str, str]) -> None:
    write_shard(tmp_path, [1])
    with pytest.raises(SettingsError, match=next(iter(choice))):
        FeatureCache.open(tmp_path, **choice)  # type: ignore[arg-type]


# ---------------------------------------------------------------- no cache


def test_what_is_no_cache_is_refused_and_the_reason_given(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match="there is no directory"):
        FeatureCache.open(tmp_path / "nowhere")
    with pytest.raises(NotACacheError, match="holds no feature cache"):
        FeatureCache.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotACacheError, match="is not a directory"):
        FeatureCache.open(tmp_path / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CacheAccessError, match="leads back to itself"):
        FeatureCache.open(tmp_path / "loop")
    create_store(tmp_path / "cache", SPEC)
    with pytest.raises(NotACacheError, match="give the directory above"):
        FeatureCache.open(tmp_path / "cache" / SPEC.short_name)


def _open_as_nobody(path: Path) -> str:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        FeatureCache.open(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("closed", ["", SPEC.short_name, f"{SPEC.short_name}/shards"])
def test_another_user_without_permission_is_told_so(closed: str) -> None:
    parent = Path("/tmp") / f"vggt-cache-test-{os.getpid()}"  # pytest's own folders are closed to others
    try:
        name = write_shard(parent, [1])
        with get_context("fork").Pool(1) as pool:
            assert pool.apply(_open_as_nobody, [parent]) == "opened"
        (parent / closed).chmod(0o700)
        with get_context("fork").Pool(1) as pool:
            said = pool.apply(_open_as_nobody, [parent])
        assert "Permission denied" in said
        assert said.startswith("CacheAccessError")
        (parent / closed).chmod(0o755)
        shard_path(parent, name).chmod(0o000)
        with get_context("fork").Pool(1) as pool:
            said = pool.apply(_open_as_nobody, [parent])
        assert said.startswith("CacheAccessError")
        assert "ask its owner" in said
    finally:
        shutil.rmtree(parent)


@pytest.mark.parametrize(
    ("operation", "error", "words"),
    [
        ("list_names", errno.EIO, "reports a fault"),
        ("list_names", errno.ESTALE, "mount it again"),
        ("preadv", errno.EIO, "reports a fault"),
        ("open_file", errno.EACCES, "ask its owner"),
        ("fstat", errno.ESTALE, "mount it again"),
        ("open_directory", errno.EACCES, "ask its owner"),
    ],
)
def test_what_the_system_reports_while_opening_is_an_error_with_a_name(
    tmp_path: Path, operation: str, error: int, words: str
) -> None:
    write_shard(tmp_path, range(5))
    save_index(tmp_path)
    position, said = 0, list[str]()
    while True:
        fs = failing(operation, error, nth=position)
        with no_descriptor_leaks():
            try:
                with FeatureCache.open(tmp_path, fs=fs, use_index=False) as cache:
                    assert holds(cache, range(5))
            except CacheAccessError as caught:
                said.append(str(caught))
        if fs.operations.count(operation) <= position:
            break
        position += 1
    assert said
    assert all(words in sentence for sentence in said)


# ---------------------------------------------------------------- the specification


def spec_file(cache_dir: Path) -> Path:
    return cache_dir / SPEC.short_name / "spec.json"


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"\xff\xfe", b"[]", b" " * 100_000, CAUSAL.to_json().encode()]
)
def test_a_lost_or_damaged_spec_json_is_replaced_by_what_a_shard_says(
    tmp_path: Path, content: bytes | None
) -> None:
    write_shard(tmp_path, range(3))
    if content is None:
        spec_file(tmp_path).unlink()
    else:
        spec_file(tmp_path).write_bytes(content)
    with FeatureCache.open(tmp_path) as cache:
        assert cache.spec == SPEC
        assert holds(cache, range(3))
    create_store(tmp_path, SPEC)
    assert spec_file(tmp_path).read_text() == SPEC.to_json()


def test_a_store_that_nothing_tells_the_specification_of_is_refused(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    spec_file(tmp_path).write_text("{}")
    with pytest.raises(SpecMismatchError, match=r"spec.json is missing or damaged"):
        FeatureCache.open(tmp_path)
    write_shard(tmp_path, [1], CAUSAL)
    with FeatureCache.open(tmp_path) as cache:
        assert cache.spec == CAUSAL
    assert [name for name, _ in describe(tmp_path).unreadable] == [SPEC.short_name]


def test_a_renamed_store_folder_is_not_taken_for_another_specification(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    (tmp_path / SPEC.short_name).rename(tmp_path / CAUSAL.short_name)
    with pytest.raises(SpecMismatchError):
        FeatureCache.open(tmp_path)


@pytest.mark.promise("hostile input")
@DAMAGE_WARNING
def test_a_hostile_spec_json_is_refused(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    for text in ("[" * 60_000, "9" * 60_000, SPEC.to_json().replace('"embed_dim":2', '"embed_dim":"x"')):
        spec_file(tmp_path).write_text(text)
        with pytest.raises(SpecMismatchError):
            FeatureCache.open(tmp_path)
    spec_file(tmp_path).unlink()
    os.mkfifo(spec_file(tmp_path))
    with pytest.raises(SpecMismatchError):
        FeatureCache.open(tmp_path)


# ---------------------------------------------------------------- making a store


def _create(path: Path) -> str:
    return str(create_store(path, SPEC))


def test_any_number_of_processes_may_create_a_store_at_once(tmp_path: Path) -> None:
    with get_context("fork").Pool(4) as pool:
        for round_number in range(10):
            place = tmp_path / str(round_number) / "deep" / "down"
            made = pool.map(_create, [place] * 8, chunksize=1)
            assert set(made) == {str(place / SPEC.short_name)}
            assert spec_file(place).read_text() == SPEC.to_json()
            assert temp_files(place) == []


def test_a_new_store_is_synced_folder_by_folder_up_to_what_was_there(tmp_path: Path) -> None:
    synced: list[str] = []

    class Watching(TracedFileSystem):
        def fsync_directory(self, dir_fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{dir_fd}"))
            super().fsync_directory(dir_fd)

    cache_dir = tmp_path / "a" / "b"
    create_store(cache_dir, SPEC, Watching())
    wanted = [tmp_path, tmp_path / "a", cache_dir, cache_dir / SPEC.short_name]
    assert {str(path) for path in wanted} <= set(synced)
    synced.clear()
    create_store(cache_dir, SPEC, Watching())
    assert {str(cache_dir), str(cache_dir / SPEC.short_name)} <= set(synced)


def test_a_store_whose_making_failed_anywhere_can_be_made_afterwards(tmp_path: Path) -> None:
    clean = TracedFileSystem()
    create_store(tmp_path / "clean", SPEC, clean)
    for failed_at in range(len(clean.operations)):
        place = tmp_path / str(failed_at)

        def fault(name: str, position: int, call, failed_at: int = failed_at):  # type: ignore[no-untyped-def]
            if position == failed_at and name != "close":
                raise OSError(errno.EIO, "broken")
            return call()

        with no_descriptor_leaks(), suppress(CommitError):
            create_store(place, SPEC, TracedFileSystem(fault))
        write_shard(place, [1])
        assert temp_files(place) == []
        with FeatureCache.open(place) as cache:
            assert holds(cache, [1])
