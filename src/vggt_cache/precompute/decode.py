"""Worker processes that turn image files into pixels while the encoder runs.

A worker reads a file once and returns the digest of those bytes together with the pixels decoded from the same bytes.
It imports neither torch nor the encoder. A worker that dies (killed by the system for its memory, or by a decoder bug
on a hostile file) costs one file: the pool is made anew, and what was in flight is tried again one by one to find the
file that kills.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from vggt_cache.errors import FrameError
from vggt_cache.frames import decode_frame, remark_on
from vggt_cache.identity import PATCH_SIZE, Preprocessing, frame_digest, pixel_digest
from vggt_cache.precompute.digests import read_in_state


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedFrame:
    """What a worker made of one file: digest and pixels of the same bytes, or the reason why not."""

    digest: bytes = b""
    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32] = field(
        default_factory=lambda: np.empty((0, 0, 3), np.uint8)
    )
    """[H, W, 3]"""
    pixel_digest: bytes = b""
    """Of `pixels`, see `identity.pixel_digest`."""
    state_hash: bytes = b""
    """Of the file as it was read, see `read_in_state`; may be empty."""
    error: str = ""
    remark: str = ""
    """See `vggt_cache.frames.remark_on`."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches"""
        height, width, _ = self.pixels.shape
        return height // PATCH_SIZE, width // PATCH_SIZE


def decode_file(path: str, preprocessing: Preprocessing) -> DecodedFrame:
    """Read, digest and decode one image file. Never raises for a bad file."""
    try:
        data, state = read_in_state(path)
        pixels = decode_frame(data, preprocessing)
    except FrameError as error:
        return DecodedFrame(error=reason_without_path(error, path))
    except MemoryError:
        return DecodedFrame(error="there is not enough memory to decode it")
    return DecodedFrame(
        digest=frame_digest(data),
        pixels=pixels,
        pixel_digest=pixel_digest(pixels),
        state_hash=state,
        remark=remark_on(data),
    )


def read_digest(path: str) -> tuple[bytes | str, bytes]:
    """The digest of a file, with the hash of its state, see `read_in_state`; or why it cannot be read."""
    try:
        data, state = read_in_state(path)
        return frame_digest(data), state
    except FrameError as error:
        return reason_without_path(error, path), b""


def reason_without_path(error: FrameError, path: str) -> str:
    """The sentence of `error` for a place where the path stands before it already."""
    text = str(error)
    return f"it{text.removeprefix(repr(path))}" if text.startswith(f"{path!r} ") else text


class DecodePool(AbstractContextManager["DecodePool"]):
    """Decodes files ahead in `workers` processes; with 0 workers, in the caller when a result is asked for."""

    def __init__(self, workers: int, preprocessing: Preprocessing) -> None:
        self._workers = workers
        self._preprocessing = preprocessing
        self._executor = _start(workers) if workers else None

    def __exit__(self, *exc: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, path: str) -> Callable[[], DecodedFrame]:
        """Start decoding a file; what is returned waits for the result, and may be called in any order."""
        if self._executor is None:
            return partial(decode_file, path, self._preprocessing)
        try:
            future = self._submit(self._executor, path)
        except BrokenProcessPool:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = _start(self._workers)
            future = self._submit(self._executor, path)
        return partial(self._result, future, path)

    def _submit(self, executor: ProcessPoolExecutor, path: str) -> Future[DecodedFrame]:
        # A worker may be started for it, and would say a traceback of a Ctrl-C that comes before it can ignore it.
        with _signals_held_back():
            return executor.submit(decode_file, path, self._preprocessing)

    def _result(self, future: Future[DecodedFrame], path: str) -> DecodedFrame:
        try:
            return future.result()
        except BrokenProcessPool:
            return self._decode_alone(path)

    def _decode_alone(self, path: str) -> DecodedFrame:
        """With nothing else in flight, so that a second death names the file that causes it."""
        with _start(1) as lone:
            try:
                return self._submit(lone, path).result()
            except BrokenProcessPool:
                return DecodedFrame(
                    error="the process that decoded it died: the file is damaged or needs too much memory"
                )


def _start(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork would copy the threads' locks and the CUDA context of this process.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM reach this process when this ends, and never the processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    """A worker outlives neither its parent nor a signal meant for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
