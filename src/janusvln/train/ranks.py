"""What the processes of one run tell each other outside the engine: through the launcher's key-value store.

No collective: a rank that has something to say never waits for a rank that is computing. One that must stop
leaves its sentence in the store; a thread of every other rank finds it there and ends its process, even
while the main thread waits in a collective that will never be completed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from vggt_cache.errors import CacheAccessError
from vggt_cache.output import print_line
from vggt_cache.store import FeatureCache

POLL_S = 0.2
_PATIENCE_S = 5.0
_ANSWER_S = 10.0
_STOP, _STOPPED = "stop", "stopped"
_LAST_STEP = "last step"
_ASKED, _ANSWERED = "asked", "answered"


class Ranks:
    """The processes of this run, all of them or this one alone."""

    def __init__(self, store: Store | None, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._stopping = threading.Event()
        self._to_say_it = threading.Lock()
        """Whoever has it, the main thread or the watching one, says why all stop."""
        self._watcher = threading.Thread(target=self._watch, args=[store], name="stop-watch", daemon=True)
        if store is not None:
            self._watcher.start()

    @classmethod
    def of_this_run(cls) -> Ranks:
        """After the process group has been made, if there is one."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(None, 0, 1)
        store = PrefixStore("vggt_cache", _get_default_store())
        return cls(store, dist.get_rank(), dist.get_world_size())

    def exchange(self, name: str, text: str) -> list[str]:
        """Every rank's text, by rank. All ranks must call it, once for each name."""
        store = self._store
        if store is None:
            return [text]
        store.set(f"{name}/{self.rank}", text)
        texts = []
        for place in (f"{name}/{rank}" for rank in range(self.world_size)):
            # Asked again and again: a waiting `get` would keep the connection from the thread that watches for a stop.
            while not store.check([place]):
                time.sleep(POLL_S / 4)
            texts.append(store.get(place).decode())
        return texts

    def stop_all(self, sentence: str, exit_code: int, *, level: str = "ERROR") -> int:
        """Print the sentence here and, within seconds, on every rank; returns the exit code."""
        self._stopping.set()
        mine = json.dumps({"sentence": sentence, "exit_code": exit_code, "level": level})
        if self._store is None:
            return self._say(mine)
        first = self._store.compare_set(_STOP, "", mine).decode() or mine  # of several, all say the first
        if not self._to_say_it.acquire(blocking=False):
            self._watcher.join()  # it says it at this moment, and ends this process
        agreed = self._say(first)
        self._wait_until_all_have_said_it(self._store)
        return agreed

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def agree_to_stop(self, step: int, wanted: str) -> str:
        """Why all ranks stop behind optimizer step `step`, which this rank has just finished; "": they go on.

        `wanted`: why this rank would stop. It proposes the step after this one, which no other rank can have finished:
        gradients of all are joined in it, and this rank has not begun it. So every rank finds the proposal there. It
        costs one question to the store a step, and no collective.
        """
        store = self._store
        if store is None:
            return wanted
        if store.check([_LAST_STEP]):
            last, why = store.get(_LAST_STEP).decode().split()
            return why if step >= int(last) else ""
        if wanted:
            store.compare_set(_LAST_STEP, "", f"{step + 1} {wanted}")
        return ""

    def all_answer(self) -> bool:
        """Whether every rank is still there: the watching threads answer, whatever the main ones wait for."""
        if self._store is None:
            return True
        try:
            self._store.set(_ASKED, "")
            return self._count_to(self.world_size, _ANSWERED, _ANSWER_S)
        except Exception:  # the store has gone with its host, as below
            return False

    def warn(self, sentence: str) -> None:
        """What happened to this rank alone; the run goes on."""
        self._print("WARN", sentence)

    def close(self) -> None:
        """Nothing will be said any more. To be called before the process group ends."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _say(self, message: str) -> int:
        content = json.loads(message)
        # Where they cannot talk to each other yet, all have the same settings: one of them is enough to say it.
        if self._store is not None or self.rank == 0:
            self._print(content["level"], content["sentence"])
        return int(content["exit_code"])

    def _print(self, level: str, sentence: str) -> None:
        print_line(level, f"[rank {self.rank}] {sentence}" if self.rank else sentence, sys.stderr)

    def _wait_until_all_have_said_it(self, store: Store) -> None:
        """A launcher kills the others as soon as one process has ended; and the store ends with its host."""
        store.add(_STOPPED, 1)
        self._count_to(self.world_size, _STOPPED, _PATIENCE_S)

    def _count_to(self, count: int, name: str, patience_s: float) -> bool:
        store, deadline_s = self._store, time.monotonic() + patience_s
        while store is not None and store.add(name, 0) < count:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S / 4)
        return True

    def _watch(self, store: Store) -> None:
        answered = False
        try:
            while not store.check([_STOP]):
                if not answered and store.check([_ASKED]):
                    answered = store.add(_ANSWERED, 1) > 0
                if self._stopping.wait(POLL_S):
                    return
            message = store.get(_STOP).decode()
        except Exception:  # the store has gone with its host: the run is over
            return
        if self._stopping.is_set() or not self._to_say_it.acquire(blocking=False):
            return  # the main thread says it, or has nothing more to say
        exit_code = self._say(message)
        sys.stdout.flush()
        try:
            self._wait_until_all_have_said_it(store)
        finally:
            # The main thread may be in a collective, from which nothing else returns.
            os._exit(exit_code)


def agree_on_snapshot(cache: FeatureCache, ranks: Ranks) -> FeatureCache:
    """The cache as rank 0 sees it, on every rank: all train from one snapshot of it, or none begins.

    Raises CacheAccessError, with the same sentence on every rank, where a node sees another specification, or not
    all of rank 0's shards.
    """
    names = cache.shard_names()
    own = {"host": socket.gethostname(), "fingerprint": cache.spec.fingerprint, "names": []}
    leader = json.loads(ranks.exchange("cache", json.dumps(own if ranks.rank else own | {"names": names}))[0])
    here, there = f"rank {ranks.rank} on {own['host']}", f"rank 0 on {leader['host']}"
    unseen = set(leader["names"]) - set(names)
    complaint = ""
    if cache.spec.fingerprint != leader["fingerprint"]:
        complaint = (
            f"{here} has opened a cache of specification {cache.spec.fingerprint[:16]} in {cache.cache_dir}, and "
            f"{there} one of {leader['fingerprint'][:16]}: the nodes see different directories; mount the same one"
        )
    elif unseen:
        complaint = (
            f"{here} sees {len(names)} shards in {cache.cache_dir}, and {len(unseen)} of the {len(leader['names'])} "
            f"that {there} sees are not among them: the nodes see different directories, or a mount that has not "
            "caught up; mount the same one, or wait and start again"
        )
    complaints = [text for text in ranks.exchange("cache complaints", complaint) if text]
    if complaints:
        raise CacheAccessError(complaints[0])
    return cache if tuple(leader["names"]) == names else cache.with_shards(leader["names"])
