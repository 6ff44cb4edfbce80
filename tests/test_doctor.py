"""The doctor finds a healthy directory healthy, reports each broken promise of a mount, and leaves no trace."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vggt_cache import doctor
from vggt_cache.doctor import Finding, examine, format_findings, trials
from vggt_cache.doctor.trials import Partner
from vggt_cache.errors import CacheAccessError
from vggt_cache.precompute.claims import Claims
from vggt_cache.store import FileSystem


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "THROUGHPUT_BYTES", 1 << 20)
    monkeypatch.setattr(trials, "_SWAP_S", 0.05)


@pytest.fixture
def other() -> Iterator[Partner]:
    with Partner() as started:
        yield started


def refuse(code: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def committed(folder: Path) -> dict[str, Finding]:
    folder.mkdir(exist_ok=True)
    return by_name(list(trials.commit(folder)))


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


# ---------------------------------------------------------------- the whole examination


def test_a_local_directory_has_no_fault_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "shard.safetensors").write_bytes(b"kept")
    found = by_name(examine(tmp_path))
    assert {name for name, finding in found.items() if finding.status == "fail"} == set()
    assert {
        "file system", "free space", "free inodes", "directory mode", "writable", "exclusive create", "atomic rename",
        "new name visible", "new contents visible", "fsync of a file", "fsync of a directory", "hard links", "clock",
        "new files", "file names", "write speed", "read speed", "file locks", "file modes",
    } == set(found)  # fmt: skip
    assert os.listdir(tmp_path) == ["shard.safetensors"]
    assert (tmp_path / "shard.safetensors").read_bytes() == b"kept"


def test_a_directory_that_does_not_exist_is_not_made_and_its_parent_is_examined(tmp_path: Path) -> None:
    found = by_name(examine(tmp_path / "new" / "cache"))
    assert found["directory"].value == str(tmp_path)
    assert found["exclusive create"].status == "ok"
    assert os.listdir(tmp_path) == []


def test_a_read_only_directory_is_a_warning_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", refuse(errno.EROFS))
    found = by_name(examine(tmp_path))
    assert found["writable"].status == "warn"
    assert "Read-only file system" in found["writable"].value
    assert set(found) == {"file system", "directory mode", "writable"}


def test_what_is_no_directory_or_cannot_be_read_is_one_typed_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CacheAccessError, match=r"file is not a directory, so no cache can be there: give a directory$"
    ):
        examine(tmp_path / "file")
    monkeypatch.setattr(os, "scandir", refuse(errno.EACCES))
    with pytest.raises(CacheAccessError, match=r"cannot be read \(Permission denied\).*ask its owner"):
        examine(tmp_path)


def test_a_stale_mount_is_one_typed_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", refuse(errno.ESTALE))
    with pytest.raises(CacheAccessError, match="cannot be read"):
        examine(tmp_path)


def test_without_a_second_process_the_examination_still_ends_with_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials.SPAWN.Process, "start", refuse(errno.EAGAIN))
    found = by_name(examine(tmp_path))
    assert found["second process"].status == "fail"
    assert found["read speed"].status == "ok"
    assert os.listdir(tmp_path) == []


def test_a_second_process_that_dies_is_a_finding_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Partner.ask

    def die(self: Partner, *request: Any) -> None:
        self._process.kill()
        self._process.join()
        ask(self, *request)

    monkeypatch.setattr(Partner, "ask", die)
    found = by_name(examine(tmp_path))
    assert found["exclusive create"].status == "fail"
    assert found["read speed"].status == "ok"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("who", ["first", "second"])
def test_a_claim_that_cannot_be_made_is_a_fault_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Partner, who: str
) -> None:
    if who == "first":
        monkeypatch.setattr(Claims, "try_claim", refuse_in_a_sentence)
        folder = tmp_path
    else:
        (tmp_path / "folder").write_text("")  # in whose place the second process wants to make its own
        folder = tmp_path / "folder"
    (found,) = doctor._attempt(trials.exclusive_create, folder, other)
    assert (found.status, "no work can be claimed" in found.value) == ("fail", True)


def refuse_in_a_sentence(*_: object) -> bool:
    raise CacheAccessError("no work can be claimed: the mount is read-only")


def test_an_interrupt_leaves_no_folder_and_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Partner] = []

    def interrupt(folder: Path, other: Partner) -> Finding:
        started.append(other)
        other.ask(trials.watch, trials.content_of, folder / "never", "last", 1e6)
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "TOGETHER", (interrupt,))
    with pytest.raises(KeyboardInterrupt):
        examine(tmp_path)
    assert os.listdir(tmp_path) == []
    assert started[0]._process.exitcode is not None


def test_a_folder_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "rmtree", lambda *_, **__: None)
    finding = by_name(examine(tmp_path))["cleaning up"]
    assert (finding.status, finding.value) == ("warn", str(next(tmp_path.iterdir())))


def test_the_table_has_a_line_for_each_finding_of_one_sentence_and_counts_them(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    *lines, total = format_findings(findings).splitlines()
    for line, finding in zip(lines, findings, strict=True):
        assert line.startswith(finding.status)
        assert finding.name in line
        assert finding.value in line
        assert line.endswith(finding.meaning)
        assert finding.meaning.endswith(".")
        assert ". " not in finding.meaning
    assert total.startswith(f"{len(findings)} checks: ")
    two = [Finding("a", "warn", "1", "M."), Finding("b", "fail", "2", "N.")]
    assert format_findings(two).splitlines()[-1] == "2 checks: 0 ok, 1 warn, 1 fail"


# ---------------------------------------------------------------- each broken promise


def test_a_create_that_is_not_exclusive_is_found(
    tmp_path: Path, other: Partner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trials.exclusive_create(tmp_path / "first", other).status == "ok"
    monkeypatch.setattr(Claims, "try_claim", lambda self, block: True)
    finding = trials.exclusive_create(tmp_path / "other", other)
    assert finding.status == "fail"
    assert "twice" in finding.value


def test_a_replacement_that_is_not_atomic_is_found(
    tmp_path: Path, other: Partner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_two_halves(source: Path, target: Path) -> None:
        data = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            time.sleep(0.005)
            file.write(data[len(data) // 2 :])

    monkeypatch.setattr(trials.os, "replace", in_two_halves)
    finding = by_name(list(trials.atomic_rename(tmp_path, other)))["atomic rename"]
    assert finding.status == "fail"
    assert "torn" in finding.value


def named(how: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a shard gets its name, and a file its successor, in this way."""
    link, replace = FileSystem.link, os.replace
    monkeypatch.setattr(FileSystem, "link", lambda *names, **where: how(link, *names, **where))
    monkeypatch.setattr(trials.os, "replace", lambda *names: how(replace, *names))


@pytest.mark.parametrize(
    ("trial", "name"),
    [(trials.new_name_visible, "new name visible"), (trials.atomic_rename, "new contents visible")],
)
def test_a_rename_that_nobody_sees_is_found(
    trial: Callable[..., Any], name: str, tmp_path: Path, other: Partner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "VISIBILITY_TIMEOUT_S", 0.1)
    named(lambda call, *names, **where: None, monkeypatch)
    finding = by_name(doctor._attempt(trial, tmp_path, other))[name]
    assert (finding.status, finding.value) == ("fail", "not within 0 s")


@pytest.mark.parametrize(
    ("trial", "name"),
    [(trials.new_name_visible, "new name visible"), (trials.atomic_rename, "new contents visible")],
)
def test_the_visibility_delay_is_measured_and_a_long_one_is_a_warning(
    trial: Callable[..., Any], name: str, tmp_path: Path, other: Partner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(call: Callable[..., None], *names: object, **where: object) -> None:
        time.sleep(0.3)
        call(*names, **where)

    monkeypatch.setattr(trials, "SLOW_VISIBILITY_S", 0.25)
    named(late, monkeypatch)
    finding = by_name(doctor._attempt(trial, tmp_path, other))[name]
    assert finding.status == "warn"
    assert float(finding.value.removesuffix(" ms")) >= 300


@pytest.mark.parametrize(
    ("call", "name", "status"),
    [("fsync", "fsync of a file", "fail"), ("fsync_directory", "fsync of a directory", "warn")],
)
def test_a_refused_fsync_is_reported_with_its_reason(
    call: str, name: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileSystem, call, refuse(errno.EINVAL))
    finding = committed(tmp_path)[name]
    assert (finding.status, finding.value) == (status, "refused (Invalid argument)")


def test_fsync_of_a_directory_is_asked_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    committed(tmp_path)
    assert synced[-2:] == [False, True]  # the shard, then the folder that has its name


@pytest.mark.parametrize(
    ("call", "name"), [("link", "hard links"), ("try_lock", "file locks"), ("set_mode", "file modes")]
)
def test_what_the_store_can_do_without_is_a_warning(
    call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileSystem, call, refuse(errno.EPERM))
    found = committed(tmp_path)
    assert (found[name].status, found[name].value) == ("warn", "no (Operation not permitted)")
    assert found["read speed"].status == "ok"


def test_a_refused_commit_is_a_fault_with_the_stores_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileSystem, "pwrite", refuse(errno.EIO))
    found = committed(tmp_path)
    assert found["commit"].status == "fail"
    assert "Input/output error" in found["commit"].meaning
    assert found["write speed"].value == "not measured"


def test_a_file_server_with_another_time_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trials.clock(tmp_path).status == "ok"
    real = time.time
    monkeypatch.setattr(trials.time, "time", lambda: real() - 100)
    finding = trials.clock(tmp_path)
    assert (finding.status, finding.value) == ("warn", "+100.0 s")


def test_a_file_time_that_stands_still_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.os, "utime", lambda path: None)
    assert trials.clock(tmp_path).value == "does not advance"


@pytest.mark.parametrize(("umask", "value", "status"), [(0o077, "0600", "warn"), (0o027, "0640", "ok")])
def test_new_files_that_the_group_cannot_read_are_a_warning(
    umask: int, value: str, status: str, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        finding = committed(tmp_path)["new files"]
    finally:
        os.umask(before)
    assert (finding.value, finding.status) == (value, status)


@pytest.mark.parametrize(("mode", "status"), [(0o750, "ok"), (0o700, "warn")])
def test_a_directory_that_the_group_cannot_enter_is_a_warning(mode: int, status: str, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    assert doctor.directory_mode(tmp_path).status == status


def test_too_short_file_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "NAME_BYTES", 300)
    finding = trials.file_names(tmp_path)
    assert finding.status == "fail"
    assert "File name too long" in finding.value


def test_a_read_that_ignores_its_offset_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert committed(tmp_path / "sound")["read speed"].status == "ok"
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: os.readv(fd, buffers))
    assert committed(tmp_path / "broken")["read speed"].value == "wrong bytes"


def space(**values: int) -> Callable[[object], SimpleNamespace]:
    full = {"f_bavail": 10**9, "f_frsize": 4096, "f_files": 10**6, "f_favail": 10**6}
    return lambda path: SimpleNamespace(**{**full, **values})


@pytest.mark.parametrize(("blocks", "status"), [(10**9, "ok"), (10**6, "warn"), (10**4, "fail"), (0, "fail")])
def test_little_free_space_is_reported_in_features(
    blocks: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.os, "statvfs", space(f_bavail=blocks))
    finding = by_name(list(doctor.room(tmp_path)))["free space"]
    assert finding.status == status
    assert f"{int(blocks * 4096 / 4.24e6):,} features" in finding.meaning


@pytest.mark.parametrize(
    ("total", "left", "status"), [(10**6, 10**5, "ok"), (10**6, 3, "fail"), (0, 0, "ok")]
)
def test_exhausted_inodes_are_found_and_none_counted_is_no_limit(
    total: int, left: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.os, "statvfs", space(f_files=total, f_favail=left))
    assert by_name(list(doctor.room(tmp_path)))["free inodes"].status == status


def test_a_full_disk_leaves_the_speed_unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.os, "statvfs", space(f_bavail=0))
    found = committed(tmp_path)
    assert found["write speed"].value == "not measured"
    assert found["read speed"].value == "not measured"
    written = (path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert sum(written) < trials.THROUGHPUT_BYTES / 4


# ---------------------------------------------------------------- the kind of file system

MOUNTS = r"""/dev/sda / ext4 rw 0 0
server:/share /data nfs4 rw,vers=4.2 0 0
tmpfs /data/fast tmpfs rw 0 0
old /data/two overlay rw 0 0
new /data/two lustre rw 0 0
usb /data/my\040disk vfat rw 0 0
sshfs /data/remote fuse.sshfs rw 0 0
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind", "point", "status"),
    [
        ("/somewhere/else", "ext4", "/", "ok"),
        ("/data/cache", "nfs4", "/data", "ok"),
        ("/database", "ext4", "/", "ok"),
        ("/data/fast/cache", "tmpfs", "/data/fast", "warn"),
        ("/data/two", "lustre", "/data/two", "ok"),
        ("/data/my disk/cache", "vfat", "/data/my disk", "warn"),
        ("/data/remote/x", "fuse.sshfs", "/data/remote", "warn"),
    ],
)
def test_the_file_system_is_that_of_the_longest_and_latest_mount(
    path: str, kind: str, point: str, status: str, tmp_path: Path
) -> None:
    table = tmp_path / "mounts"
    table.write_text(MOUNTS)
    finding = doctor.file_system(Path(path), str(table))
    assert (finding.value, finding.status) == (f"{kind} at {point}", status)


def test_without_a_mount_table_the_type_is_unknown_and_no_fault(tmp_path: Path) -> None:
    finding = doctor.file_system(tmp_path, str(tmp_path / "absent"))
    assert (finding.value, finding.status) == ("unknown at /", "ok")


def test_a_symbolic_link_is_examined_where_it_leads(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    table.write_text(f"/dev/sda / ext4 rw 0 0\nfast {tmp_path}/target tmpfs rw 0 0\n")
    assert doctor.mount_of(tmp_path / "link", str(table))[0] == "tmpfs"
