"""A device that is full halves the batch, in whatever words it says so; any other error ends the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vggt_cache.errors import OutOfMemoryError
from vggt_cache.precompute.encode import BatchEncoder, is_out_of_memory

FULL = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    "runtime": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "driver": RuntimeError("CUDA driver error: out of memory"),
    "driver by name": RuntimeError("cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"),
    "AMD": RuntimeError("HIP error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
}
OTHERS = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "Triton Error [CUDA]: misaligned address",
    "out of resource: shared memory, Required: 300000, Hardware limit: 232448",
    "The size of tensor a (3) must match the size of tensor b (4)",
    "Could not open /data/out of memory.png",
]


@pytest.mark.parametrize("source", FULL)
def test_every_form_of_out_of_memory_is_known(source: str) -> None:
    assert is_out_of_memory(FULL[source])


def test_the_accelerators_own_error_type_is_known() -> None:
    if not hasattr(torch, "AcceleratorError"):
        pytest.skip("this torch raises RuntimeError instead")
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    )


@pytest.mark.parametrize("message", OTHERS)
def test_other_errors_are_not_taken_for_it(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))


class SmallDevice:
    """An encoder whose device has room for so many frames of joint lists; a token is its frame's shade."""

    device = torch.device("cpu")

    def __init__(self, room: int) -> None:
        self.room = room
        self.towers: list[int] = []

    def patch_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        self.towers.append(len(pixels))
        return pixels[:, :1, :1, :1].float()

    def joint_features(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[0] * tokens.shape[1] > self.room:
            raise FULL["torch"]
        return tokens


def joint(encoder: Any, lists: list[list[int]], batch_size: int, halved: list[int]) -> dict[int, list[float]]:
    pixels = {frame: np.full((14, 14, 3), frame, np.uint8) for one in lists for frame in one}
    batches = BatchEncoder(encoder, batch_size, halved.append).joint_lists(lists, pixels)
    return {
        at: feature.flatten().tolist()
        for part, features in batches
        for at, feature in zip(part, features, strict=True)
    }


def test_joint_lists_are_halved_until_they_fit_and_go_by_their_length() -> None:
    lists, halved = [[1, 2], [2, 3], [1, 2, 3], [4, 5], [3, 2], [3, 2, 1]], list[int]()
    encoder = SmallDevice(room=4)
    assert joint(encoder, lists, 8, halved) == {at: list(map(float, one)) for at, one in enumerate(lists)}
    assert halved == [4]
    assert encoder.towers[0] == 5, "a frame that lists of one batch share goes through the tower once"


def test_a_joint_list_that_never_fits_is_told_by_its_length_at_once() -> None:
    halved = list[int]()
    with pytest.raises(OutOfMemoryError, match="one list of 3 frames"):
        joint(SmallDevice(room=2), [[1, 2, 3], [4, 5, 6]], 6, halved)
    assert halved == [3]
