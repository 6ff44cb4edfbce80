"""Small files: nothing is waited for, reading has a cap, and every failure is one class and one sentence."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from vggt_cache.errors import (
    DataError,
    FileAbsentError,
    FileAccessError,
    FileKindError,
    FileTextError,
    FileTooLargeError,
    SettingsError,
    SmallFileError,
)
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.report import Reporter
from vggt_cache.precompute.settings import QwenLimits
from vggt_cache.samples import find_sources, iter_samples, read_episode_text
from vggt_cache.small_files import SmallFolder, read_bytes, read_text
from vggt_cache.store.rows import RowTable
from vggt_cache.store.siblings import SameTable

LIMIT = 1000


def _link(path: Path) -> None:
    (path.parent / "target").write_bytes(b"of somebody else")
    path.symlink_to(path.parent / "target")


NOT_FILES = {
    "a link": _link,
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
}


@pytest.fixture
def folder(tmp_path: Path) -> SmallFolder:
    found = SmallFolder(tmp_path / "folder")
    found.make()
    return found


def place(folder: SmallFolder, name: str = "x") -> Path:
    return Path(folder.of(name))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_plain_file_is_neither_read_nor_written(folder: SmallFolder, kind: str) -> None:
    NOT_FILES[kind](place(folder))
    with pytest.raises(FileKindError, match=r"folder/x is not what belongs there .*: remove it"):
        folder.read("x", LIMIT)
    with pytest.raises(FileKindError, match="is not what belongs there"):
        folder.append("x", b"more")
    assert folder.state("x") is None
    assert folder.create("x", b"mine") is False
    assert [path.read_bytes() for path in Path(folder.path).glob("target")] in ([], [b"of somebody else"])
    assert not (Path(folder.path) / "nowhere").exists()


@pytest.mark.parametrize("kind", ["a link to a device", "a pipe", "a folder"])
def test_what_a_user_names_may_be_a_link_and_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    NOT_FILES[kind](tmp_path / "x")
    with pytest.raises(FileKindError):
        read_bytes(str(tmp_path / "x"), LIMIT)
    _link(tmp_path / "y")
    assert read_bytes(str(tmp_path / "y"), LIMIT) == b"of somebody else"


@pytest.mark.parametrize("length", [0, 1, LIMIT - 1, LIMIT, LIMIT + 1, 1 << 40])
def test_no_more_than_the_limit_is_read(folder: SmallFolder, length: int) -> None:
    place(folder).touch()
    os.truncate(place(folder), length)
    for read in (lambda: folder.read("x", LIMIT), lambda: read_bytes(folder.of("x"), LIMIT)):
        if length <= LIMIT:
            assert read() == bytes(length)
        else:
            with pytest.raises(FileTooLargeError, match=f"over {LIMIT} bytes"):
                read()


def test_reading_on_begins_where_it_is_said(folder: SmallFolder) -> None:
    folder.append("x", b"0123456789")
    assert folder.read("x", LIMIT, 4) == b"456789"
    assert folder.read("x", LIMIT, 40) == b""


def test_what_is_no_utf8_is_said_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("前".encode() + b"\xff")
    with pytest.raises(FileTextError, match=r"x is not UTF-8 text \(byte 4\)"):
        read_text(str(tmp_path / "x"), LIMIT)
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + "前".encode())
    assert read_text(str(tmp_path / "x"), LIMIT) == "前"


@pytest.mark.parametrize("name", ["\0", "\ud800", "x" * 300])
def test_a_name_that_no_file_has_is_a_failure_like_others(name: str) -> None:
    with pytest.raises(SmallFileError):
        read_bytes(name, LIMIT)


def test_what_is_absent_is_told_from_what_is_refused(
    folder: SmallFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileAbsentError, match="folder/x does not exist"):
        folder.read("x", LIMIT)
    with pytest.raises(FileAbsentError):
        SmallFolder(folder.path + "/gone").read("x", LIMIT)
    folder.remove("x")

    def refuse(*arguments: object, **options: object) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileAccessError, match=r"cannot be read or written \(Permission denied\)"):
        folder.read("x", LIMIT)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_write_that_fails_is_a_sentence_and_leaves_no_file(
    folder: SmallFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(FileAccessError, match=os.strerror(number)):
        folder.create("x", b"1")
    assert not place(folder).exists()
    with pytest.raises(FileAccessError, match=os.strerror(number)):
        folder.append("y", b"1")


def test_a_short_write_is_gone_on_with(folder: SmallFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    folder.append("x", b"0123456789")
    assert place(folder).read_bytes() == b"0123456789"


def test_a_file_is_made_once_and_with_the_modes_of_the_umask(folder: SmallFolder) -> None:
    before = os.umask(0o027)
    try:
        assert folder.create("x", b"first")
        assert not folder.create("x", b"second")
        folder.append("y", b"1")
    finally:
        os.umask(before)
    assert folder.read("x", LIMIT) == b"first"
    assert {place(folder, name).stat().st_mode & 0o777 for name in folder.names()} == {0o640}


def test_a_folder_that_is_a_link_is_followed_only_where_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    SmallFolder(tmp_path / "link", may_be_link=True).append("x", b"1")
    for call in (
        lambda f: f.append("x", b"2"),
        lambda f: f.create("y", b"2"),
        lambda f: f.names(),
        SmallFolder.make,
    ):
        with pytest.raises(FileKindError):
            call(SmallFolder(tmp_path / "link"))
    assert (tmp_path / "real" / "x").read_bytes() == b"1"


def test_no_descriptor_is_left_open(folder: SmallFolder) -> None:
    os.mkfifo(folder.of("pipe"))
    before = len(os.listdir("/proc/self/fd"))
    for name in ("x", "pipe", "gone"):
        for _ in range(3):
            with pytest.raises(SmallFileError):
                folder.read(name, 0 if name == "x" else LIMIT)
            folder.append("x", b"1")
            folder.create("z", b"1")
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- who uses them


@pytest.mark.parametrize("kind", NOT_FILES)
def test_a_list_of_failures_is_not_written_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    NOT_FILES[kind](tmp_path / "failures.jsonl")
    reporter = Reporter()
    reporter.list_failures(str(tmp_path))
    reporter.failed("a.png", "it is damaged")
    reporter.failed("b.png", "it is damaged")
    assert len(reporter.failures) == 2
    said = capsys.readouterr().out
    assert said.count("failures are only shown here") == 1
    assert "[WARN] b.png: it is damaged" in said
    assert [path.read_bytes() for path in tmp_path.glob("target")] in ([], [b"of somebody else"])


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("rows", [DigestTable, SameTable])
def test_digests_in_another_place_are_neither_read_nor_written(
    tmp_path: Path, kind: str, rows: type[RowTable]
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    elsewhere.mkdir()
    (cache / rows.folder).symlink_to(elsewhere)
    table = rows(str(cache))
    table.append([(b"s" * 16, b"d" * 32)])
    assert list(elsewhere.iterdir()) == []
    (cache / rows.folder).unlink()
    table.append([(b"s" * 16, b"d" * 32)])
    NOT_FILES[kind](cache / rows.folder / f"{0:012x}-{0:016x}.rows")
    table.reload()
    assert len(table) == 1


def test_rows_after_a_torn_chunk_of_our_own_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = DigestTable(str(tmp_path))
    write = os.write

    def tears(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", tears)
        table.append([(b"1" * 16, b"d" * 32)])
    table.append([(b"2" * 16, b"d" * 32)])
    table.reload()
    assert len(table) == 1


def episode(root: Path) -> Path:
    folder = root / "ep"
    folder.mkdir()
    (folder / "step_0000_STOP.png").write_bytes(b"")
    (folder / "milestones_result.json").write_text(json.dumps({"instruction_text": "go"}))
    return folder


@pytest.mark.parametrize("name", ["milestones_result.json", "step_0000_STOP.json"])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkfifo, "is not what belongs there"),
        (Path.mkdir, "is not what belongs there"),
        (lambda path: path.write_bytes(b'"\xff"'), "is not UTF-8 text"),
        (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "has over 16777216 bytes"),
        (lambda path: path.write_text("{"), "is not valid JSON"),
        (lambda path: path.write_text("[]"), "holds no JSON object"),
    ],
)
def test_a_text_of_an_episode_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, name: str, make, sentence: str
) -> None:
    folder = episode(tmp_path)
    (sample,) = iter_samples(find_sources(tmp_path), on_problem=pytest.fail)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(DataError, match=f"{name} {sentence}"):
        read_episode_text(sample)


def test_an_annotation_file_that_becomes_a_pipe_is_a_problem_and_hangs_nobody(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"images": ["a.png"]}\n')
    sources = find_sources(tmp_path)
    path.unlink()
    os.mkfifo(path)
    problems: list = []
    assert list(iter_samples(sources, on_problem=problems.append)) == []
    assert "not a plain file" in problems[0].reason


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to nothing"])
def test_a_models_config_that_cannot_be_read_is_one_sentence(tmp_path: Path, kind: str) -> None:
    NOT_FILES[kind](tmp_path / "config.json")
    with pytest.raises(SettingsError, match=r"config\.json cannot be read, as it"):
        QwenLimits.read(str(tmp_path), min_pixels=1, max_pixels=2)
