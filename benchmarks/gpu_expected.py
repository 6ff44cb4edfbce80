"""What the figures of `gpu.py` are held against: what was aimed at, and what was predicted before any run on a GPU.

A figure is named by step, name and key: `frame.518.share`. Predictions were made on a CPU, by counting the bytes and
FLOPs of each kernel and from what others report of cuDNN; they stay as they are, right or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ANY = "any"
"""A prediction for whatever card."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure that must not be larger than `most`, or smaller than `least`."""

    figure: str
    least: float | None = None
    most: float | None = None

    def is_met(self, found: float) -> bool:
        return (self.least is None or found >= self.least) and (self.most is None or found <= self.most)

    def __str__(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A range of a figure by card, whose name holds the key (`h100`), or ANY."""

    figure: str
    by_card: Mapping[str, tuple[float, float]]
    because: str

    def range_for(self, hardware: str) -> tuple[float, float] | None:
        return next((one for card, one in self.by_card.items() if card in hardware), self.by_card.get(ANY))


NEAR = 0.1
"""A prediction is right if the figure is in its range, or off by no more than this share."""

WIDTHS = (518, 644)
EXACT, ROUNDED = 1e-4, 0.015
"""Relative L2 differences that other orders of summation explain, in float32 and in bfloat16."""

_PARITY = {
    "goldens_float32": 5e-5,
    "goldens_float32_beside_tf32": 5e-5,
    "goldens_bfloat16": ROUNDED,
    **{f"{width}_bfloat16": ROUNDED for width in WIDTHS},
    **{f"{width}_fused_against_plain": ROUNDED for width in WIDTHS},
    **{f"{width}_cudnn_against_flash": ROUNDED for width in WIDTHS},
    **{
        f"{width}_{dtype}_{what}_against_alone": most
        for width in WIDTHS
        for what in ("batch", "shared")
        for dtype, most in (("float32", EXACT), ("bfloat16", ROUNDED))
    },
    "one_frame_against_cpu.float32": EXACT,
    "one_frame_against_cpu.bfloat16": ROUNDED,
}

GOALS = (
    *(Goal(figure=f"parity.{name}", most=most) for name, most in _PARITY.items()),
    *(Goal(figure=f"frame.{width}.share", least=0.6) for width in WIDTHS),
    *(Goal(figure=f"causal.{width}.of_frame_efficiency", least=0.9) for width in WIDTHS),
    *(Goal(figure=f"causal.{width}.times_as_fast", least=6.0) for width in WIDTHS),
    *(Goal(figure=f"precompute.{width}.of_encoder_alone", least=0.95) for width in WIDTHS),
    Goal(figure="step.speeds.cached_over_resident", most=1.02),
    *(Goal(figure=f"training.{context}_largest_difference", most=0.01) for context in ("causal", "frame")),
    *(
        Goal(figure=f"memory.{end}_{what}.{name}", most=most)
        for end in ("full", "capped")
        for what in ("frames", "lists")
        for name, most in (("missing", 0.0), ("largest_difference", ROUNDED))
    ),
    Goal(figure="int8.decoded_difference", most=0.0),
    Goal(figure="int8.read_ahead_difference", most=0.0),
)


def _prediction(figure: str, because: str, **by_card: float | tuple[float, float]) -> Prediction:
    ranges = {card: one if isinstance(one, tuple) else (one, one) for card, one in by_card.items()}
    return Prediction(figure=figure, by_card=ranges, because=because)


PREDICTIONS = (
    _prediction("machine.device_copy_bytes_per_s", "measured by others", h100=3.0e12, h200=4.3e12),
    _prediction("frame.518_plain.share", "257 bytes an element in 40 kernels", h100=0.30, h200=0.35),
    _prediction("frame.518_plain.frames_per_s", "the same", h100=108.0),
    _prediction("frame.644_plain.share", "the same", h100=0.31),
    _prediction("frame.644_plain.frames_per_s", "the same", h100=67.0),
    _prediction(
        "frame.518_cudnn_batch_16.share", "56 bytes an element, GELU in the product", h100=0.61, h200=0.65
    ),
    _prediction("frame.518_cudnn_batch_16.frames_per_s", "the same", h100=225.0),
    _prediction("frame.644_cudnn_batch_16.share", "the same", h100=0.60),
    _prediction("frame.644_cudnn_batch_16.frames_per_s", "the same", h100=132.0),
    _prediction("parity.518_bfloat16", "the same arithmetic on a CPU", any=0.0062),
    _prediction(
        "plans.attention_5x9_default.first_ms", "cuDNN makes a plan for each shape", any=(400.0, 550.0)
    ),
    _prediction("plans_deprioritised.attention_5x9_default.first_ms", "no plan is made", any=(0.0, 50.0)),
    _prediction("step.visual_tower_s", "7,596 attention calls, one a window", any=(0.3, 0.45)),
)
