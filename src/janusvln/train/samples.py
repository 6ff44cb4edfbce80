"""Which samples a run trains on: settled before its first step, by rank 0, and the same in all processes.

Rank 0 looks at all samples and tells the others through the launcher's store, where they wait without a collective;
should it fail, they hear that too. The list of those that are left out belongs to the run: a resumed run has it from
`skipped_samples.jsonl` in its output directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from janusvln.data.check import SampleCheck
from janusvln.data.dataset import NavigationDataset, sentence_of
from janusvln.features.coverage import READING_S, Coverage, measure_coverage
from janusvln.train.ranks import Ranks
from vggt_cache.errors import DataError, StoreError, errors_as, os_errors_as
from vggt_cache.output import json_line
from vggt_cache.precompute.report import standing_failures
from vggt_cache.samples import Problem, Sources, iter_samples
from vggt_cache.staging import shortfall_of
from vggt_cache.store import FeatureCache
from vggt_cache.store.staged import StagedRecords

SKIPPED_FILE = "skipped_samples.jsonl"
BAD_SAMPLES = ("stop", "skip")
_MAX_TOLD = 10

Say = Callable[[str, str], None]
"""A sentence, and its level."""


class Settled(NamedTuple):
    """What rank 0 has found."""

    skipped: Sequence[int]
    """Numbers of samples that are left out."""
    missing: int
    """Features that are known not to be in the cache."""
    unknown: int
    """Features of which that is not known."""


def settle_samples(desk: SampleDesk, ranks: Ranks) -> Settled:
    """The same on every rank. Raises DataError where the run cannot come to its end."""
    answer = json.dumps(desk.settle()) if ranks.rank == 0 else ""
    return Settled(*json.loads(ranks.exchange("settled samples", answer)[0]))


@dataclass(kw_only=True)
class SampleDesk:
    """All that the samples of a run are judged by. Rank 0 looks at them."""

    dataset: NavigationDataset
    """Of all samples that could be read."""
    problems: Sequence[Problem]
    """The others."""
    sources: Sources
    cache: FeatureCache | None
    miss: str
    skip: bool
    output_dir: str
    resumed: bool
    say: Say

    def __post_init__(self) -> None:
        self.coverage = Coverage(total=0, present=0, unknown=0)
        self.unfit: dict[int, str] = {}

    def settle(self) -> Settled:
        kept_out = listed_samples(self.output_dir) if self.resumed else []
        self._look(kept_out)
        skipped = self._skipped(kept_out)
        self._tell_absent()
        return Settled(skipped, self.coverage.missing, self.coverage.unknown)

    def _look(self, left_out: Sequence[int]) -> None:
        count = len(self.dataset)
        samples = islice(iter_samples(self.sources, on_problem=lambda problem: None), count)
        check = SampleCheck(
            samples,
            self.sources.root,
            self.dataset,
            left_out=left_out,
            on_progress=lambda done: self.say(f"Checked {done} of {count} samples", "INFO"),
        )
        if check.count != count:
            raise DataError(
                f"{check.count} samples are read now and {count} were a moment ago, so the data is being changed: "
                "start again when it is complete"
            )
        cache = self.cache
        check.open_suspects({path for _, path in standing_failures(cache.cache_dir)} if cache else ())
        if cache is not None:
            self.coverage = measure_coverage(
                check.plan,
                cache,
                grids=check.grids,
                bad_frames=check.bad_frames,
                say=lambda text: self.say(text, "INFO"),
            )
            self.say(self.coverage.sentence(cache.spec.context_rule.noun), "INFO")
            if cache.staged is not None:
                self._tell_staged(cache, cache.staged.records)
        check.judge_frames()
        long, self.unfit = check.judge_lengths(), check.unfit
        self._make(long)

    def _tell_staged(self, cache: FeatureCache, local: StagedRecords | None) -> None:
        """Of this machine; what cannot be asked of its disk was told, or will be when it is written to."""
        with suppress(StoreError):
            if local is not None:
                self.say(f"{len(local)} features are staged in {local.staging.path}", "INFO")
                if shortfall := shortfall_of(cache, local, self.coverage.present):
                    self.say(shortfall, "WARN")

    def _make(self, samples: Sequence[int]) -> None:
        """As a step would, for the images whose sizes nobody knows: as many as the start of a run has time for."""
        until_s = time.monotonic() + READING_S
        for number, at in enumerate(samples):
            if time.monotonic() > until_s:
                self.say(
                    f"{len(samples) - number} samples could be over --model_max_length, and the sizes of their images "
                    "are not known yet: should one be, this run ends there; give more, or precompute them",
                    "WARN",
                )
                return
            try:
                self.dataset[at]
            except DataError as error:
                self.unfit[at] = self._reason(at, sentence_of(error))

    def _tell_absent(self) -> None:
        """Features that are not in the cache. Raises DataError where none may be missing."""
        cache, found, miss = self.cache, self.coverage, self.miss
        if cache is None:
            return
        if miss == "error" and found.missing:
            raise DataError(
                f"{found.missing} of the {found.total} features that this data needs are not in {cache.cache_dir}, "
                "and --vggt_cache_miss is error: precompute them, or train with --vggt_cache_miss encode"
            )
        if miss != "error" and (cost := found.cost(cache.spec.context_rule.noun, filled=miss == "fill")):
            self.say(cost, "WARN")

    def _reason(self, at: int, sentence: str) -> str:
        return sentence.removeprefix(f"the sample {self._source(at)} ")

    def _source(self, at: int) -> str:
        return self.dataset.index[at].source

    def _place(self, at: int) -> str:
        """The same from the data's root on, which may lie elsewhere when a run is resumed."""
        return os.path.relpath(self._source(at), self.sources.root)

    # ------------------------------------------------------------ what is done about it

    def _skipped(self, kept_out: Sequence[int]) -> list[int]:
        """The samples that are left out. Raises DataError."""
        list_file, fresh = Path(self.output_dir) / SKIPPED_FILE, dict(sorted(self.unfit.items()))
        if (fresh and self.resumed) or ((fresh or self.problems) and not self.skip):
            raise self._refusal(fresh, resumed=self.resumed)
        skipped = sorted({*kept_out, *fresh})
        if len(skipped) == len(self.dataset):
            raise self._refusal(fresh, resumed=False)
        if not self.resumed:
            self._write(list_file, fresh)
        if skipped:
            self._tell(fresh)
            self.say(
                f"{len(skipped)} of {len(self.dataset)} samples are left out, in this run and whenever it is resumed; "
                f"they are listed in {list_file}",
                "WARN",
            )
        return skipped

    def _refusal(self, unfit: dict[int, str], *, resumed: bool) -> DataError:
        self._tell(unfit)
        problems = self.problems
        bad, all_samples = len(unfit) + len(problems), len(self.dataset) + len(problems)
        first = f"{problems[0].where} {problems[0].reason}" if problems else ""
        first = first or next(f"{self._source(at)} {reason}" for at, reason in unfit.items())
        todo = "correct or remove them, or leave them out with --bad_samples skip"
        if resumed and unfit:
            todo = "mend them, since a run that is resumed goes on with the samples it began with"
        return DataError(
            f"{bad} of the {all_samples} samples cannot be trained on, and training would end at them or go on without "
            f"them ({first}): {todo}"
        )

    def _tell(self, unfit: dict[int, str]) -> None:
        for at, reason in islice(unfit.items(), _MAX_TOLD):
            self.say(f"{self._source(at)} {reason}", "WARN")
        if len(unfit) > _MAX_TOLD:
            self.say(f"{len(unfit) - _MAX_TOLD} more samples cannot be trained on", "WARN")

    def _write(self, path: Path, unfit: dict[int, str]) -> None:
        entries = (
            {"number": at, "sample": self._place(at), "reason": reason} for at, reason in unfit.items()
        )
        remedy = (
            ", and it is to say which samples the run leaves out: give an --output_dir that can be written to"
        )
        with os_errors_as(DataError, f"{path} cannot be written", remedy):
            path.unlink(missing_ok=True)
            if unfit:
                path.parent.mkdir(parents=True, exist_ok=True)
                new = path.with_suffix(".tmp")  # whoever is killed here leaves no half of a list
                new.write_bytes(b"".join(map(json_line, entries)))
                new.replace(path)


def listed_samples(output_dir: str) -> list[int]:
    """The numbers of the samples that the run of this directory left out when it began. Raises DataError."""
    path = Path(output_dir) / SKIPPED_FILE
    rest = ", and it says which samples this run leaves out: give it back, or start anew in an empty --output_dir"
    with errors_as(DataError, f"{path} cannot be read", rest, OSError, ValueError, KeyError, TypeError):
        lines = path.read_bytes().splitlines() if path.exists() else []
        return sorted(int(json.loads(line)["number"]) for line in lines)


def skipped_text(numbers: Sequence[int]) -> str:
    """For people, and to compare."""
    if not numbers:
        return "no samples"
    digest = hashlib.sha256(json.dumps(list(numbers)).encode()).hexdigest()
    return f"{len(numbers)} sample{'s' if len(numbers) > 1 else ''} (digest {digest[:16]})"
