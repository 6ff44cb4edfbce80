"""Checkpoints: checked against their architecture, identified and loaded.

Accepted are VGGT checkpoints (names `aggregator.*`, architecture in config.json) and those of models that hold a VGGT
(`vggt.aggregator.*`, `spatial_encoder.vggt_model.aggregator.*`; their config.json describes the language model, so the
architecture follows from the shapes). Other names, such as VGGT's heads, are not looked at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vggt_cache.encoder.config import VIT_SIZES, EncoderConfig
from vggt_cache.encoder.files import CONFIG, DTYPES, Entry, TensorFile, find_directory, find_files, read_json
from vggt_cache.encoder.model import Encoder
from vggt_cache.errors import CheckpointError, SettingsError, os_errors_as
from vggt_cache.identity import EncoderSpec

VGGT_PREFIX = "aggregator."
_PREFIX = re.compile(r"(?:.+?\.)?aggregator\.")
"""What stands before a weight's own name: `aggregator.`, after the places of VGGT in a larger model."""
_LISTED = 10
T = TypeVar("T")


class WeightsDigest:
    """sha256 over weights that are added in the order of their names: names, dtypes, shapes and bytes."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha256(b"vggt-feature-cache weights 1\0")

    def add(self, name: str, weight: Tensor) -> None:
        """`weight`: of one of DTYPES, on any device."""
        (dtype,) = (known for known, torch_dtype in DTYPES.items() if torch_dtype == weight.dtype)
        self._hasher.update(json.dumps([name, dtype, list(weight.shape)]).encode() + b"\n")
        self._hasher.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)

    def hex(self) -> str:
        return self._hasher.hexdigest()


class Checkpoint:
    """Checked against its architecture, nothing loaded yet. Make one with `open`."""

    def __init__(
        self, location: str, config: EncoderConfig, layers: Sequence[int], places: Mapping[str, Entry]
    ) -> None:
        self.location = location
        self.config = config
        self.layers, self.layer = tuple(layers), layers[-1]
        """Outputs to compute, ascending pair indexes counted from 0; and the highest."""
        self._places = {name: places[name] for name in sorted(on_meta(config, layers).state_dict())}
        self._digest: str | None = None

    @classmethod
    def open(cls, location: str, *, layer: int | Sequence[int] = -2) -> Checkpoint:
        """The checkpoint at `location`: a directory, or a hub id such as `facebook/VGGT-1B` (downloaded).

        `layer`: output to compute, or several; negative values count from the end. Reads headers only. Raises
        CheckpointError when the checkpoint is absent, only there as a pickle, damaged, or not exactly
        the aggregator that its configuration describes; SettingsError when it has no such layer.
        """
        remedy = ": check the path and its permissions"
        with os_errors_as(CheckpointError, f"{location} cannot be read", remedy):
            config, places = _checked_weights(find_directory(location))
        return cls(location, config, config.absolute_layers(layer), places)

    def weights_digest(self) -> str:
        """sha256 (hex) over the weights that `layers` need, in their stored dtypes.

        Covers names (without prefix), dtypes, shapes and bytes in the order of the names, so that it does not
        depend on sharding, on the prefix, or on weights that no feature depends on. Reads one tensor at a time.
        """
        if self._digest is None:
            deque(self._tensors(), maxlen=0)
        assert self._digest is not None
        return self._digest

    def spec(self, compute_dtype: str) -> EncoderSpec:
        """The encoder's part of a feature's identity."""
        digest, architecture = self.weights_digest(), dataclasses.asdict(self.config)
        return EncoderSpec(
            weights_digest=digest, **architecture, layer=self.layer, compute_dtype=compute_dtype
        )

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        compute_dtype: str = "float32",
        tokens: str = "patches",
        pool: tuple[int, int] | None = None,
    ) -> Encoder:
        """The encoder on `device`: matrices in `compute_dtype`, everything else in float32.

        `tokens`, `pool`: what of the outputs it gives, see FeatureSpec.
        Raises CheckpointError when a weight is NaN or infinite, or when the weights are no longer those of
        `weights_digest`; SettingsError for a device that is not there.
        """
        target = _available(device)
        encoder = on_meta(self.config, self.layers, compute_dtype, tokens=tokens, pool=pool)
        dtypes = {name: weight.dtype for name, weight in encoder.state_dict().items()}
        weights: dict[str, Tensor] = {}
        for name, weight in self._tensors():
            if not weight.isfinite().all():
                place = self._places[name]
                raise CheckpointError(
                    f"{place.path} holds NaN or infinite values in {place.name}: features would be NaN; "
                    "download the checkpoint again, or use another one"
                )
            weights[name] = weight.to(target, dtypes[name])
        encoder.load_state_dict(weights, assign=True)
        return encoder

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights in use by name; when all are read, their digest is set, or compared with the earlier one."""
        digest = WeightsDigest()
        with ExitStack() as stack:
            files: dict[Path, TensorFile] = {}
            for name, place in self._places.items():
                if place.path not in files:
                    files[place.path] = stack.enter_context(TensorFile(place.path))
                file = files[place.path]
                if file.entries.get(place.name) != place:
                    raise self._changed()
                weight = file.read(place.name)
                digest.add(name, weight)
                yield name, weight
        if self._digest not in (None, digest.hex()):
            raise self._changed()
        self._digest = digest.hex()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"the weights at {self.location} changed while they were in use: features would carry the "
            "identity of other weights; leave the checkpoint alone, and start again"
        )


def expected_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Exactly the names below `aggregator.` that a checkpoint must have, with their shapes.

    All pairs, whichever layer is used: an incomplete checkpoint is a damaged one. Includes DINOv2's `mask_token`, which
    every checkpoint has and no feature depends on.
    """
    weights = on_meta(config, layer=-1).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return {**shapes, "patch_embed.mask_token": (1, config.embed_dim)}


def on_meta(
    config: EncoderConfig, layer: int | Sequence[int], compute_dtype: str = "float32", **output: Any
) -> Encoder:
    with torch.device("meta"):
        return Encoder(config, layer=layer, compute_dtype=compute_dtype, **output)


def _available(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(
            f"device is {device!r}, which torch does not know: use cpu or cuda (or cuda:1)"
        ) from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device is {target}, but torch sees {torch.cuda.device_count()} CUDA devices: use cpu, or check the "
            "driver, CUDA_VISIBLE_DEVICES and that torch was installed with CUDA"
        )
    return target


def _checked_weights(directory: Path) -> tuple[EncoderConfig, dict[str, Entry]]:
    """The architecture, and the place of every weight by its name below `aggregator.`. Raises CheckpointError."""
    prefix, places = _find_places(directory)
    if prefix != VGGT_PREFIX:
        config = infer_config(directory, {name: place.shape for name, place in places.items()})
    elif (directory / CONFIG).is_file():
        config = EncoderConfig.from_dict(read_json(directory / CONFIG))
    else:
        raise CheckpointError(
            f"{directory} has no {CONFIG}, so its architecture is not known: put the one from facebook/VGGT-1B beside "
            'the weights (it says {"embed_dim": 1024, "img_size": 518, "patch_size": 14})'
        )
    _check_weights(directory, config, places)
    return config, places


def _find_places(directory: Path) -> tuple[str, dict[str, Entry]]:
    """The prefix in use, and where each weight below it is stored, by its name without prefix."""
    places: dict[str, Entry] = {}
    for path, expected in find_files(directory).items():
        if expected is not None and not any(map(_PREFIX.match, expected)):
            continue
        with TensorFile(path) as file:
            absent = sorted((expected or set()) - file.entries.keys())
            if absent:
                raise CheckpointError(
                    f"{path} lacks {_listed(absent)}, which the index beside it says it holds: files of two "
                    "checkpoints were mixed; download or copy all of them again"
                )
            for name in file.entries if expected is None else expected:
                places[name] = file.entries[name]
    return below_prefix(directory, places)


def below_prefix(location: object, weights: Mapping[str, T]) -> tuple[str, dict[str, T]]:
    """The prefix of the one aggregator among these, and what is below it by its name without prefix.

    Raises CheckpointError.
    """
    found = sorted({match[0] for name in weights if (match := _PREFIX.match(name))})
    if len(found) != 1:
        names = " and ".join(f"{prefix}*" for prefix in found) or _listed(sorted(weights))
        raise CheckpointError(
            f"{location} has weights named {names}, where exactly one aggregator is needed ({VGGT_PREFIX}* as in VGGT, "
            f"or vggt.{VGGT_PREFIX}* or the like of a model that holds one): it is not a VGGT checkpoint; get one from "
            "facebook/VGGT-1B"
        )
    start = len(found[0])
    return found[0], {name[start:]: one for name, one in weights.items() if name.startswith(found[0])}


def config_of_shapes(shapes: Mapping[str, Sequence[int]]) -> EncoderConfig:
    """The architecture that the shapes of weights imply; every one of them is still to be compared with it.

    Raises a LookupError or ArithmeticError, or ValueError, where they are of no known one.
    """
    embed_dim = shapes["camera_token"][-1]
    patch_size = shapes["patch_embed.patch_embed.proj.weight"][-1]
    size = (embed_dim, _count(r"patch_embed\.blocks", shapes.keys()))
    return EncoderConfig(
        embed_dim=embed_dim,
        img_size=math.isqrt(shapes["patch_embed.pos_embed"][1] - 1) * patch_size,
        patch_size=patch_size,
        depth=_count("(?:frame|global)_blocks", shapes.keys()),
        num_heads=embed_dim // shapes["frame_blocks.0.attn.q_norm.weight"][0],
        patch_embed=next((name for name, vit in VIT_SIZES.items() if (vit.embed_dim, vit.depth) == size), ""),
    )


def infer_config(directory: Path, shapes: Mapping[str, Sequence[int]]) -> EncoderConfig:
    """The architecture that the shapes imply; `_check_weights` then compares every one of them with it."""
    try:
        return config_of_shapes(shapes)
    except (LookupError, ValueError, ArithmeticError, CheckpointError) as error:
        raise CheckpointError(
            f"the VGGT in {directory} is not of a known architecture, or lacks the weights that show which: it is "
            "damaged or of another model; use a complete checkpoint of the model, or facebook/VGGT-1B"
        ) from error


def _count(blocks: str, names: Collection[str]) -> int:
    matches = (re.match(rf"{blocks}\.(\d{{1,4}})\.", name) for name in names)
    return 1 + max(int(match[1]) for match in matches if match)


def _check_weights(directory: Path, config: EncoderConfig, places: Mapping[str, Entry]) -> None:
    shapes, found = expected_shapes(config), {name: places[name] for name in sorted(places)}
    misshapen = [
        f"{name} {list(entry.shape)} instead of {list(shapes[name])}"
        for name, entry in found.items()
        if name in shapes and entry.shape != shapes[name]
    ]
    differences = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unexpected": sorted(found.keys() - shapes.keys()),
        "of another shape": misshapen,
    }
    problems = [f"{len(names)} {what}: {_listed(names)}" for what, names in differences.items() if names]
    if problems:
        raise CheckpointError(
            f"the weights in {directory} are not those of the aggregator that its configuration describes "
            f"({'; '.join(problems)}): it is incomplete or of another architecture; get a complete one, or correct "
            f"{CONFIG}"
        )
    wrong = [f"{name} {entry.dtype}" for name, entry in found.items() if entry.dtype not in DTYPES]
    if wrong:
        raise CheckpointError(
            f"{directory} has {len(wrong)} weights of a dtype that is not one of {', '.join(DTYPES)} ({_listed(wrong)})"
            ": quantised or converted weights are not VGGT's; use the original checkpoint"
        )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_LISTED]) or "nothing"
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
