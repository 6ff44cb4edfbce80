"""The architecture of a VGGT aggregator, as `config.json` gives it.

Official keys are `embed_dim`, `img_size` and `patch_size`; `depth`, `num_heads` and `patch_embed` are optional and
default to VGGT-1B. Other keys may be those that the official code takes as arguments and that change what is computed
(accepted only with the value computed here), those that cannot change a feature (ignored), and unknown ones (refused).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vggt_cache.errors import CheckpointError, SettingsError
from vggt_cache.identity import PATCH_SIZE


class VitSize(NamedTuple):
    """Dimensions of a DINOv2 vision transformer; hidden width of its MLP is 4 x embed_dim."""

    embed_dim: int
    depth: int
    num_heads: int


VIT_SIZES = {
    "dinov2_vits14_reg": VitSize(384, depth=12, num_heads=6),
    "dinov2_vitb14_reg": VitSize(768, depth=12, num_heads=12),
    "dinov2_vitl14_reg": VitSize(1024, depth=24, num_heads=16),
    "dinov2_vitg2_reg": VitSize(1536, depth=40, num_heads=24),
}
_SPELLING = re.compile(r"(?:dinov2_)?vit(s|b|l|g2)(?:14)?(?:_reg)?")
"""Short forms (`vitl`, `vitl14_reg`, `dinov2_vitl14`) mean the same four; VGGT has no tower without registers."""

_ONLY_VALUE: dict[str, object] = {
    "mlp_ratio": 4,
    "num_register_tokens": 4,
    "qkv_bias": True,
    "proj_bias": True,
    "ffn_bias": True,
    "qk_norm": True,
    "rope_freq": 100,
    "aa_order": ["frame", "global"],
    "aa_block_size": 1,
}
_WITHOUT_EFFECT = {
    # starting values of training, and the heads, which are not loaded
    *("init_values", "enable_camera", "enable_point", "enable_depth", "enable_track"),
    # what saving libraries add; keys that begin with "_" also belong here
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"),
}
_LARGEST = {"embed_dim": 8192, "img_size": 4096, "patch_size": 4096, "depth": 256, "num_heads": 256}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture of the aggregator. Raises CheckpointError for values that make no encoder."""

    embed_dim: int = 1024
    """Channels C of a token; a feature has 2C."""
    img_size: int = 518
    """Side in pixels of the square for which the learned position embedding was made."""
    patch_size: int = 14
    """Side of a patch in pixels; always 14."""
    depth: int = 24
    """Number of pairs (frame block + global block)."""
    num_heads: int = 16
    """Attention heads of the frame and global blocks."""
    patch_embed: str = "dinov2_vitl14_reg"
    """The patch tower: one of VIT_SIZES. Its width must be embed_dim."""

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise _nonsense(name, value, f"it must be a whole number from 1 to {largest}")
        if self.patch_size != PATCH_SIZE:
            raise _nonsense("patch_size", self.patch_size, f"DINOv2 patches have {PATCH_SIZE} pixels")
        if self.img_size % PATCH_SIZE:
            raise _nonsense("img_size", self.img_size, f"it must be a multiple of {PATCH_SIZE}")
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            reason = f"embed_dim {self.embed_dim} must give heads of a multiple of 4 channels"
            raise _nonsense("num_heads", self.num_heads, reason)
        if self.patch_embed not in VIT_SIZES:
            raise _nonsense("patch_embed", self.patch_embed, f"it must be one of {', '.join(VIT_SIZES)}")
        if self.vit.embed_dim != self.embed_dim:
            reason = f"patch_embed {self.patch_embed} has {self.vit.embed_dim} channels"
            raise _nonsense("embed_dim", self.embed_dim, reason)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def vit(self) -> VitSize:
        return VIT_SIZES[self.patch_embed]

    def absolute_layer(self, layer: int) -> int:
        """Pair index counted from 0 of `layer`, which may count from the end (-1 = last). Raises SettingsError."""
        if isinstance(layer, bool) or not isinstance(layer, int) or not -self.depth <= layer < self.depth:
            raise SettingsError(
                f"layer is {layer!r}, but the encoder has outputs 0 to {self.depth - 1} "
                f"(or {-self.depth} to -1, from the end): choose one of these"
            )
        return layer % self.depth

    def absolute_layers(self, layers: int | Iterable[int]) -> tuple[int, ...]:
        """One layer or several as pair indexes, ascending, each once. Raises SettingsError."""
        several = [layers] if isinstance(layers, int) else list(layers)
        if not several:
            raise SettingsError("layers names no output of the encoder: give one or several, such as -2")
        return tuple(sorted({self.absolute_layer(layer) for layer in several}))

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> EncoderConfig:
        """The configuration of a parsed `config.json`. Raises CheckpointError, one sentence per refusal."""
        known = cls.__dataclass_fields__.keys()
        for key in values.keys() - known:
            value, only = values[key], _ONLY_VALUE.get(key)
            if key in _ONLY_VALUE and (value != only or isinstance(value, bool) != isinstance(only, bool)):
                raise _nonsense(key, value, f"this encoder computes {only!r} only")
            if key not in _ONLY_VALUE and key not in _WITHOUT_EFFECT and not key.startswith("_"):
                raise CheckpointError(
                    f"the encoder's config.json has the key {key!r}, which is unknown: it may change what the "
                    "encoder computes; use an official VGGT checkpoint, or remove the key if it has no effect"
                )
        taken = {key: value for key, value in values.items() if key in known}
        short = _SPELLING.fullmatch(str(taken.get("patch_embed")))
        if short:
            taken["patch_embed"] = next(name for name in VIT_SIZES if f"vit{short[1]}" in name)
        return cls(**taken)  # type: ignore[arg-type]


def _nonsense(key: str, value: object, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the encoder's configuration has {key} = {value!r}, but {reason}: no encoder can be built from it; "
        "correct config.json, or use an official VGGT checkpoint"
    )
