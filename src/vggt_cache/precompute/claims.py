"""Work is claimed, not assigned: who computes which block, agreed through the file system alone.

A claim on block `b` is a file `b.<generation>` made by an exclusive create; its content is the owner's token. An owner
shows that it lives by touching `<token>.alive` now and then, as long as its work progresses. The holder of a block is
the owner named in its highest generation. When that owner is dead, whoever creates the next generation is the new
holder; two that try at once cannot both succeed.

Whoever waits watches that file: an owner whose mark has not changed for a while, on the watcher's own clock, is dead.
So neither the clocks of machines nor that of the file system matter, and a clock that was set does no harm.

Claims only save work. Were all of them lost, features would be computed twice and the result be the same. So failing
to give one back is ignored; where none can be made, no shard could be written either, and the run ends in a sentence.
For the same reason a listing of the folder may be old: what has been claimed since shows when the create fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vggt_cache.environment import seconds_of
from vggt_cache.errors import CacheAccessError, FileAbsentError, SmallFileError
from vggt_cache.small_files import FileState, SmallFolder
from vggt_cache.store.object_folder import folder_at

DEFAULT_TTL_S = 60.0
"""An owner whose mark has not moved for so long is succeeded."""
PATIENCE = 10
"""An owner that has made no progress for so many times the same stops moving its mark: its decoders may hang."""
_TOKEN = re.compile(rb"[0-9a-f]{32}")
_MAX_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What the folder showed at one moment."""

    generations: Mapping[str, int] = field(default_factory=dict)
    """By block its highest generation."""
    marks: frozenset[str] = frozenset()
    """One of each process that takes part, and of those that were killed."""
    dead: frozenset[str] = frozenset()
    """Claims whose owner was asked after, and does not live."""

    def holds(self, block_id: str) -> bool:
        """Whether somebody held the block who is not known to be dead."""
        generation = self.generations.get(block_id)
        return generation is not None and f"{block_id}.{generation}" not in self.dead

    @property
    def held(self) -> Collection[str]:
        """All such blocks."""
        return list(filter(self.holds, self.generations)) if self.dead else self.generations


class Claims(AbstractContextManager["Claims"]):
    """This process's claims in one directory. Use as a context manager: leaving it gives all claims back."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        open_folder: Callable[[str | os.PathLike[str]], SmallFolder] = folder_at,
        ttl_s: float | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        on_silence: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Raises SettingsError, and CacheAccessError where nothing can be written.

        `on_silence(seconds)` is called once, in another thread, when the heart stops because nothing progresses.
        """
        self._folder = open_folder(directory)
        self._ttl_s = ttl_s or seconds_of("VGGT_CACHE_CLAIM_TTL_S", DEFAULT_TTL_S)
        self._clock_s = clock_s
        self.token = os.urandom(16).hex()
        """Names this process in what it claims."""
        self._mark = f"{self.token}.alive"
        self._held: dict[str, int] = {}
        """By block the generation that is ours. Two threads use it, each time in one step."""
        self._seen: dict[str, tuple[FileState | None, float]] = {}
        """By file its last state, and since when it has been so, on our clock."""
        self._progress_s = clock_s()
        self._on_silence, self._silent = on_silence, False
        self._stopped = threading.Event()
        with _failing_in_a_sentence():
            self._folder.make()
            self._folder.create(self._mark, json.dumps(_this_process()).encode())
        self._heart = threading.Thread(target=self._beat_on, name="claim-heartbeat", daemon=True)
        self._heart.start()

    def look(self, ask_of: Iterable[str] = ()) -> Listing:
        """What is claimed now; of the blocks `ask_of` also whether their owners live. Raises CacheAccessError."""
        with _failing_in_a_sentence():
            self._folder.touch(
                "."
            )  # NFS lists anew what the process itself has changed, all else a minute late
            names = self._folder.names()
            generations: dict[str, int] = {}
            for block_id, generation in _claims_among(names):
                if generation >= generations.setdefault(block_id, generation):
                    generations[block_id] = generation
            asked = (f"{block}.{generations[block]}" for block in ask_of if block in generations)
            dead = frozenset(claim for claim in asked if not self._owner_lives(claim))
        marks = frozenset(name for name in names if name.endswith(".alive"))
        return Listing(generations=generations, marks=marks, dead=dead)

    def try_claim(self, block_id: str, listing: Listing | None = None) -> bool:
        """Become the holder of a block if nobody held it in `listing` (default: now). Raises CacheAccessError."""
        listing = self.look([block_id]) if listing is None else listing
        if listing.holds(block_id):
            return False
        generation = listing.generations.get(block_id, -1) + 1
        with _failing_in_a_sentence():
            if not self._folder.create(f"{block_id}.{generation}", self.token.encode()):
                return False
        self._held[block_id] = generation
        self.progressed()
        return True

    def release(self, block_id: str) -> None:
        """Give a block back, unless it has a successor's claim by now, which stays. Never raises.

        The own claim goes last: until then the block counts as held.
        """
        generation = self._held.pop(block_id, None)
        if generation is None:
            return
        self.progressed()
        with suppress(SmallFileError):
            if self._folder.read(f"{block_id}.{generation}", _MAX_BYTES) == self.token.encode():
                claims = _claims_among(self._folder.names()) if generation else ()
                dead = [number for block, number in claims if block == block_id and number < generation]
                for number in (*dead, generation):
                    self._folder.remove(f"{block_id}.{number}")

    def progressed(self) -> None:
        """A frame was decoded, a batch encoded, a shard committed: this process does not hang."""
        self._progress_s = self._clock_s()

    def beat(self) -> None:
        """Move the mark, unless nothing has progressed for long."""
        was_silent, silent_s = self._silent, self._clock_s() - self._progress_s
        self._silent = silent_s >= PATIENCE * self._ttl_s
        if not self._silent:
            with suppress(SmallFileError):  # a mount that stalls comes back; a lost claim costs work only
                self._folder.touch(self._mark)
        elif not was_silent:
            self._on_silence(silent_s)

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for block_id in list(self._held):
            self.release(block_id)
        self._stopped.set()
        self._heart.join()
        with suppress(SmallFileError):
            self._folder.remove(self._mark)

    def _beat_on(self) -> None:
        while not self._stopped.wait(self._ttl_s / 6):
            self.beat()

    # ------------------------------------------------------------ others

    def _owner_lives(self, claim: str) -> bool:
        try:
            token = self._folder.read(claim, _MAX_BYTES)
        except FileAbsentError:
            return False  # released between listing and reading
        except SmallFileError:
            token = b""  # not a claim at all: it counts as one for as long as a dead owner's does
        if not _TOKEN.fullmatch(token):
            return self._moves(claim)  # created, its content not written (or not visible) yet
        mark = f"{token.decode()}.alive"
        return mark == self._mark or (self._moves(mark) and not self._is_known_dead(mark))

    def _moves(self, name: str) -> bool:
        """Whether a file was seen to change, or seen for the first time, within the last seconds of our clock."""
        state, now_s = self._folder.state(name), self._clock_s()
        if name not in self._seen or self._seen[name][0] != state:
            self._seen[name] = state, now_s
        return now_s - self._seen[name][1] < self._ttl_s

    def _is_known_dead(self, mark: str) -> bool:
        try:
            return _has_ended(json.loads(self._folder.read(mark, _MAX_BYTES)))
        except (SmallFileError, ValueError, RecursionError):
            return False


def _claims_among(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Blocks and generations; what else stands there is no block that anybody asks for."""
    for name in names:
        block_id, _, generation = name.partition(".")
        if generation.isdecimal() and len(generation) < 10:
            yield block_id, int(generation)


@contextmanager
def _failing_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except SmallFileError as error:
        raise CacheAccessError(
            f"no work can be claimed, and so none be done: {error}; if the cache is somebody else's, ask for write "
            "permission or precompute into a directory of your own"
        ) from error


# ---------------------------------------------------------------- processes of this machine


def _this_process() -> dict[str, object]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def _has_ended(process: object) -> bool:
    """Whether a process is known to have ended: one of this very machine (same boot, same pid namespace)."""
    if not isinstance(process, dict) or process.get("machine") != _machine() or not _machine():
        return False
    pid = process.get("pid")
    if type(pid) is not int or not 0 < pid < 1 << 31:
        return False
    if (started := _start_time(pid)) is not None:
        return process.get("started") != started
    try:
        os.kill(pid, 0)  # asked of the kernel: /proc may hide the processes of other users (hidepid)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:16]
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks, which tells it from a later one of the same pid; "" for a zombie.

    None where /proc does not show it.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if after_name[0] in "ZX" else after_name[19]
