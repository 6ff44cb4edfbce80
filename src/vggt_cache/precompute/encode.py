"""From decoded frames to features, in batches that fit the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from vggt_cache.encoder import Encoder
from vggt_cache.encoder.causal import encode_lists
from vggt_cache.errors import OutOfMemoryError
from vggt_cache.store.tensors import TORCH_DTYPES

Pixels = npt.NDArray[np.uint8]
Encoded = tuple[Sequence[int], torch.Tensor]
"""Positions in the request, and their features [len, ...] (FeatureSpec.shape) on the encoder's device."""


class BatchEncoder:
    """Runs the encoder over any number of frames or lists. Out of memory halves `batch_size`, for good."""

    def __init__(
        self,
        encoder: Encoder,
        batch_size: int,
        on_halved: Callable[[int], object] = lambda batch_size: None,
        *,
        feature_dtype: str = "float32",
    ) -> None:
        self.encoder, self.device = encoder, encoder.device
        self.batch_size = batch_size
        self._on_halved = on_halved
        self._dtype = TORCH_DTYPES[feature_dtype]

    def frames(self, pixels: Sequence[Pixels]) -> Iterator[Encoded]:
        """Features of single images, each seen alone. Images of one shape share batches."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(pixels):
            shapes.setdefault(image.shape, []).append(position)
        for positions in shapes.values():
            yield from self._until_done(positions, lambda rest: self._frame_batches(pixels, rest))

    def lists(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> Iterator[Encoded]:
        """Features of ordered frame lists, prefixes shared. All frames of a list must have one shape."""
        yield from self._until_done(range(len(lists)), lambda rest: self._list_batches(lists, pixels, rest))

    def joint_lists(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> Iterator[Encoded]:
        """Features of lists whose frames all see each other. Lists of as many frames of one shape share batches."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for position, frames in enumerate(lists):
            shapes.setdefault((len(frames), *pixels[frames[0]].shape), []).append(position)
        for (frames_each, *_), positions in shapes.items():
            yield from self._until_done(
                positions, lambda rest: self._joint_batches(lists, pixels, rest), least=frames_each
            )

    def _frame_batches(self, pixels: Sequence[Pixels], positions: Sequence[int]) -> Iterator[Encoded]:
        for part in even_parts(positions, self.batch_size):
            batch = self._on_device([pixels[position] for position in part])
            yield part, self.encoder.frame_features(batch).to(self._dtype)

    def _joint_batches(
        self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels], positions: Sequence[int]
    ) -> Iterator[Encoded]:
        """`batch_size` counts frames; a frame that several lists of a batch have goes through the tower once."""
        for part in even_parts(positions, max(1, self.batch_size // len(lists[positions[0]]))):
            frames = [frame for position in part for frame in lists[position]]
            places = {frame: place for place, frame in enumerate(dict.fromkeys(frames))}
            tokens = self.encoder.patch_tokens(self._on_device([pixels[frame] for frame in places]))
            together = torch.stack([tokens[places[frame]] for frame in frames])
            joint = self.encoder.joint_features(together.view(len(part), -1, *tokens.shape[1:]))
            yield part, joint.to(self._dtype)

    def _on_device(self, pixels: Sequence[Pixels]) -> torch.Tensor:
        batch = torch.from_numpy(np.stack(pixels))
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def _list_batches(
        self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels], positions: Sequence[int]
    ) -> Iterator[Encoded]:
        """Features come one by one, and are handed over in batches of one shape, as the next step wants them."""
        waiting: list[tuple[int, torch.Tensor]] = []

        def joined() -> Encoded:
            batch = torch.stack([feature for _, feature in waiting]).to(self._dtype)
            return [position for position, _ in waiting], batch

        for index, feature in encode_lists(
            self.encoder,
            [lists[position] for position in positions],
            lambda frame: torch.from_numpy(pixels[cast(int, frame)]),
            batch_size=self.batch_size,
        ):
            if waiting and (len(waiting) == self.batch_size or waiting[0][1].shape != feature.shape):
                yield joined()
                waiting.clear()
            waiting.append((positions[index], feature))
        if waiting:
            yield joined()

    def _until_done(
        self,
        positions: Sequence[int],
        batches: Callable[[Sequence[int]], Iterator[Encoded]],
        *,
        least: int = 1,
    ) -> Iterator[Encoded]:
        """Go through `batches`; when the device is full, halve the batch and go on with what is left.

        `least`: how many frames go together in any case.
        """
        left = list(positions)
        while left:
            try:
                for part, features in batches(left):
                    done = set(part)
                    left = [position for position in left if position not in done]
                    yield part, features
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if self.batch_size <= least:
                raise out_of_memory(
                    self.device, "a batch of one frame" if least == 1 else f"one list of {least} frames"
                )
            self.batch_size //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._on_halved(self.batch_size)


_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory"  # the CPU's allocator
    r"|(CUDA|HIP)( driver)? error: out of memory|\[CUDA\]: out of memory"  # said by torch, by Triton
    r"|CUDA_ERROR_OUT_OF_MEMORY"
    r"|(CUBLAS|CUDNN|CUSOLVER)_STATUS_\w*ALLOC\w*_FAILED"  # what a library wanted for itself
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error type, or what else runs out of memory beside its allocator, and says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def out_of_memory(device: object, what: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{device} is out of memory with {what}: other processes may hold its memory (see nvidia-smi); free it, "
        "use a smaller --image_size, or another --device"
    )


def even_parts(positions: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of at most `size`, as equal as possible: no straggling batch of one."""
    count = -(-len(positions) // size)
    for part in range(count):
        yield positions[len(positions) * part // count : len(positions) * (part + 1) // count]
