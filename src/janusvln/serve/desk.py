"""The open episodes, and the one thread that asks the model."""

from __future__ import annotations

import hashlib
import queue
import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from janusvln.inference import Answer, Episode, Navigator
from janusvln.inference.episode import Frame
from vggt_cache.errors import VggtCacheError

IDLE_S = 600.0
"""An episode that nobody has used for so long makes room for a new one, where there is none."""


class RequestError(VggtCacheError):
    """A request that cannot be done, with its HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(kw_only=True)
class _Open:
    """An episode that a client has begun."""

    episode: Episode
    used: float
    latest: bytes = b""
    """Digest of the frame seen last."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while one of its requests is worked on: an episode's frames come one after the other."""

    def in_use(self, now: float) -> bool:
        return self.lock.locked() or now - self.used < IDLE_S


@dataclass(kw_only=True)
class _Job:
    episode: Episode
    frame: Frame | None
    """None: it was seen before, and only the answer is asked for."""
    answer: Future[Answer] = field(default_factory=Future)


class Desk:
    """Its methods may be called from any thread; the model runs in one."""

    def __init__(
        self, navigator: Navigator, *, max_episodes: int = 8, max_steps: int = 500, batch_size: int = 1
    ) -> None:
        """batch_size: episodes that are waiting at the same time and are answered together."""
        self.max_episodes = max_episodes
        self.max_steps = max_steps
        self._navigator = navigator
        self._batch_size = batch_size
        self._open: dict[str, _Open] = {}
        self._changing = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def start(self, instruction: str) -> str:
        """The new episode's name. Raises RequestError where too many are open, SettingsError for the instruction."""
        episode = self._navigator.start(instruction)
        now = time.monotonic()
        with self._changing:
            if len(self._open) >= self.max_episodes:
                self._open = {name: one for name, one in self._open.items() if one.in_use(now)}
            if len(self._open) >= self.max_episodes:
                raise RequestError(
                    429,
                    f"{len(self._open)} episodes are open, which is the limit: end one (DELETE), or start the server "
                    "with a larger --max_episodes",
                )
            name = secrets.token_hex(8)
            self._open[name] = _Open(episode=episode, used=now)
        return name

    def end(self, name: str) -> None:
        """Forget an episode. Raises RequestError where there is none."""
        self._find(name)
        with self._changing:
            self._open.pop(name, None)

    def step(self, name: str, step: int, frame: Frame) -> Answer:
        """The answer to an episode's frame number `step`. Raises RequestError, FrameError."""
        found = self._find(name)
        digest = hashlib.sha256(frame if isinstance(frame, bytes) else frame.tobytes()).digest()
        with found.lock:
            found.used = time.monotonic()
            seen = len(found.episode.frames)
            is_again = step == seen - 1 and digest == found.latest
            if step != seen and not is_again:
                raise RequestError(
                    409,
                    f"step {step} was sent, and the episode's next step is {seen}: send its frames in order, each "
                    "once (the latest may be sent again, unchanged)",
                )
            if step >= self.max_steps:
                raise RequestError(
                    409, f"the episode has {seen} steps, which is the limit: end it, or raise --max_steps"
                )
            job = _Job(episode=found.episode, frame=None if is_again else frame)
            self._jobs.put(job)
            try:
                return job.answer.result()
            finally:
                if len(found.episode.frames) > seen:
                    found.latest = digest
                found.used = time.monotonic()

    def close(self) -> None:
        """End the thread, when it has answered what it is at."""
        self._jobs.put(None)
        self._thread.join()

    def _find(self, name: str) -> _Open:
        with self._changing:
            found = self._open.get(name)
        if found is None:
            raise RequestError(404, f"there is no episode {name[:40]!r}: it was ended, or never begun here")
        return found

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            while len(jobs) < self._batch_size and not self._jobs.empty():
                if (another := self._jobs.get()) is None:
                    self._jobs.put(None)
                    break
                jobs.append(another)
            self._answer([job for job in jobs if self._has_seen(job)])

    def _has_seen(self, job: _Job) -> bool:
        """Show it its frame; False where that failed, which its client is told."""
        try:
            if job.frame is not None:
                job.episode.see(job.frame)
        except Exception as error:  # whatever it was, the thread goes on, and the handler words it
            job.answer.set_exception(error)
            return False
        return True

    def _answer(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        try:
            answers = self._navigator.answer([job.episode for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:  # the fault of one is not the others'
                for job in jobs:
                    self._answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)
