"""DeepSpeed's start, with or without a launcher, with or without a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from transformers import TrainingArguments

from vggt_cache.cluster.network import free_port
from vggt_cache.environment import rank_of

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
"""What a launcher tells its processes in numbers; torch, transformers and DeepSpeed read them."""


def launched_rank() -> int:
    """This process's rank, 0 without a launcher. Raises SettingsError where one of `LAUNCHED` is no number.

    Empty ones are taken out of the environment: they say nothing, and those who read them later would not take them.
    """
    for name in LAUNCHED:
        rank_of(name, 0)
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    return rank_of("RANK", 0)


def prepare_engine(flags: Sequence[str]) -> None:
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
    if not torch.cuda.is_available():
        _skip_compiled_operations()


def join_engine(arguments: TrainingArguments) -> None:
    """Make the process group, where there are several processes or an engine."""
    _ = arguments.device
    if arguments.deepspeed:
        import deepspeed

        # transformers leaves this out where --use_cpu is given; loading a model under ZeRO-3 needs it.
        if not deepspeed.comm.is_initialized():
            backend = "nccl" if arguments.device.type == "cuda" else "gloo"
            deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _skip_compiled_operations() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce, which only inference on a CPU uses.

    The compilation takes half a minute, and fails where there is no C++ compiler.
    """
    import deepspeed.ops

    operations = getattr(deepspeed.ops, "__compatible_ops__", None)
    if operations is not None:
        operations["deepspeed_shm_comm"] = False
