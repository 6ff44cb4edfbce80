"""A device that is full halves the batch, in whatever words it says so; any other error ends the run."""

from __future__ import annotations

import pytest
import torch

from vggt_cache.precompute.encode import is_out_of_memory

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
