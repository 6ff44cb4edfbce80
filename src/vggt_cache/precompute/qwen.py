"""Whether the grid of the features suits the Qwen2.5-VL model that will be trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vggt_cache.errors import SettingsError, SmallFileError
from vggt_cache.identity import PATCH_SIZE
from vggt_cache.small_files import read_text

_MAX_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class QwenLimits:
    """What `config.json` and `preprocessor_config.json` of a Qwen2.5-VL directory say about images."""

    patch_size: int = PATCH_SIZE
    merge_size: int = 2
    min_pixels: int = 0
    max_pixels: int = 1 << 40

    @classmethod
    def read(cls, directory: str) -> QwenLimits:
        """Raises SettingsError where the directory holds no such model, or one of another patch size."""
        config = _read_json(Path(directory) / "config.json", directory)
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise SettingsError(
                f"--model_path {directory}: its config.json has no vision_config, so it is no Qwen2.5-VL model; "
                "give the directory of Qwen2.5-VL, or leave --model_path out"
            )
        processor_file = Path(directory) / "preprocessor_config.json"
        processor = _read_json(processor_file, directory) if processor_file.exists() else {}
        size = processor.get("size") if isinstance(processor.get("size"), dict) else {}
        found = {
            "patch_size": vision.get("patch_size", vision.get("spatial_patch_size")),
            "merge_size": vision.get("spatial_merge_size"),
            "min_pixels": processor.get("min_pixels", (size or {}).get("shortest_edge")),
            "max_pixels": processor.get("max_pixels", (size or {}).get("longest_edge")),
        }
        limits = cls(**{name: value for name, value in found.items() if isinstance(value, int) and value > 0})
        if limits.patch_size != PATCH_SIZE:
            raise SettingsError(
                f"--model_path {directory} works on patches of {limits.patch_size} pixels, VGGT on {PATCH_SIZE}: "
                "their grids do not match, so the features cannot be added; use a Qwen2.5-VL model"
            )
        return limits

    def complaint(self, grid: tuple[int, int]) -> str:
        """What does not fit between a patch grid (h, w) and the model; empty where all fits."""
        h, w = (side - side % self.merge_size for side in grid)
        pixels = h * w * self.patch_size**2
        if not h or not w:
            return f"a grid of {grid[0]}x{grid[1]} patches is too small for merging {self.merge_size}x{self.merge_size}"
        if not self.min_pixels <= pixels <= self.max_pixels:
            return (
                f"frames of {h}x{w} patches have {pixels} pixels, outside the model's {self.min_pixels} to "
                f"{self.max_pixels}: its processor would resize them, and its grid no longer match the features; "
                "change --image_size or the model's pixel limits"
            )
        return ""


def _read_json(path: Path, directory: str) -> dict[str, Any]:
    try:
        content = json.loads(read_text(str(path), _MAX_BYTES))
    except SmallFileError as error:
        raise SettingsError(
            f"--model_path {directory}: {path.name} cannot be read, as it {error.reason}; give the directory of a "
            "Qwen2.5-VL model, or leave --model_path out"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"--model_path {directory}: {path.name} is not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}
