"""Which weights a checkpoint holds, where, and whether they are exactly those of its architecture.

Accepted are VGGT checkpoints (names `aggregator.*`, architecture in config.json) and JanusVLN checkpoints
(`vggt.aggregator.*`; their config.json describes the language model, so the architecture follows from
the shapes). Other names, such as VGGT's heads, are not looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vggt_cache.encoder.config import VIT_SIZES, EncoderConfig
from vggt_cache.encoder.locate import CONFIG, find_files, read_json
from vggt_cache.encoder.model import Encoder
from vggt_cache.encoder.tensor_file import DTYPES, TensorEntry, TensorFile
from vggt_cache.errors import CheckpointError

VGGT_PREFIX = "aggregator."
JANUSVLN_PREFIX = "vggt.aggregator."
_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a weight is stored, and under which name."""

    path: Path
    name: str
    entry: TensorEntry


def checked_weights(directory: Path) -> tuple[EncoderConfig, dict[str, Place]]:
    """The architecture, and the place of every weight by its name below `aggregator.`. Raises CheckpointError."""
    prefix, places = _find_places(directory)
    config = _read_config(directory) if prefix == VGGT_PREFIX else _infer_config(directory, places)
    _check_weights(directory, config, places)
    return config, places


def expected_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Exactly the names below `aggregator.` that a checkpoint must have, with their shapes.

    All pairs, whichever layer is used: an incomplete checkpoint is a damaged one. Includes DINOv2's `mask_token`, which
    every checkpoint has and no feature depends on.
    """
    weights = on_meta(config, layer=-1).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return {**shapes, "patch_embed.mask_token": (1, config.embed_dim)}


def on_meta(config: EncoderConfig, layer: int, compute_dtype: str = "float32") -> Encoder:
    with torch.device("meta"):
        return Encoder(config, layer=layer, compute_dtype=compute_dtype)


def _find_places(directory: Path) -> tuple[str, dict[str, Place]]:
    """The prefix in use, and where each weight below it is stored, by its name without prefix."""
    places: dict[str, Place] = {}
    for path, expected in find_files(directory).items():
        if expected is not None and not any(
            name.startswith((VGGT_PREFIX, JANUSVLN_PREFIX)) for name in expected
        ):
            continue
        with TensorFile(path) as file:
            absent = sorted((expected or set()) - file.entries.keys())
            if absent:
                raise CheckpointError(
                    f"{path} lacks {_listed(absent)}, which the index beside it says it holds: files of two "
                    "checkpoints were mixed; download or copy all of them again"
                )
            for name in file.entries if expected is None else expected:
                places[name] = Place(path=path, name=name, entry=file.entries[name])
    found = [
        prefix for prefix in (VGGT_PREFIX, JANUSVLN_PREFIX) if any(name.startswith(prefix) for name in places)
    ]
    if len(found) != 1:
        names = " and ".join(f"{prefix}*" for prefix in found) or _listed(sorted(places))
        raise CheckpointError(
            f"{directory} has weights named {names}, where exactly one of {VGGT_PREFIX}* (VGGT) and "
            f"{JANUSVLN_PREFIX}* (JanusVLN) is needed: it is not a VGGT checkpoint; get one from facebook/VGGT-1B"
        )
    start = len(found[0])
    return found[0], {name[start:]: place for name, place in places.items() if name.startswith(found[0])}


def _read_config(directory: Path) -> EncoderConfig:
    if not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory} has no {CONFIG}, so its architecture is not known: put the one from facebook/VGGT-1B beside "
            'the weights (it says {"embed_dim": 1024, "img_size": 518, "patch_size": 14})'
        )
    return EncoderConfig.from_dict(read_json(directory / CONFIG))


def _infer_config(directory: Path, places: Mapping[str, Place]) -> EncoderConfig:
    """The architecture that the shapes imply; `_check_weights` then compares every one of them with it."""
    shapes = {name: place.entry.shape for name, place in places.items()}
    try:
        embed_dim = shapes["camera_token"][-1]
        patch_size = shapes["patch_embed.patch_embed.proj.weight"][-1]
        side = math.isqrt(shapes["patch_embed.pos_embed"][1] - 1)
        num_heads = embed_dim // shapes["frame_blocks.0.attn.q_norm.weight"][0]
        size = (embed_dim, _count(r"patch_embed\.blocks", shapes))
        tower = next(name for name, vit in VIT_SIZES.items() if (vit.embed_dim, vit.depth) == size)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as error:
        raise CheckpointError(
            f"the VGGT in {directory} is not of a known architecture, or lacks the weights that show which: it is "
            "damaged or of another model; use a complete JanusVLN checkpoint, or facebook/VGGT-1B"
        ) from error
    return EncoderConfig(
        embed_dim=embed_dim,
        img_size=side * patch_size,
        patch_size=patch_size,
        depth=_count("(?:frame|global)_blocks", shapes),
        num_heads=num_heads,
        patch_embed=tower,
    )


def _count(blocks: str, names: Collection[str]) -> int:
    matches = (re.match(rf"{blocks}\.(\d{{1,4}})\.", name) for name in names)
    return 1 + max(int(match[1]) for match in matches if match)


def _check_weights(directory: Path, config: EncoderConfig, places: Mapping[str, Place]) -> None:
    shapes = expected_shapes(config)
    missing = sorted(shapes.keys() - places.keys())
    unexpected = sorted(places.keys() - shapes.keys())
    misshapen = [
        f"{name} {list(place.entry.shape)} instead of {list(shapes[name])}"
        for name, place in sorted(places.items())
        if name in shapes and place.entry.shape != shapes[name]
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(found.values()):
        problems = "; ".join(
            f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names
        )
        raise CheckpointError(
            f"the weights in {directory} are not those of the aggregator that its configuration describes "
            f"({problems}): it is incomplete or of another architecture; get a complete one, or correct {CONFIG}"
        )
    wrong = [
        f"{name} {place.entry.dtype}"
        for name, place in sorted(places.items())
        if place.entry.dtype not in DTYPES
    ]
    if wrong:
        raise CheckpointError(
            f"{directory} has {len(wrong)} weights of a dtype that is not one of {', '.join(DTYPES)} ({_listed(wrong)})"
            ": quantised or converted weights are not VGGT's; use the original checkpoint"
        )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_LISTED]) or "nothing"
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
