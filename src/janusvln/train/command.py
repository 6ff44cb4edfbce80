"""The command: `python -m janusvln.train --model_name_or_path ... --train_data_root ... --output_dir ...`

Started by itself, by torchrun, or by the scripts; on CPU (gloo) and CUDA (nccl). Exit codes are those of
`vggt-cache`: 0 all is well, 2 a setting or path is wrong, 1 something else.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch.distributed as dist

from janusvln.data.errors import sentence_of
from janusvln.train.arguments import parse_arguments
from janusvln.train.engine import join_engine, launched_rank, prepare_engine
from janusvln.train.ranks import Ranks
from janusvln.train.run import TrainingRun
from vggt_cache.errors import VggtCacheError
from vggt_cache.output import print_any_name


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code. A known error is one sentence, on every rank that can still say it."""
    print_any_name()
    given = sys.argv[1:] if argv is None else list(argv)
    ranks = Ranks(None, 0, 1)
    try:
        ranks = Ranks(None, launched_rank(), 1)
        prepare_engine(given)
        arguments = parse_arguments(given)
        join_engine(arguments[-1])
        ranks = Ranks.of_this_run()
        TrainingRun(arguments, ranks).run()
    except VggtCacheError as error:
        return ranks.stop_all(sentence_of(error), error.exit_code)
    ranks.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def leave(exit_code: int) -> NoReturn:
    """End the process as Python would, except that the interpreter is not taken down.

    destroy_process_group() leaves gloo's threads running for as long as something refers to the group. A tensor
    that such a thread still holds is freed with the interpreter's lock, which a half torn down interpreter answers
    by ending the thread: C++ then aborts the process ("terminate called without an active exception"), and
    torchrun reports a finished run as failed (github.com/pytorch/pytorch/pull/179291). After an error there is
    a second reason: torch would wait five seconds for each worker of a loader that was left. Nor are exit handlers
    called then: one that wants to hear of the other ranks would wait for ever.
    """
    if exit_code == 0:
        atexit._run_exitfuncs()  # loggers of experiments finish there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
