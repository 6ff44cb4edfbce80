"""The command: `python -m janusvln.train --model_name_or_path ... --train_data_root ... --output_dir ...`

Started by itself, by torchrun, or by the scripts; on CPU (gloo) and CUDA (nccl), with and without DeepSpeed. Exit
codes are those of `vggt-cache`: 0 all is well, 2 a setting or path is wrong, 1 something else; and where the run was
told to stop, 143, or 130 after Ctrl-C.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from janusvln.data.dataset import sentence_of
from janusvln.train.arguments import parse_arguments
from janusvln.train.ranks import Ranks
from janusvln.train.run import TrainingRun
from janusvln.train.stop import EXIT_CODES, StopRequest
from vggt_cache.cluster.network import MEET_TIMEOUT_S, free_port, resolve, wait_for_node_0
from vggt_cache.environment import rank_of, seconds_of
from vggt_cache.errors import OutOfMemoryError, SettingsError, VggtCacheError
from vggt_cache.output import print_any_name
from vggt_cache.precompute.encode import is_out_of_memory

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
"""What a launcher tells its processes in numbers; torch, transformers and DeepSpeed read them."""

_LESS_MEMORY = (
    "give a smaller --per_device_train_batch_size (PER_DEVICE_BATCH_SIZE) and more --gradient_accumulation_steps, "
    "--gradient_checkpointing True, or an engine that takes less (DS_CONFIG=scripts/zero3.json, zero2_offload.json), "
    "and see whether others hold memory (nvidia-smi)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code. A known error is one sentence, on every rank that can still say it."""
    print_any_name()
    given = sys.argv[1:] if argv is None else list(argv)
    stop = StopRequest()
    with stop.listening():
        try:
            stop.ranks = Ranks(None, _launched_rank(), 1)
            _prepare_engine(given)
            arguments = parse_arguments(given)
            _join_engine(arguments[-1])
            stop.ranks = Ranks.of_this_run()
            exit_code = TrainingRun(arguments, stop.ranks, stop).run()
        except VggtCacheError as error:
            return stop.ranks.stop_all(sentence_of(error), error.exit_code)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sentence = f"memory has run out ({' '.join(str(error).split())[:200]}): {_LESS_MEMORY}"
            return stop.ranks.stop_all(sentence, OutOfMemoryError.exit_code)
        stop.ranks.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        return exit_code


def leave(exit_code: int) -> NoReturn:
    """End the process as Python would, except that the interpreter is not taken down.

    destroy_process_group() leaves gloo's threads running for as long as something refers to the group. A tensor
    that such a thread still holds is freed with the interpreter's lock, which a half torn down interpreter answers
    by ending the thread: C++ then aborts the process ("terminate called without an active exception"), and
    torchrun reports a finished run as failed (github.com/pytorch/pytorch/pull/179291). After an error there is
    a second reason: torch would wait five seconds for each worker of a loader that was left. Nor are exit handlers
    called then: one that wants to hear of the other ranks would wait for ever.

    Where another rank has ended sooner with an exit code of its own, torchrun sends SIGTERM, which must not cut this
    short, nor change what the run has come to.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if exit_code == 0 or exit_code in EXIT_CODES.values():
        atexit._run_exitfuncs()  # loggers of experiments finish there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _launched_rank() -> int:
    """This process's rank, 0 without a launcher. Raises SettingsError where one of `LAUNCHED` is no number.

    Empty ones are taken out of the environment: they say nothing, and those who read them later would not take them.
    """
    for name in LAUNCHED:
        rank_of(name, 0)
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    rank, world_size = rank_of("RANK", 0), rank_of("WORLD_SIZE", 1)
    if rank >= world_size:
        raise SettingsError(
            f"the environment's RANK is {rank} and WORLD_SIZE {world_size}, and ranks are 0 to WORLD_SIZE - 1: unset "
            "both for a process alone, or let a launcher set them"
        )
    if world_size > 1:
        _check_meeting_point(rank)
    return rank


def _check_meeting_point(rank: int) -> None:
    """Raises SettingsError where this process cannot meet the others; torch would wait for half an hour."""
    host, port = os.environ.get("MASTER_ADDR", "").strip(), rank_of("MASTER_PORT", 0)
    if not host or not 0 < port < 65536:
        raise SettingsError(
            f"the environment's WORLD_SIZE is more than 1, MASTER_ADDR {host or 'not set'} and MASTER_PORT "
            f"{port or 'not set'}, so the processes cannot meet: set both to where rank 0 runs and a free port there"
        )
    if rank:
        wait_for_node_0(host, port, patience_s=seconds_of("MEET_TIMEOUT_S", MEET_TIMEOUT_S))
    else:
        resolve(host)


def _prepare_engine(flags: Sequence[str]) -> None:
    """What must be set before the flags are parsed, since parsing them already asks for the engine."""
    # The published launchers' own flags, which transformers 5 will call otherwise one day.
    warnings.filterwarnings("ignore", r"`\w+` is deprecated and will be removed in v6", FutureWarning)
    if not any(flag.partition("=")[0] == "--deepspeed" for flag in flags):
        return
    if "WORLD_SIZE" not in os.environ:  # no launcher: DeepSpeed would look for MPI
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(free_port())})
    # DeepSpeed calls functions of torch by their old names, some of them in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("accelerate.accelerator").addFilter(_says_something)
    if not torch.cuda.is_available():
        import deepspeed.ops

        # Its shared-memory all-reduce, which only inference on a CPU uses: compiling it takes half a minute, and fails
        # where there is no C++ compiler.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _says_something(record: logging.LogRecord) -> bool:
    """Transformers accumulates itself, and so tells accelerate 1; accelerate reports that as a mismatch."""
    return "Gradient accumulation steps mismatch" not in record.getMessage()


def _join_engine(arguments: TrainingArguments) -> None:
    """Make the process group, where there are several processes or an engine."""
    device = arguments.device
    if arguments.deepspeed:
        import deepspeed

        # transformers leaves this out where --use_cpu is given; loading a model under ZeRO-3 needs it.
        if not deepspeed.comm.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
