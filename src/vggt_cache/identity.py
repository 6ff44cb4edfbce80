"""What a feature *is*: the specification of its computation, and the key that follows from it.

A feature's key covers everything that determines its value and nothing else: no path, no time, no batch
size. `docs/identity.md` lists what enters and what does not. Change one entry and the key changes: the
old feature is not found, and so never served.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vggt_cache.context import CONTEXTS as CONTEXTS
from vggt_cache.context import ContextRule
from vggt_cache.errors import FrameError, SettingsError, SpecMismatchError, require_one_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

COMPUTATION_VERSION = 1
"""Raised whenever our own code computes a different value from the same inputs."""

GIVEN = "given"
RESIZE_MODES = ("crop", "pad")
ALPHA_MODES = ("white", "drop")
FEATURE_DTYPES = ("bfloat16", "float16", "float32", "int8")
COMPUTE_DTYPES = ("bfloat16", "float32")
TOKENS = ("patches", "patches+camera", "special", "all")
SETTINGS = (
    *("context", "image_size", "resize_mode", "alpha", "layer", "tokens", "pool"),
    *("feature_dtype", "compute_dtype"),
)
"""What of a specification flags name, under the flags' names."""
PATCH_SIZE = 14
SPECIAL_TOKENS = 5
"""In front of a frame's patches: the camera token, then four registers."""
KEY_BYTES = 16
DIGEST_BYTES = 32


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
        if (size, self.resize_mode, self.alpha, self.resampling) == (0, GIVEN, GIVEN, GIVEN):
            return
        if not isinstance(size, int) or size < PATCH_SIZE or size % PATCH_SIZE:
            raise SettingsError(
                f"image_size is {size!r}, which is not a positive multiple of {PATCH_SIZE}: "
                "patches would not fill the image; use 518 (VGGT) or 644 (JanusVLN)"
            )
        if size > 4096:
            raise SettingsError(
                f"image_size is {size}, over the limit of 4096: use 518 (VGGT) or 644 (JanusVLN)"
            )
        require_one_of("resize_mode", self.resize_mode, RESIZE_MODES)
        require_one_of("alpha", self.alpha, ALPHA_MODES)
        require_one_of("resampling", self.resampling, ("bicubic",))


GIVEN_PIXELS = Preprocessing(image_size=0, resize_mode=GIVEN, alpha=GIVEN, resampling=GIVEN)
"""Of features that a trainer handed over as the pixels that the encoder sees."""


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
    """Highest output that is stored, as a pair index counted from 0 (the default -2 of 24 pairs is 22)."""
    compute_dtype: str
    """dtype of matrix products and attention; LayerNorm, RoPE and the residual stream are float32."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "img_size", "patch_size", "layer"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise SettingsError(
                    f"{name} is {value!r}, which is not a whole number above 0: the encoder's description is damaged"
                )
        require_one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
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
    layers: tuple[int, ...] = ()
    """The outputs that are stored, ascending, where there are several; empty where `encoder.layer` is the only one."""
    tokens: str = "patches"
    """Those of each frame: `patches` [h, w]; or as a row, in the encoder's order, `patches+camera` [1 + h * w],
    `special` [5] (camera and registers), `all` [5 + h * w]."""
    pool: tuple[int, int] | None = None
    """The patch grid is averaged to so many rows and columns (adaptive average pooling) before it is stored."""
    computation_version: int = COMPUTATION_VERSION

    def __post_init__(self) -> None:
        require_one_of("context", self.context, CONTEXTS)
        require_one_of("feature_dtype", self.feature_dtype, FEATURE_DTYPES)
        require_one_of("tokens", self.tokens, TOKENS)
        ascending = all(type(layer) is int and layer >= 0 for layer in self.layers) and (
            list(self.layers) == sorted(set(self.layers))
        )
        if self.layers and not (ascending and len(self.layers) > 1 and self.layers[-1] == self.encoder.layer):
            raise SettingsError(
                f"layers is {self.layers!r}, and two or more outputs are needed in ascending order, the last of them "
                f"{self.encoder.layer}: the specification is damaged"
            )
        check_pool(self.tokens, self.pool)
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

    @cached_property
    def of_given_pixels(self) -> FeatureSpec:
        """The same for frames that are given as pixels, whose keys are made of `pixel_digest`s."""
        return dataclasses.replace(self, preprocessing=GIVEN_PIXELS)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The outputs that are stored, ascending, also where there is one."""
        return self.layers or (self.encoder.layer,)

    @property
    def kept_text(self) -> str:
        """In words: `layer 22`, and what else differs from all patches."""
        layers = ("layers " if self.layers else "layer ") + ", ".join(map(str, self.kept_layers))
        tokens = "" if self.tokens == "patches" else f", tokens {self.tokens}"
        return layers + tokens + (f", patches averaged to {pool_text(self.pool)}" if self.pool else "")

    @cached_property
    def axes(self) -> tuple[str | int, ...]:
        """A feature's axes: of each its size where all features have the same, else its name.

        `frames` where it is of all frames of a list; the number of layers where there are several; `h` and `w` of
        the patch grid, or `n` tokens in a row; channels.
        """
        frames = ("frames",) if self.context_rule.of_all_frames else ()
        layers = (len(self.layers),) if self.layers else ()
        tokens = ("h", "w") if self.tokens == "patches" else ("n",)
        return *frames, *layers, *tokens, self.encoder.channels

    def shape(self, grid: Sequence[int], frames: int = 1) -> tuple[int, ...]:
        """The shape of the feature of a list of `frames` frames that have a `grid` of (h, w) patches.

        Raises FrameError where the grid has fewer rows or columns than are to be pooled.
        """
        check_grid(self.pool, grid)
        h, w = self.pool or grid
        rows = {"special": SPECIAL_TOKENS, "patches+camera": 1 + h * w, "all": SPECIAL_TOKENS + h * w}
        sizes = {"frames": frames, "h": h, "w": w, "n": rows.get(self.tokens, 0)}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)

    @property
    def context_rule(self) -> ContextRule:
        """What the context means: which frames are used, how they are encoded, what comes out."""
        return CONTEXTS[self.context]

    @property
    def settings(self) -> dict[str, object]:
        values = {**vars(self), **vars(self.preprocessing), **vars(self.encoder)}
        values |= {"layer": _one_or_several(self.kept_layers), "pool": pool_text(self.pool)}
        return {name: values[name] for name in SETTINGS}

    def contradictions(self, given: Mapping[str, object]) -> dict[str, object]:
        """Those of the `given` settings that this specification does not have, with what it has instead.

        None and `auto` leave a setting open, and a negative layer counts from the end. Other names are passed over.
        """
        settings = self.settings
        wanted = {
            name: given[name] for name in given if name in settings and given[name] not in (None, "auto")
        }
        settings["layers"] = settings["layer"]
        if given.get("layers") is not None:
            wanted["layers"] = given["layers"]
        wanted |= {name: self._counted_from_0(wanted[name]) for name in ("layer", "layers") if name in wanted}
        return {name: settings[name] for name, value in wanted.items() if value != settings[name]}

    def _counted_from_0(self, layers: object) -> object:
        """Layers as a flag gives them, such as -2 or `11,-1`, in the form of `settings`."""
        try:
            numbers = parse_layers(str(layers))
        except SettingsError:
            return layers
        return _one_or_several(sorted({n + self.encoder.depth if n < 0 else n for n in numbers}))

    def to_json(self) -> str:
        """Canonical JSON: sorted names, no spaces. Equal specifications give equal text.

        What came later stands there only where it is not the default, so that older caches keep their fingerprints.
        """
        fields = dataclasses.asdict(self)
        for name, default in (("layers", ()), ("tokens", "patches"), ("pool", None)):
            if fields[name] == default:
                del fields[name]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """The specification written by `to_json`. Raises SpecMismatchError for any unknown or missing name."""
        try:
            fields: dict[str, Any] = json.loads(text)
            fields |= {name: tuple(fields[name]) for name in ("layers", "pool") if name in fields}
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


def check_pool(tokens: str, pool: tuple[int, int] | None) -> None:
    """Raises SettingsError for a size to which nothing can be pooled."""
    if pool is None:
        return
    if len(pool) != 2 or any(type(side) is not int or side < 1 for side in pool):
        raise SettingsError(f"pool is {pool!r}, which is not rows x columns of 1 or more: give such as 8x8")
    if tokens != "patches":
        raise SettingsError(
            f"pool is {pool_text(pool)} and tokens is {tokens}: only a grid of patches can be pooled; store patches, "
            "or leave pool out"
        )


def fits(pool: tuple[int, int] | None, grid: Sequence[int]) -> bool:
    """Whether a frame's grid has as many rows and columns as it is to be pooled to."""
    return pool is None or (grid[0] >= pool[0] and grid[1] >= pool[1])


def check_grid(pool: tuple[int, int] | None, grid: Sequence[int]) -> None:
    """Raises FrameError where a frame's grid is smaller than what it is to be pooled to."""
    if not fits(pool, grid):
        raise FrameError(
            f"a frame has {grid[0]} x {grid[1]} patches (rows x columns), fewer than the {pool_text(pool)} to which "
            "they are to be averaged; use a larger --image_size or a smaller --pool"
        )


def parse_layers(text: str) -> tuple[int, ...]:
    """Of `--layers 11,17,-1`. Raises SettingsError."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise SettingsError(
            f"--layers {text!r} is no list of layers: give whole numbers with commas, such as 11,17,-1"
        ) from error


def _one_or_several(layers: Sequence[int]) -> int | str:
    return layers[0] if len(layers) == 1 else ",".join(map(str, layers))


def parse_pool(text: str) -> tuple[int, int]:
    """Of `--pool 8x8`: rows and columns. Raises SettingsError."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if match is None:
        raise SettingsError(f"--pool {text!r} is not rows x columns: give such as 8x8")
    return int(match[1]), int(match[2])


def pool_text(pool: Sequence[int] | None) -> str:
    """As the flag is written: `8x8`, and `none` where nothing is pooled."""
    return "x".join(map(str, pool)) if pool is not None else "none"


def frame_digest(data: bytes) -> bytes:
    """sha256 of an image file's bytes, 32 bytes. What is hashed is what is decoded: the same buffer."""
    return hashlib.sha256(data).digest()


def pixel_digest(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> bytes:
    """sha256 of a frame as the encoder sees it, 32 bytes.

    `pixels` [H, W, 3]: uint8, or float32 in [0, 1] where they are not all k / 255 (see `pixels.as_levels`).
    """
    tag = {"uint8": b"u8", "float32": b"f32"}[pixels.dtype.name]
    height, width, _ = pixels.shape
    hasher = hashlib.sha256(
        b"vggt-feature-cache pixels 1\0" + tag + b"\0" + struct.pack("<II", height, width)
    )
    hasher.update(pixels.astype(pixels.dtype.newbyteorder("<"), order="C", copy=False).data)
    return hasher.digest()


def pixel_key(spec: FeatureSpec, digests: Sequence[bytes]) -> bytes:
    """The key of a feature by its frames' `pixel_digest`s, whatever preprocessing made them."""
    return feature_key(spec.of_given_pixels, digests)


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
