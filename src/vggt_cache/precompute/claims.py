"""Work is claimed, not assigned: who computes which block, agreed through the file system alone.

A claim on block `b` is a file `b.<generation>` made by an exclusive create; its content is the owner's
token. An owner proves that it lives by touching `<token>.alive`. The holder of a block is the owner named
in its highest generation. When that owner is dead, whoever creates the next generation is the new holder;
two that try at once cannot both succeed, and nobody ever deletes a claim that might be somebody else's.

Claims only save work. Were all of them lost, features would be computed twice and the result be the same.
Ages are differences between two mtimes of the same file system, so that clocks of machines do not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

from vggt_cache.environment import seconds_of

DEFAULT_TTL_S = 60.0
_CLAIM_NAME = re.compile(r"([0-9a-f]{32})\.(\d{1,9})")


class Claims:
    """This process's claims in one directory. Use as a context manager: leaving it gives all claims back."""

    def __init__(self, directory: Path, *, ttl_s: float | None = None) -> None:
        self._dir = directory
        self._ttl_s = ttl_s or seconds_of("VGGT_CACHE_CLAIM_TTL_S", DEFAULT_TTL_S)
        self._token = os.urandom(16).hex()
        self._alive = directory / f"{self._token}.alive"
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        self._alive.write_text(json.dumps(_this_process()))
        self._heart = threading.Thread(target=self._beat, name="claim-heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def try_claim(self, block_id: str) -> bool:
        """Become the holder of a block if nobody alive holds it."""
        generation = self._highest_generation(block_id)
        if generation is not None and self._owner_lives(self._dir / f"{block_id}.{generation}"):
            return False
        following = 0 if generation is None else generation + 1
        if not self._create(f"{block_id}.{following}"):
            return False
        with self._lock:
            self._held.add(block_id)
        return True

    def release(self, block_id: str) -> None:
        """Give a block back. The highest generation goes last: until then the block counts as held."""
        with self._lock:
            self._held.discard(block_id)
        for generation in sorted(self._generations().get(block_id, [])):
            (self._dir / f"{block_id}.{generation}").unlink(missing_ok=True)

    def held_by_others(self) -> int:
        """How many blocks somebody else alive is working on."""
        newest = {
            block: max(found) for block, found in self._generations().items() if block not in self._held
        }
        return sum(self._owner_lives(self._dir / f"{block}.{number}") for block, number in newest.items())

    def close(self) -> None:
        for block_id in list(self._held):
            self.release(block_id)
        self._stopped.set()
        self._heart.join()
        self._alive.unlink(missing_ok=True)

    # ------------------------------------------------------------ the files

    def _create(self, name: str) -> bool:
        try:
            handle = os.open(self._dir / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(self._token)
        return True

    def _generations(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for name in os.listdir(self._dir):
            if match := _CLAIM_NAME.fullmatch(name):
                found.setdefault(match[1], []).append(int(match[2]))
        return found

    def _highest_generation(self, block_id: str) -> int | None:
        return max(self._generations().get(block_id, []), default=None)

    def _owner_lives(self, claim: Path) -> bool:
        try:
            token = claim.read_text()
            age_s = self._now_s() - claim.stat().st_mtime
        except OSError:
            return False  # released between listing and reading
        if token == self._token:
            return True
        if not re.fullmatch(r"[0-9a-f]{32}", token):
            return age_s < self._ttl_s  # created, its content not written (or not visible) yet
        alive = self._dir / f"{token}.alive"
        try:
            process = json.loads(alive.read_text())
            age_s = self._now_s() - alive.stat().st_mtime
        except (OSError, ValueError):
            return age_s < self._ttl_s
        return age_s < self._ttl_s and not _is_known_dead(process)

    # ------------------------------------------------------------ signs of life

    def _now_s(self) -> float:
        """The file system's own time, read from the file that this process touches."""
        try:
            os.utime(self._alive)
            return self._alive.stat().st_mtime
        except OSError:
            return time.time()  # somebody swept the folder: ages are a guess, and a guess costs work only

    def _beat(self) -> None:
        while not self._stopped.wait(self._ttl_s / 6):
            try:
                os.utime(self._alive)
            except OSError:
                continue  # a mount that stalls for a while comes back; a lost claim costs work only


def _this_process() -> dict[str, object]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def _is_known_dead(process: object) -> bool:
    """Whether a process of this very machine (same boot, same pid namespace) has ended."""
    if not isinstance(process, dict) or process.get("machine") != _machine() or not _machine():
        return False
    pid = process.get("pid")
    return isinstance(pid, int) and _start_time(pid) != process.get("started")


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:16]
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """The start time of a running process in clock ticks, which tells it from a later one of the same pid."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]
