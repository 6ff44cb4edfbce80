"""The fused kernels compute what the plain path computes, and compile for the GPUs that they are for."""

from __future__ import annotations

import functools
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_recipe
from vggt_cache.encoder import Checkpoint, blocks, fused
from vggt_cache.encoder.blocks import Block, rope_table

HAS_WHEELS = (sys.platform, platform.machine()) == ("linux", "x86_64")
needs_triton = pytest.mark.skipif(
    fused.triton is None and not HAS_WHEELS, reason="no Triton for this platform"
)


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    """Between fused and plain, relative L2, by case."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fused_cases.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@needs_triton
def test_kernels_agree_with_the_plain_path_in_float32(differences: dict[str, dict[str, float]]) -> None:
    """Whatever the width, the heads, the batch and the strides; `finish` with GELU as the CPU computes it: exactly."""
    cases = {name: case for name, case in differences.items() if name.startswith("float32")}
    assert len(cases) == 12
    for name, case in cases.items():
        assert max(case.values()) < 2e-6, (name, case)


@needs_triton
def test_kernels_agree_with_the_plain_path_in_bfloat16(differences: dict[str, dict[str, float]]) -> None:
    """The interpreter cuts bits off where a GPU rounds: up to a whole unit in the last place, 2^-7."""
    cases = {name: case for name, case in differences.items() if name.startswith("bfloat16")}
    assert len(cases) == 7
    for name, case in cases.items():
        assert max(case.values()) < 2**-7, (name, case)


@needs_triton
def test_the_input_is_not_modified(differences: dict[str, dict[str, float]]) -> None:
    changes = [case["of the input"] for case in differences.values() if "of the input" in case]
    assert len(changes) == 18
    assert set(changes) == {0.0}


F, B = "*fp32", "*bf16"
ROWS = {"x": F, "y": B, "gamma": F, "weight": F, "bias": F, "total": F, "out": B, "eps": "fp32"}
ROTATION = {
    **dict.fromkeys(["qkv"], B),
    **dict.fromkeys(["q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin"], F),
    "eps": "fp32",
    "n": "i32",
}
COMPILED: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "norm": ("add_scale_norm", ROWS, {"C": 1024, "BLOCK": 1024, "HAS_Y": False, "HAS_OUT": True}),
    "add and norm": ("add_scale_norm", ROWS, {"C": 1024, "BLOCK": 1024, "HAS_Y": True, "HAS_OUT": True}),
    "add": ("add_scale_norm", ROWS, {"C": 1024, "BLOCK": 1024, "HAS_Y": True, "HAS_OUT": False}),
    "small": ("add_scale_norm", ROWS, {"C": 384, "BLOCK": 512, "HAS_Y": True, "HAS_OUT": True}),
    "rotation": ("rotate_qk", ROTATION, {"H": 16, "H_BLOCK": 16, "D": 64, "D_BLOCK": 32}),
    "small rotation": ("rotate_qk", ROTATION, {"H": 6, "H_BLOCK": 8, "D": 64, "D_BLOCK": 32}),
}


@needs_triton
@pytest.mark.parametrize("case", COMPILED)
def test_kernels_compile_for_hopper_without_a_gpu(case: str) -> None:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "attrs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("this Triton compiles by an older interface")
    name, types, constants = COMPILED[case]
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    source = ASTSource(fn=getattr(fused, name), signature=signature, constexprs=constants, attrs=aligned)
    kernel = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused.WARPS})
    assert kernel.asm["cubin"]
    loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
    # Narrow loads would not reach the memory's speed. Six heads fill no power of two: those are not for speed.
    assert case == "small rotation" or all("v4" in load or "v2" in load for load in loads)


def test_only_bfloat16_on_cuda_takes_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_works", lambda device: True)
    monkeypatch.setattr(fused, "triton", object())
    monkeypatch.delenv(fused.SWITCH, raising=False)
    cuda = torch.device("cuda", 0)
    assert fused.available(cuda, torch.bfloat16)
    assert not fused.available(cuda, torch.float32)
    assert not fused.available(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused.available(cuda, torch.bfloat16)
    monkeypatch.delenv(fused.SWITCH)
    monkeypatch.setattr(fused, "triton", None)
    assert not fused.available(cuda, torch.bfloat16)


def test_a_triton_that_cannot_compile_means_the_plain_path_and_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "_norm", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fused._works.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton does not work here .*Failed to find C compiler.*compiler"):
        assert not fused._works(torch.device("cpu"))
    assert not fused._works(torch.device("cpu"))
    fused._works.cache_clear()


def test_a_cpu_brings_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs memory, and a Ctrl-C in the middle of its import aborts the process instead of ending the run."""
    monkeypatch.delattr("vggt_cache.encoder.fused")
    monkeypatch.setitem(sys.modules, "vggt_cache.encoder.fused", None)
    assert blocks.fused_kernels(torch.device("cpu"), torch.bfloat16) is None
    with pytest.raises(ImportError):
        blocks.fused_kernels(torch.device("cuda"), torch.bfloat16)


def test_a_block_takes_the_fused_path_where_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    block = Block(24, 2, eps=1e-5, qk_norm=True, dtype=torch.float32)
    x, rope = torch.randn(1, 6, 24), rope_table((1, 1), 5, 12, torch.device("cpu"))
    plain = block(x, rope)
    project, finish = Block.project, Block.finish

    def kernels(device: torch.device, dtype: torch.dtype) -> Any:
        taken.append("asked")
        return fused if len(taken) < 3 else None

    monkeypatch.setattr(blocks, "fused_kernels", kernels)

    def recorded(name: str, step: Any) -> Any:
        return lambda self, *args: (taken.append(name), taken.append(name), step(self, *args))[-1]

    monkeypatch.setattr(fused, "project", recorded("project", project))
    monkeypatch.setattr(fused, "finish", recorded("finish", finish))
    assert torch.equal(block(x, rope), plain)
    assert "project" in taken


def test_the_forms_of_gelu_differ_by_at_most_5e_4() -> None:
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    gelu = torch.nn.functional.gelu
    assert (gelu(x, approximate="tanh") - gelu(x)).abs().max() < 5e-4


@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["as it is", "mostly negative"])
def test_the_tanh_form_of_gelu_leaves_the_error_of_bfloat16_as_it_is(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Why features keep their identity. Where GELU's input is mostly negative, the two forms differ the most."""
    images = torch.stack([golden_recipe.image(seed, 84, 126) for seed in (31, 32)])
    encoders = {
        dtype: Checkpoint.open(str(small_checkpoint)).load(compute_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    for encoder in encoders.values():
        for name, parameter in encoder.named_parameters():
            if name.endswith("fc1.bias"):
                parameter += shift

    def features(dtype: str) -> Tensor:
        return encoders[dtype].frame_features(images).double()

    exact, plain = features("float32"), features("bfloat16")
    tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    monkeypatch.setattr(blocks.functional, "gelu", tanh)
    assert (features("float32") - exact).norm() < 0.25 * (plain - exact).norm()
    assert (features("bfloat16") - exact).norm() < 1.05 * (plain - exact).norm()
