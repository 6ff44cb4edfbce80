"""DataLoader workers send batches through shared memory: is there room, and what becomes of a worker that cannot send.

torch's queue sends in a thread of the worker. An error there is printed, the batch is lost, and the training process
waits for it for ever; or the kernel kills a worker that writes where no room is left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import NoReturn

import torch
from transformers import TrainingArguments

from janusvln.data.dataset import NavigationDataset
from vggt_cache.environment import rank_of
from vggt_cache.errors import DataError, SettingsError
from vggt_cache.precompute.report import bytes_text

SHARED_MEMORY = "/dev/shm"
_AHEAD = 2
"""Batches that each worker makes ahead, where no flag says otherwise."""


def check_shared_memory(dataset: NavigationDataset, arguments: TrainingArguments) -> None:
    """Raises SettingsError where this node's workers could fill its shared memory. One process of a node asks."""
    workers = arguments.dataloader_num_workers
    room = _room()
    if not workers or room is None or rank_of("LOCAL_RANK", 0):
        return
    processes, ahead = rank_of("LOCAL_WORLD_SIZE", 1), arguments.dataloader_prefetch_factor or _AHEAD
    batch = arguments.per_device_train_batch_size * _largest_bytes(dataset)
    need = processes * (workers * ahead + 1) * batch
    if need > room[0]:
        size = f"{-(-2 * need // 2**30)}g"
        raise SettingsError(
            f"{SHARED_MEMORY} has {bytes_text(room[0])} free, and {processes} x {workers} workers that are {ahead} "
            f"batches of {bytes_text(batch)} ahead can need {bytes_text(need)}, so that batches could not be sent: "
            f"give it more (docker run --shm-size={size}, or --ipc=host), or take fewer --dataloader_num_workers "
            "(NUM_WORKERS)"
        )


def end_where_it_cannot_send() -> None:
    """In a worker, when it begins: the process ends where torch would lose a batch."""
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: BaseException, batch: object) -> NoReturn:
    sys.stderr.write(
        f"[WARN] a batch cannot be sent to the training process: {' '.join(str(error).split())}\n"
    )
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Raises DataError in place of torch's RuntimeError where a worker has ended."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        room = _room()
        left = f" ({SHARED_MEMORY} has {bytes_text(room[0])} of {bytes_text(room[1])} free)" if room else ""
        raise DataError(
            f"a process that reads samples has ended, out of shared memory{left} or of memory, or killed "
            f"({' '.join(str(error).split())[:120]}): give it more (docker run --shm-size), or take fewer "
            "--dataloader_num_workers (NUM_WORKERS)"
        ) from error


def _largest_bytes(dataset: NavigationDataset) -> int:
    """Of a sample with the most frames, as it is sent."""
    counts = dataset.index.frame_counts
    item = dataset[max(range(len(counts)), key=counts.__getitem__)]
    tensors = [value for value in item.values() if isinstance(value, torch.Tensor)]
    if "feature_request" in item:
        tensors.append(item["feature_request"].frames)
    return sum(tensor.nbytes for tensor in tensors)


def _room() -> tuple[int, int] | None:
    """Free and all bytes; None where there is no such place."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
