"""Out of memory must halve the batch and change no feature, in whichever way memory ends.

    full    the device itself has no more than the weights and a little: also its libraries find none
    capped  torch's own allocator is told to stop there
    *_lists the same for causal lists, whose prefixes take memory too

Each gives the batch sizes that were gone down to, and the largest relative difference from features computed with
room enough. A CPU cannot be filled so: there an encoder that refuses more than two frames stands for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_steps.notes import Notes
from gpu_steps.setting import Setting, relative_difference
from vggt_cache.encoder import Encoder
from vggt_cache.precompute.encode import BatchEncoder

ROOM_BYTES = {"frames": 700_000_000, "lists": 3_000_000_000}
"""Beside the weights; a batch of 24 frames at 644 needs more."""
BATCH, WIDTH = 24, 644
Work = Callable[[BatchEncoder], list[tuple[int, torch.Tensor]]]


def run(setting: Setting, notes: Notes) -> None:
    encoder = setting.encoder()
    images = list(setting.images(70 if setting.dry else WIDTH, 4 if setting.dry else BATCH).numpy())
    lists = [[0, 1, last] for last in range(2, 4)] if setting.dry else prefixes()
    works: dict[str, Work] = {
        "frames": lambda batches: collected(batches.frames(images)),
        "lists": lambda batches: collected(batches.lists(lists, dict(enumerate(images)))),
    }
    # The full device comes first: only then are the libraries' own first allocations among what fails.
    ends: dict[str, Callable[[int], Callable[[], object]]] = {"full": filled, "capped": capped}
    if setting.dry:
        ends = {"refused": lambda room: refusing(encoder)}
    for end, begin in ends.items():
        for name, work in works.items():
            notes.measure(f"{end}_{name}", partial(halving, encoder, work, begin, ROOM_BYTES[name]))


def prefixes() -> list[list[int]]:
    """Lists that share beginnings of different lengths."""
    return [[0, 1, 2, middle, last] for middle in range(3, 9) for last in range(9, 13)]


def halving(
    encoder: Encoder, work: Work, begin: Callable[[int], Callable[[], object]], room_bytes: int
) -> dict[str, Any]:
    sizes: list[int] = []
    undo = begin(room_bytes)
    try:
        found = work(BatchEncoder(encoder, BATCH, sizes.append))
    finally:
        undo()
    reference = dict(work(BatchEncoder(encoder, 4, sizes.append)))
    differences = [relative_difference(feature, reference[position]) for position, feature in found]
    return {
        "halved_to": sizes,
        "features": len(found),
        "missing": len(reference) - len(found),
        "largest_difference": max(differences),
    }


def collected(encoded: Any) -> list[tuple[int, torch.Tensor]]:
    """Features in host memory, by their position in the request."""
    return [
        (position, feature)
        for part, batch in encoded
        for position, feature in zip(part, batch.cpu(), strict=True)
    ]


# ---------------------------------------------------------------- three ways in which memory ends


def filled(room_bytes: int) -> Callable[[], object]:
    """Hold all of the device's memory but `room_bytes`; returns what lets it go."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = [torch.empty(free - room_bytes, dtype=torch.uint8, device="cuda")]
    return lambda: (held.clear(), torch.cuda.empty_cache())


def capped(room_bytes: int) -> Callable[[], object]:
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + room_bytes) / total)
    return lambda: torch.cuda.set_per_process_memory_fraction(1.0)


def refusing(encoder: Encoder) -> Callable[[], object]:
    """The encoder takes two frames at most, and says for more what CUDA says."""
    patch_tokens = encoder.patch_tokens

    def at_most_two(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return patch_tokens(pixels)

    encoder.patch_tokens = at_most_two  # type: ignore[method-assign]
    return lambda: delattr(encoder, "patch_tokens")
