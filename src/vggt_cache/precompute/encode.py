"""From decoded frames to features, in batches that fit the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch

from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.encoder.causal import encode_lists
from vggt_cache.errors import OutOfMemoryError
from vggt_cache.identity import FeatureSpec
from vggt_cache.pixels import Pixels
from vggt_cache.precompute.report import Reporter
from vggt_cache.store.tensors import TORCH_DTYPES

Encoded = tuple[Sequence[int], torch.Tensor]
"""Positions in the request, and their features [len, ...] (FeatureSpec.shape) on the encoder's device."""


def load_encoder(
    checkpoint: Checkpoint, spec: FeatureSpec, device: str, batch_size: int, reporter: Reporter
) -> BatchEncoder:
    """For one process of a run. Raises CheckpointError, and OutOfMemoryError where the weights do not fit."""
    try:
        encoder = checkpoint.load(
            device=device, compute_dtype=spec.encoder.compute_dtype, tokens=spec.tokens, pool=spec.pool
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(device, "the encoder's weights alone") from error
        raise
    reporter.info("Model loaded successfully")
    return BatchEncoder(
        encoder,
        batch_size,
        lambda size: reporter.warn(f"out of memory: going on with --batch_size {size}"),
        feature_dtype=spec.feature_dtype,
        leave_out=True,
    )


class BatchEncoder:
    """Runs the encoder over any number of frames or lists.

    Out of memory halves `batch_size`. With `leave_out` it is doubled again, step by step, after requests that went
    well; each time that this fails at once, twice as many of them are waited for.
    """

    def __init__(
        self,
        encoder: Encoder,
        batch_size: int,
        on_halved: Callable[[int], object] = lambda batch_size: None,
        *,
        feature_dtype: str = "float32",
        leave_out: bool = False,
    ) -> None:
        """`leave_out`: what does not fit into memory even alone is listed in `too_large`, and raises nothing."""
        self.encoder, self.device = encoder, encoder.device
        self.batch_size = batch_size
        self.too_large: list[int] = []
        """Positions in the latest request whose features were not computed."""
        self._leave_out = leave_out
        self._smallest: Pixels | None = None
        """Of all frames so far: what fits if anything does."""
        self._reduced_from: list[int] = []
        """The batch sizes before each halving that holds."""
        self._good_requests, self._patience, self._trying = 0, 1, False
        self._on_halved = on_halved
        self._dtype = TORCH_DTYPES[feature_dtype]

    def frames(self, pixels: Sequence[Pixels]) -> Iterator[Encoded]:
        """Features of single images, each seen alone. Images of one shape share batches."""
        self._begin(pixels)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(pixels):
            shapes.setdefault(image.shape, []).append(position)
        for positions in shapes.values():
            yield from self._until_done(
                positions, lambda rest: self._frame_batches(pixels, rest), pixels.__getitem__
            )

    def lists(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> Iterator[Encoded]:
        """Features of ordered frame lists, prefixes shared. All frames of a list must have one shape."""
        self._begin(pixels.values())
        longest_first = sorted(range(len(lists)), key=lambda position: -len(lists[position]))
        yield from self._until_done(
            longest_first,
            lambda rest: self._list_batches(lists, pixels, sorted(rest)),
            partial(_only_frame, lists, pixels),
        )

    def joint_lists(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> Iterator[Encoded]:
        """Features of lists whose frames all see each other. Lists of as many frames of one shape share batches."""
        self._begin(pixels.values())
        shapes: dict[tuple[int, ...], list[int]] = {}
        for position, frames in enumerate(lists):
            shapes.setdefault((len(frames), *pixels[frames[0]].shape), []).append(position)
        for (frames_each, *_), positions in shapes.items():
            yield from self._until_done(
                positions,
                lambda rest: self._joint_batches(lists, pixels, rest),
                partial(_only_frame, lists, pixels),
                least=frames_each,
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

    def _begin(self, pixels: Iterable[Pixels]) -> None:
        """A new request: the batch may grow again where the last ones went well."""
        self.too_large = []
        frames = [*pixels] if self._smallest is None else [self._smallest, *pixels]
        self._smallest = min(frames, key=lambda frame: frame.size, default=None)
        self._trying = self._leave_out and bool(self._reduced_from) and self._good_requests >= self._patience
        if self._trying:
            self.batch_size, self._good_requests = self._reduced_from.pop(), 0
        self._good_requests += 1

    def _until_done(
        self,
        positions: Sequence[int],
        batches: Callable[[Sequence[int]], Iterator[Encoded]],
        only_frame: Callable[[int], Pixels | None],
        *,
        least: int = 1,
    ) -> Iterator[Encoded]:
        """Go through `batches`; when the device is full, halve the batch and go on with what is left.

        Where even the smallest batch is too much, the first of `positions` that is left costs itself alone. `least`:
        how many frames go together in any case. `only_frame`: of a position that is a single frame.
        """
        left, reduced_before = list(positions), list(self._reduced_from)
        whole = self.batch_size
        while left:
            try:
                for part, features in batches(left):
                    done = set(part)
                    left = [position for position in left if position not in done]
                    yield part, features
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.batch_size > least:
                self._halve()
                continue
            if not self._leave_out or not self._has_room_beside(only_frame(left[0])):
                raise out_of_memory(
                    self.device, "a batch of one frame" if least == 1 else f"one list of {least} frames"
                )
            self.too_large.append(left.pop(0))
            self.batch_size, self._reduced_from = whole, reduced_before  # it was not the batch

    def _halve(self) -> None:
        if self._trying:
            self._patience *= 2
            self._trying = False
        self._reduced_from.append(self.batch_size)
        self._good_requests = 0
        self.batch_size //= 2
        self._on_halved(self.batch_size)

    def _has_room_beside(self, frame: Pixels | None) -> bool:
        """Whether the device, which is too small for this frame, or (None) for a list of several, takes any at all."""
        assert self._smallest is not None
        if frame is not None and frame.size <= self._smallest.size:
            return False
        try:
            self.encoder.frame_features(torch.from_numpy(self._smallest[None]).to(self.device))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return False
            raise
        return True


def of_one_dtype(pixels: Mapping[int, Pixels]) -> Mapping[int, Pixels]:
    """Frames that may share batches: where some are floats, uint8 ones become the floats that mean the same."""
    if len({one.dtype for one in pixels.values()}) < 2:
        return pixels
    return {
        frame: one if one.dtype == np.float32 else one.astype(np.float32) / np.float32(255)
        for frame, one in pixels.items()
    }


def _only_frame(lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels], position: int) -> Pixels | None:
    return pixels[lists[position][0]] if len(lists[position]) == 1 else None


_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory"  # the CPU's allocator
    r"|(CUDA|HIP)( driver)? error: out of memory|\[CUDA\]: out of memory"  # said by torch, by Triton
    r"|CUDA_ERROR_OUT_OF_MEMORY"
    r"|(CUBLAS|CUDNN|CUSOLVER)_STATUS_\w*ALLOC\w*_FAILED"  # what a library wanted for itself
)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """torch's own error type, or what else runs out of memory beside its allocator, and says so in words only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(_OUT_OF_MEMORY.search(str(error)))


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
