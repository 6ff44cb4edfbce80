"""The command: `python -m qwen_vl.train.train_vln --model_name_or_path ... --train_data_root ... --output_dir ...`

Started by itself, by torchrun, or by the scripts; on CPU (gloo) and CUDA (nccl). Exit codes are those of
`vggt-cache`: 0 all is well, 2 a setting or path is wrong, 1 something else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch.distributed as dist

from qwen_vl.train.arguments import parse_arguments
from qwen_vl.train.ranks import Ranks
from qwen_vl.train.run import TrainingRun
from vggt_cache.errors import VggtCacheError


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code. A known error is one sentence, on every rank that can still say it."""
    given = sys.argv[1:] if argv is None else list(argv)
    ranks = Ranks(None, int(os.environ.get("RANK", "0") or 0), 1)
    try:
        if "--deepspeed" in given or any(flag.startswith("--deepspeed=") for flag in given):
            _skip_compiled_operations()
        arguments = parse_arguments(given)
        _ = arguments[-1].device  # makes the process group, where there are several processes
        ranks = Ranks.of_this_run()
        TrainingRun(arguments, ranks).run()
    except VggtCacheError as error:
        return ranks.stop_all(error)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _skip_compiled_operations() -> None:
    """Without a GPU, keep DeepSpeed from compiling its shared-memory all-reduce, which only inference uses.

    The compilation takes half a minute, and fails where there is no C++ compiler.
    """
    import deepspeed.ops
    import torch

    operations = getattr(deepspeed.ops, "__compatible_ops__", None)
    if operations is not None and not torch.cuda.is_available():
        operations["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    sys.exit(main())
