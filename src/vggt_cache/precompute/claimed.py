"""One process's share of the work, by claims: it needs no service, and any number of processes may come and go.

claimed block ──> pipeline ──> committed shard, claim given back
(at most two ahead)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vggt_cache.codec import NONE
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.decode import DecodePool
from vggt_cache.precompute.encode import BatchEncoder
from vggt_cache.precompute.pipeline import Decoding, Outcome, Pipeline, Tally
from vggt_cache.precompute.plan import Block, Task
from vggt_cache.precompute.report import Reporter, count_of, seconds_text
from vggt_cache.precompute.settings import QwenLimits
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import Stored
from vggt_cache.precompute.todo import Todo
from vggt_cache.store.directory import CLAIMS_FOLDER
from vggt_cache.store.writer import shard_bytes


@dataclass(kw_only=True)
class ClaimedRun:
    """One process's part in filling a store: takes blocks, which other processes may take too, and an encoder."""

    stored: Stored
    reporter: Reporter
    stop: StopRequest
    num_workers: int
    codec: str = NONE
    limits: QwenLimits | None = None

    def __post_init__(self) -> None:
        self.known, self.plan = self.stored.known, self.stored.known.plan
        self._tally = Tally()
        """For the committing thread, until that has ended."""
        self._found = 0
        """Features that turned out to be stored before they were decoded."""
        self._in_hand: dict[str, Task] = {}
        self._pipeline: Pipeline | None = None
        self._waiting_said = False

    def compute(self, blocks: Sequence[Block], encoder: BatchEncoder) -> Tally:
        """Returns when every feature of the blocks is stored or lost, or when asked to stop; all is committed then.

        Raises VggtCacheError; what was committed until then stays committed.
        """
        spec = self.stored.cache.spec
        store_dir = os.path.join(self.stored.cache.cache_dir, spec.short_name)
        total = sum(len(block.features) for block in blocks)
        with (
            DecodePool(self.num_workers, spec.preprocessing) as decoder,
            self.reporter.bar(total, spec.context_rule.noun) as self._bar,
            Claims(os.path.join(store_dir, CLAIMS_FOLDER), on_silence=self._tell_silence) as self._claims,
            self.stop.deferred(),
        ):
            self._todo = Todo(
                blocks, self._claims, self.stored, place=self._place(), on_finished=self._found_elsewhere
            )
            with Pipeline(
                stored=self.stored,
                encoder=encoder,
                submit=lambda frame, path: self.plan.frames.submit(frame, decoder),
                store_dir=store_dir,
                shard_bytes=shard_bytes(),
                reporter=self.reporter,
                stop=self.stop,
                codec=self.codec,
                limits=self.limits,
                on_outcome=self._done,
                on_read=self.known.learn,
                on_written=self._written,
                on_progress=self._claims.progressed,
            ) as pipeline:
                self._pipeline = pipeline
                self._go_through(pipeline)
        self.stored.cache.refresh()
        self.stored.cache.save_index()
        self._tally.elsewhere += self._found
        return self._tally

    def _place(self) -> float | None:
        """Where to begin among the blocks: each rank elsewhere; None, by chance, where no launcher counts them."""
        return self.reporter.rank / self.reporter.world_size if self.reporter.world_size > 1 else None

    def _go_through(self, pipeline: Pipeline) -> None:
        opened: deque[tuple[Task, Decoding]] = deque()
        while (len(self._todo) or opened) and not self.stop.requested:
            while len(opened) < self._todo.ahead and (block := self._todo.take()) is not None:
                task = self._in_hand[block.block_id] = self.plan.task_of(block)
                opened.append((task, pipeline.begin(task)))
            if opened:
                pipeline.compute(*opened.popleft())
            elif len(self._todo):
                self._wait_for_others(pipeline)

    def _wait_for_others(self, pipeline: Pipeline) -> None:
        """All that is left is claimed by other processes, which may in turn wait for what is held here."""
        pipeline.flush()
        self._claims.progressed()  # nothing is held now, so waiting for others is no hang
        if not self._todo.wait():
            return
        if not self._waiting_said:
            self._waiting_said = True
            blocks = count_of(len(self._todo), "block")
            self.reporter.info(f"Waiting for {blocks} that other processes are computing")
        self.stop.wait(self._todo.pause_s)

    def _found_elsewhere(self, features: int) -> None:
        self._found += features
        self._shorten(features)

    def _shorten(self, features: int) -> None:
        self._bar.total = (self._bar.total or 0) - features  # drawn with the next feature that is written

    def _written(self, features: int) -> None:  # in the writing thread
        self._bar.update(features)
        self._claims.progressed()

    def _done(self, outcome: Outcome) -> None:  # in the committing thread
        """A block is on disk: note what was found out first, then tell of it, so that others find all done."""
        task = self._in_hand.pop(outcome.block_id)
        self.known.table.append(outcome.rows)
        self.stored.same.note(outcome.same)
        shows = not outcome.lost and all(map(self.stored.shows_others, task.features))
        self._todo.done(outcome.block_id, shows=shows)
        self._tally.add(outcome)
        self._shorten(outcome.elsewhere + len(outcome.lost))

    def _tell_silence(self, seconds: float) -> None:
        """Nothing was decoded, encoded or written for so long. The run goes on waiting: a mount may come back."""
        waits_for = self._pipeline.waits_for if self._pipeline else "the first block"
        self.reporter.warn(
            f"nothing has moved for {seconds_text(seconds)}, waiting for {waits_for}: other processes "
            f"may take over what this one has claimed; check its disk and device; kill -9 {os.getpid()} ends this run "
            "where another signal does not, and loses nothing that is committed"
        )
