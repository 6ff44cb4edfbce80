"""What the trainer decides about data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vggt_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Raises SettingsError for values that are out of range."""

    model_dir: str
    """Qwen2.5-VL directory (or its name on the hub), for `config.json` and `preprocessor_config.json`."""
    model_max_length: int = 163840
    """Tokens of the longest sample. Longer ones are refused, never cut."""
    max_history_images: int = 8
    """Earlier frames that a sample may show beside the current one. More are refused, never left out: in causal context
    the list of frames is what a feature is found by."""
    min_pixels: int | None = None
    """Of an image as Qwen sees it; None: as in `preprocessor_config.json`. Images outside are refused."""
    max_pixels: int | None = None
    subinstruction_weight: float = 1.0
    """Loss weights of the four lines of a structured target."""
    desc2d_weight: float = 1.0
    desc3d_weight: float = 1.0
    action_weight: float = 1.0
    action_head: bool = False
    """Whether samples carry an action label and the place to predict it from."""

    def __post_init__(self) -> None:
        for name, least in (("model_max_length", 1), ("max_history_images", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"--{name} is {getattr(self, name)}: give {least} or more")
        for name in ("subinstruction_weight", "desc2d_weight", "desc3d_weight", "action_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingsError(f"--{name} is {value}, which is no weight: give 0 or more")
        if not any(self.section_weights):
            raise SettingsError(
                "--subinstruction_weight, --desc2d_weight, --desc3d_weight and --action_weight are all 0, so nothing "
                "would be learned: give at least one a value over 0"
            )

    @property
    def section_weights(self) -> tuple[float, float, float, float]:
        """Of the lines SUBINSTRUCTION, 2D_DESCRIPTION, 3D_DESCRIPTION, ACTION."""
        return self.subinstruction_weight, self.desc2d_weight, self.desc3d_weight, self.action_weight

    @property
    def weighted(self) -> bool:
        """Whether batches carry `loss_weights`."""
        return any(weight != 1.0 for weight in self.section_weights)
