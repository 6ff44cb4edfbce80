"""`python -m vggt_cache.cluster.torchrun`: torchrun, with the trainer's own exit code.

Its flags are torchrun's. What the trainer has said stays the last word: torchrun's report of a process that has ended,
and its traceback, tell nothing that the trainer's own sentence does not. Only where a process could say nothing any
more, this does.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed import DistError  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from vggt_cache.cluster.network import MEET_TIMEOUT_S, wait_for_node_0
from vggt_cache.environment import seconds_of
from vggt_cache.errors import VggtCacheError
from vggt_cache.output import print_line

_HINTS = {
    signal.SIGKILL: "the system does this where memory runs out (dmesg has it)",
    signal.SIGSEGV: "a fault in a library or a driver",
    signal.SIGBUS: "shared memory may be full (df /dev/shm)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run until all processes of this node have ended; returns the exit code of the one that failed first."""
    given = parse_args(argv)  # type: ignore[no-untyped-call]
    logging.disable(logging.ERROR)  # of this process alone, which only starts others
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torchrun takes it: there is nothing to clean up yet
    try:
        patience_s = seconds_of("MEET_TIMEOUT_S", MEET_TIMEOUT_S)
        if given.node_rank > 0:
            wait_for_node_0(given.master_addr, given.master_port, patience_s=patience_s)
        given.rdzv_conf = f"timeout={patience_s:.0f}"
        run(given)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return _report(error)
    except SignalException as error:
        return 128 + error.sigval
    except VggtCacheError as error:
        print_line("ERROR", str(error), sys.stderr)
        return error.exit_code
    except DistError as error:
        reason = str(error).splitlines()[0][:200]
        where = f"{given.master_addr}:{given.master_port}"
        sentence = f"the {given.nnodes} nodes did not meet at {where} ({reason}): see what each of them says"
        print_line("ERROR", sentence, sys.stderr)
        return 1
    return 0


def _report(error: ChildFailedError) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode
    number = signal.Signals(-failure.exitcode)
    hint = _HINTS.get(number, "it was told to end from outside")
    print_line("ERROR", f"rank {rank} was ended by {number.name} and could not say why: {hint}", sys.stderr)
    return 128 + number


if __name__ == "__main__":
    sys.exit(main())
