"""What a Block does beside matrix products and attention, in as few passes over memory as possible (Triton).

The plain path in `blocks.py` says what is computed. Written so, each of its steps is a kernel of its own that reads and
writes whole tensors, and on a Hopper GPU those take longer than the matrix products. Here the same steps are three
passes, and GELU is part of the product before it:

    add_scale_norm   [x +] y * gamma, LayerNorm, cast: the residual stream is read and written once
    rotate_qk        norm and rotation of queries and keys where they lie, inside the projection's output
    GELU             by cuBLAS, in the product's epilogue, in the tanh form

Used for bfloat16 on CUDA where Triton works; `VGGT_CACHE_FUSED=0` turns it off. Sums are taken in another order and
GELU has another form, so features differ within bfloat16's rounding (docs/identity.md).

Shapes: b images or branches, n tokens, C channels, H heads of D channels. Rows are addressed with 64 bits: b * n * 3C
values can pass 2^31. Nothing is tuned at run time, so the same input gives the same bits each time.
"""

# Triton reads the kernels: they cannot carry types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform: then `available` is False
    triton = tl = None
jit: Any = triton.jit if triton is not None else lambda kernel: kernel

if TYPE_CHECKING:
    from vggt_cache.encoder.blocks import Attention, Block, Rope

SWITCH = "VGGT_CACHE_FUSED"
"""Environment variable: `0` forces the plain path."""
WARPS = 4


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks of this dtype take this path on this device. Asked for each block, so it is quick."""
    if device.type != "cuda" or dtype != torch.bfloat16 or os.environ.get(SWITCH) == "0":
        return False
    return triton is not None and _works(device)


@lru_cache(maxsize=16)
def _works(device: torch.device) -> bool:
    """Triton compiles on first use, for which it needs a C compiler and a folder to write to: tried once."""
    if torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16 arithmetic
        return False
    try:
        one = torch.ones(1, 16, device=device)
        with torch.cuda.device_of(one):
            _norm(one, nn.LayerNorm(16, device=device, dtype=torch.float32), torch.bfloat16)
    except torch.OutOfMemoryError:  # says nothing about Triton
        raise
    except Exception as error:  # whatever a compiler raises
        warnings.warn(
            f"Triton does not work here ({type(error).__name__}: {str(error)[:200]}): the encoder is slower without "
            f"its fused kernels; install a C compiler and Python's headers, or set {SWITCH}=0",
            stacklevel=2,
        )
        return False
    return True


def project(block: Block, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.project`. The three are views of one packed [b, n, 3, H, D], which attention reads as it is."""
    attention = block.attn
    with torch.cuda.device_of(x):
        normed = _norm(x.contiguous(), block.norm1, block.dtype)
        packed = attention.qkv(normed).view(*x.shape[:2], 3, attention.heads, -1)
        if rope is not None:
            _rotate(packed, attention, rope)
    q, k, v = packed.unbind(2)
    return q, k, v


def finish(block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Block.finish`; `x` is not modified."""
    with torch.cuda.device_of(x):
        x, y = x.contiguous(), block.attn.attend(q, k, v)
        total, normed = torch.empty_like(x), torch.empty_like(y)
        _launch_rows(x, y, block.ls1.gamma, block.norm2, total, normed)
        fc1 = block.mlp.fc1
        hidden = torch._addmm_activation(fc1.bias, normed.flatten(0, 1), fc1.weight.t(), use_gelu=True)
        _launch_rows(total, block.mlp.fc2(hidden), block.ls2.gamma, None, total)
        return total


def _norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """LayerNorm of float32 `x`, in `dtype`."""
    out = torch.empty_like(x, dtype=dtype)
    _launch_rows(x, None, x, norm, x, out)
    return out


def _launch_rows(
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor,
    norm: nn.LayerNorm | None,
    total: Tensor,
    out: Tensor | None = None,
) -> None:
    """total = x + y * gamma, if there is `y`; out = norm(total), if there is a norm. What is not used is any tensor."""
    channels = x.shape[-1]
    weight, bias, eps = (norm.weight, norm.bias, norm.eps) if norm is not None else (gamma, gamma, 0.0)
    arguments = (x, x if y is None else y, gamma, weight, bias, total, y if out is None else out, eps)
    add_scale_norm[(x.numel() // channels,)](
        *arguments,
        C=channels,
        BLOCK=triton.next_power_of_2(channels),
        HAS_Y=y is not None,
        HAS_OUT=norm is not None,
        num_warps=WARPS,
    )


def _rotate(packed: Tensor, attention: Attention, rope: Rope) -> None:
    """Queries and keys inside `packed` [b, n, 3, H, D] normed and rotated in place."""
    q_norm, k_norm = cast("list[nn.LayerNorm]", [attention.q_norm, attention.k_norm])
    b, n, _, heads, head_dim = packed.shape
    weights = q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias
    rotate_qk[(b * n,)](
        packed,
        *weights,
        *rope,
        q_norm.eps,
        n,
        H=heads,
        H_BLOCK=triton.next_power_of_2(heads),
        D=head_dim,
        D_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=WARPS,
    )


@jit
def add_scale_norm(
    x,  # float32 [rows, C]
    y,  # bfloat16 [rows, C]
    gamma,  # float32 [C]
    weight,  # float32 [C]
    bias,  # float32 [C]
    total,  # float32 [rows, C], may be x
    out,  # bfloat16 [rows, C]
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # C rounded up to a power of two
    HAS_Y: tl.constexpr,
    HAS_OUT: tl.constexpr,
):
    """total = x + y * gamma; out = LayerNorm(total). One row a program, so that a row is in registers throughout."""
    row = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BLOCK)
    real = c < C
    value = tl.load(x + row + c, mask=real, other=0.0)
    if HAS_Y:
        scale = tl.load(gamma + c, mask=real, other=0.0)
        value += tl.load(y + row + c, mask=real, other=0.0).to(tl.float32) * scale
        tl.store(total + row + c, value, mask=real)
    if HAS_OUT:
        centred = tl.where(real, value - tl.sum(value, 0) / C, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
        normed = normed * tl.load(weight + c, mask=real, other=0.0) + tl.load(bias + c, mask=real, other=0.0)
        tl.store(out + row + c, normed.to(out.dtype.element_ty), mask=real)


@jit
def rotate_qk(
    qkv,  # bfloat16 [b * n, 3, H, D]
    q_weight,  # float32 [D], and so are the next three
    q_bias,
    k_weight,
    k_bias,
    cos,  # float32 [n, D]
    sin,  # float32 [n, D], signed: -, + for the first and the second of a pair
    eps,
    n,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,  # H rounded up to a power of two
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,  # D / 2 rounded up to a power of two
):
    """q and k become rotation(LayerNorm(q or k)). One token a program: all its heads share the angles.

    A head's channels are [2 axes, 2 of a pair, D / 4]: pair p of the D / 2 has its first channel at
    p // (D / 4) * (D / 2) + p % (D / 4), and its second D / 4 further.
    """
    Q: tl.constexpr = D // 4
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, D_BLOCK)[None, :]
    head = tl.arange(0, H_BLOCK)[:, None]
    first = pair // Q * 2 * Q + pair % Q
    there = pair < 2 * Q
    real = there & (head < H)
    angle = token % n * D + first
    c = tl.load(cos + angle, mask=there, other=0.0)
    s = tl.load(sin + angle + Q, mask=there, other=0.0)
    for which in tl.static_range(2):
        place = qkv + (token * 3 + which) * H * D + head * D + first
        a = tl.load(place, mask=real, other=0.0).to(tl.float32)
        b = tl.load(place + Q, mask=real, other=0.0).to(tl.float32)
        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / D)[:, None]
        a = tl.where(real, a - mean, 0.0)
        b = tl.where(real, b - mean, 0.0)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        weight = q_weight if which == 0 else k_weight
        bias = q_bias if which == 0 else k_bias
        a = a * scale * tl.load(weight + first, mask=there, other=0.0)
        a += tl.load(bias + first, mask=there, other=0.0)
        b = b * scale * tl.load(weight + first + Q, mask=there, other=0.0)
        b += tl.load(bias + first + Q, mask=there, other=0.0)
        tl.store(place, (a * c - b * s).to(qkv.dtype.element_ty), mask=real)
        tl.store(place + Q, (b * c + a * s).to(qkv.dtype.element_ty), mask=real)
