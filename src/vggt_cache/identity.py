"""What a feature *is*: the specification of its computation, and the key that follows from it.

A feature's key covers everything that determines its value and nothing else: no path, no time, no batch
size. `docs/identity.md` lists what enters and what does not. Change one entry and the key changes: the
old feature is not found, and so never served.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vggt_cache.context import CONTEXTS as CONTEXTS
from vggt_cache.context import ContextRule
from vggt_cache.errors import SettingsError, SpecMismatchError

COMPUTATION_VERSION = 1
"""Raised whenever our own code computes a different value from the same inputs."""

RESIZE_MODES = ("crop", "pad")
ALPHA_MODES = ("white", "drop")
FEATURE_DTYPES = ("bfloat16", "float16", "float32", "int8")
COMPUTE_DTYPES = ("bfloat16", "float32")
SETTINGS = ("context", "image_size", "resize_mode", "alpha", "layer", "feature_dtype", "compute_dtype")
"""What of a specification flags name, under the flags' names."""
PATCH_SIZE = 14
KEY_BYTES = 16
DIGEST_BYTES = 32


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise SettingsError(
            f"{name} is {value!r}, which is not one of {', '.join(map(str, allowed))}: choose one of these"
        )


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From image bytes to pixels, as VGGT's own loader does it (bicubic, sides a multiple of 14)."""

    image_size: int = 518
    """Target width in pixels, a multiple of 14. VGGT: 518. JanusVLN: 644."""
    resize_mode: str = "crop"
    """`crop`: width = image_size, rows over image_size cut centrally. `pad`: long side = image_size, white square."""
    alpha: str = "white"
    """RGBA images: `white` blends over white (VGGT's loader); `drop` discards alpha (JanusVLN's training)."""
    resampling: str = "bicubic"

    def __post_init__(self) -> None:
        size = self.image_size
        if not isinstance(size, int) or size < PATCH_SIZE or size % PATCH_SIZE:
            raise SettingsError(
                f"image_size is {size!r}, which is not a positive multiple of {PATCH_SIZE}: "
                "patches would not fill the image; use 518 (VGGT) or 644 (JanusVLN)"
            )
        if size > 4096:
            raise SettingsError(
                f"image_size is {size}, over the limit of 4096: use 518 (VGGT) or 644 (JanusVLN)"
            )
        _one_of("resize_mode", self.resize_mode, RESIZE_MODES)
        _one_of("alpha", self.alpha, ALPHA_MODES)
        _one_of("resampling", self.resampling, ("bicubic",))


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The encoder as far as it determines a feature: architecture, weights in use, output, numerics."""

    weights_digest: str
    """sha256 (hex) over the weights that the chosen layer needs; see `encoder.checkpoint`."""
    embed_dim: int
    depth: int
    """Number of pairs (frame block + global block) in the architecture, not the number computed."""
    num_heads: int
    img_size: int
    patch_size: int
    patch_embed: str
    layer: int
    """Output that is stored, as a pair index counted from 0 (the default -2 of 24 pairs is 22)."""
    compute_dtype: str
    """dtype of matrix products and attention; LayerNorm, RoPE and the residual stream are float32."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "img_size", "patch_size", "layer"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise SettingsError(
                    f"{name} is {value!r}, which is not a whole number above 0: the encoder's description is damaged"
                )
        _one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if not 0 <= self.layer < self.depth:
            raise SettingsError(
                f"layer is {self.layer}, but the encoder has outputs 0 to {self.depth - 1}: choose one of these"
            )

    @property
    def channels(self) -> int:
        """Channels of a stored feature: frame-block output and global-block output side by side."""
        return 2 * self.embed_dim


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Everything that determines a feature's value, except the frames themselves."""

    encoder: EncoderSpec
    preprocessing: Preprocessing
    context: str = "frame"
    """The name of what a feature belongs to; `context_rule` is the object."""
    feature_dtype: str = "bfloat16"
    """dtype in which a feature is stored. `int8`: quantised from bfloat16, and given back as bfloat16."""
    computation_version: int = COMPUTATION_VERSION

    def __post_init__(self) -> None:
        _one_of("context", self.context, tuple(CONTEXTS))
        _one_of("feature_dtype", self.feature_dtype, FEATURE_DTYPES)
        if type(self.computation_version) is not int:  # True == 1, and its text and fingerprint are others
            raise SettingsError(
                f"computation_version is {self.computation_version!r}, which is not a whole number above 0: the "
                "specification is damaged"
            )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of the specification in canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def short_name(self) -> str:
        """Name of the specification's folder in a cache directory, such as `causal-0123456789abcdef`."""
        return f"{self.context}-{self.fingerprint[:16]}"

    @property
    def context_rule(self) -> ContextRule:
        """What the context means: which frames are used, how they are encoded, what comes out."""
        return CONTEXTS[self.context]

    @property
    def settings(self) -> dict[str, object]:
        values = {**vars(self), **vars(self.preprocessing), **vars(self.encoder)}
        return {name: values[name] for name in SETTINGS}

    def contradictions(self, given: Mapping[str, object]) -> dict[str, object]:
        """Those of the `given` settings that this specification does not have, with what it has instead.

        None and `auto` leave a setting open, and a negative layer counts from the end. Other names are passed over.
        """
        settings = self.settings
        wanted = {key: given[key] for key in given if key in settings and given[key] not in (None, "auto")}
        layer = wanted.get("layer")
        if isinstance(layer, int) and layer < 0:
            wanted["layer"] = layer + self.encoder.depth
        return {name: settings[name] for name, value in wanted.items() if value != settings[name]}

    def to_json(self) -> str:
        """Canonical JSON: sorted names, no spaces. Equal specifications give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """The specification written by `to_json`. Raises SpecMismatchError for any unknown or missing name."""
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["encoder"] = EncoderSpec(**fields["encoder"])
            fields["preprocessing"] = Preprocessing(**fields["preprocessing"])
            spec = cls(**fields)
        except (ValueError, TypeError, KeyError, RecursionError, SettingsError) as error:
            raise SpecMismatchError(
                f"the cache's specification cannot be understood ({error}): it was written by another version "
                "of this project or is damaged; use that version, or precompute again into a new directory"
            ) from error
        if spec.to_json() != text.strip():
            raise SpecMismatchError(
                "the cache's specification is not in canonical form: it was edited by hand or is damaged; "
                "precompute again into a new directory"
            )
        return spec


def frame_digest(data: bytes) -> bytes:
    """sha256 of an image file's bytes, 32 bytes. What is hashed is what is decoded: the same buffer."""
    return hashlib.sha256(data).digest()


def feature_key(spec: FeatureSpec, digests: Sequence[bytes]) -> bytes:
    """The 16-byte key of the feature of an ordered frame list: the one way from frames to a key.

    `digests`: the `frame_digest` of each frame in order. Those that the context uses enter.
    """
    if not digests:
        raise ValueError("a feature needs at least one frame")
    used = spec.context_rule.used(digests)
    if any(len(digest) != DIGEST_BYTES for digest in used):
        raise ValueError(f"a frame digest has {DIGEST_BYTES} bytes")
    hasher = hashlib.sha256(b"vggt-feature-cache key 1\0")
    hasher.update(bytes.fromhex(spec.fingerprint))
    hasher.update(len(used).to_bytes(4, "little"))
    for digest in used:
        hasher.update(digest)
    return hasher.digest()[:KEY_BYTES]
