"""What may be loaded: a plain Qwen2.5-VL, a checkpoint made here, a released JanusVLN checkpoint.

Everything is decided from names and shapes in the headers of the safetensors files, before a weight is read:
random weights never stand in for missing ones without a word.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from janusvln.model.config import OWN_FIELDS, JanusVLNConfig, as_janusvln_config
from vggt_cache.encoder.files import (
    CONFIG,
    HUB_ID,
    INDEX,
    WEIGHTS,
    TensorFile,
    download,
    find_files,
    read_json,
)
from vggt_cache.environment import rank_of
from vggt_cache.errors import CheckpointError, os_errors_as
from vggt_cache.output import print_line

Shapes = Mapping[str, tuple[int, ...]]

MAY_BE_FRESH = [r"^merger\.", r"^action_head\."]
LEFT_OUT = [r"^vggt\.", r"rotary_emb\.inv_freq$"]
"""VGGT's weights in a released checkpoint, and buffers that old versions of transformers saved."""
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
ADAPTER_CONFIG = "adapter_config.json"
SETTINGS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
"""Of images, videos and prompts; transformers 5 writes the first ones into processor_config.json."""
_EARLY_PROCESSOR = '"Qwen2_5_VLImageProcessor"', '"Qwen2VLImageProcessor"'
"""What the first Qwen2.5-VL directories call their image processor, and its name since, under which it is found."""
_OLD_LAYOUT = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)
"""Names in files (also those that transformers writes today) to names in the model."""
RELEASED_FEATURES = {"context": "causal", "image_size": 644, "resize_mode": "crop"}
"""Features that JanusVLN's published training uses, from VGGT's last layer but one; its configuration does not say."""


@dataclass(frozen=True, kw_only=True)
class ModelCheckpoint:
    """A directory whose headers were read."""

    location: str
    directory: Path
    fields: Mapping[str, Any]
    """config.json"""
    shapes: Shapes
    """By name in the model, without what is left out."""
    vggt: tuple[str, ...]
    """Names of VGGT's weights that lie beside them."""

    @property
    def has_merger(self) -> bool:
        return any(name.startswith("merger.") for name in self.shapes)

    @property
    def is_ours(self) -> bool:
        """Whether `save_pretrained` of our model wrote it."""
        return all(name in self.fields for name in OWN_FIELDS)


def open_checkpoint(location: str | os.PathLike[str], **hub: Any) -> ModelCheckpoint:
    """Reads headers only. Raises CheckpointError when there is nothing that can be loaded safely.

    location: a directory, or a hub id, which is downloaded; `hub`: cache_dir, revision, token for that.
    """
    directory = find_directory(os.fspath(location), **hub)
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / WEIGHTS).is_file():
        raise CheckpointError(
            f"{location} holds LoRA adapters and no whole model: make one of both with python -m janusvln.export.merge "
            f"{location} OUT, and give OUT"
        )
    remedy = ": check the path and its permissions"
    with os_errors_as(CheckpointError, f"{location} cannot be read", remedy):
        fields, stored = read_json(directory / CONFIG), _stored_shapes(directory)
    return ModelCheckpoint(
        location=os.fspath(location),
        directory=directory,
        fields=fields,
        shapes={
            name_in_model(name): shape
            for name, shape in stored.items()
            if not any(re.search(pattern, name) for pattern in LEFT_OUT)
        },
        vggt=tuple(name for name in stored if name.startswith("vggt.")),
    )


def name_in_model(name: str) -> str:
    """The model's name for a weight that a file may call as transformers 4 did."""
    for pattern, replacement in _OLD_LAYOUT:
        if pattern.search(name):
            return pattern.sub(replacement, name)
    return name


def configure(found: ModelCheckpoint, config: Any, arguments: dict[str, Any]) -> JanusVLNConfig:
    """The configuration to build: `config` or the checkpoint's, then our fields among `arguments` (taken out)."""
    if not isinstance(config, PreTrainedConfig):
        config = JanusVLNConfig.from_pretrained(str(config or found.directory))
    own = copy.deepcopy(as_janusvln_config(config))
    if found.has_merger and not found.is_ours:
        own.update(_as_released(found))
    own.update({name: arguments.pop(name) for name in OWN_FIELDS if name in arguments})
    return own


def check(found: ModelCheckpoint, config: JanusVLNConfig, expected: Shapes) -> None:
    """Raises CheckpointError unless the files hold exactly `expected`, up to what may be fresh; says what is."""
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    missing = [name for name in expected if name not in found.shapes and name not in tied]
    plain = not found.has_merger and not found.is_ours and not found.vggt
    # Parts of the model that this checkpoint cannot be expected to have, and what to call them.
    fresh = {"merger": "the spatial merger"} if plain else {}
    if not found.fields.get("action_head"):
        fresh["action_head"] = "the action head"
    refuse(found, "lacks", [name for name in missing if name.split(".")[0] not in fresh])
    refuse(found, "also holds", [name for name in found.shapes if name not in expected])
    other = [(name, shape) for name, shape in expected.items() if found.shapes.get(name, shape) != shape]
    words = [f"{name} ({list(found.shapes[name])}, not {list(shape)})" for name, shape in other]
    refuse(found, "has in other shapes", words)
    if rank_of("RANK", 0):
        return
    parts = {name.split(".")[0] for name in missing}
    if starting := [words for name, words in fresh.items() if name in parts]:
        kind = "is a plain Qwen2.5-VL" if "merger" in parts else "was trained without an action head"
        verb = "starts" if len(starting) == 1 else "start"
        print_line("INFO", f"{found.location} {kind}: {' and '.join(starting)} {verb} from fresh weights")
    if found.vggt:
        print_line(
            "INFO",
            f"{found.location} is a JanusVLN checkpoint: its {len(found.vggt)} weights of VGGT (vggt.*) are left out, "
            "features come with the batch",
        )


def find_directory(location: str, **hub: Any) -> Path:
    """`location` as a local directory; a hub id is downloaded, with all that tokenizer and processor are made of.

    hub: cache_dir, revision, token for that. Raises CheckpointError.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(location):
        raise CheckpointError(
            f"{location} is no directory: give the directory of a Qwen2.5-VL or JanusVLN checkpoint ({CONFIG} and "
            f"{WEIGHTS}), or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    return download(location, HUB_FILES, **hub)


def copy_settings(source: Path, target: Path) -> None:
    """Put the settings of a model's processor, which no model or tokenizer saves, beside another model."""
    for path in map(source.joinpath, SETTINGS):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            (target / path.name).write_text(text.replace(*_EARLY_PROCESSOR), encoding="utf-8")


def share(directory: Path) -> None:
    """Give weights, which safetensors keeps to their owner (0600), the mode that the umask leaves config.json."""
    mode = (directory / CONFIG).stat().st_mode & 0o777
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    if not (directory / WEIGHTS).is_file() and not (directory / INDEX).is_file():
        pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        reason = (
            f"only {pickles[0]}, a pickle, which can run any code when loaded" if pickles else "no weights"
        )
        raise CheckpointError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}, {reason}: use a checkpoint in safetensors, or "
            "convert this one where you trust it (save_pretrained of transformers writes safetensors)"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path, promised in find_files(directory).items():
        with TensorFile(path) as file:
            shapes |= {name: entry.shape for name, entry in file.entries.items()}
            lost = sorted((promised or frozenset()) - file.entries.keys())
        if lost:
            raise CheckpointError(
                f"{path} lacks {lost[0]}, which {INDEX} promises there: the checkpoint is incomplete; download or "
                "copy it again"
            )
    return shapes


def _as_released(found: ModelCheckpoint) -> dict[str, Any]:
    """What a released checkpoint's configuration does not say, from its weights and its published training."""
    norm, first = (found.shapes.get(f"merger.{name}.weight", ()) for name in ("ln_q", "mlp.0"))
    fields: dict[str, Any] = {"feature_spec": dict(RELEASED_FEATURES)}
    pairs = {name.split(".")[3] for name in found.vggt if name.startswith("vggt.aggregator.global_blocks.")}
    if len(pairs) > 1:
        fields["feature_spec"]["layer"] = len(pairs) - 2
    if len(norm) == 1:
        fields["spatial_channels"] = norm[0]
    if len(first) == 2:
        fields["spatial_hidden_size"] = first[0]
    return fields


def refuse(found: ModelCheckpoint, what: str, names: list[str]) -> None:
    """Raises CheckpointError where there are any names of weights that are not as they should be."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"{found.location} {what} {', '.join(names[:3])}{more}: it is not the checkpoint that its configuration "
            "describes, and would run with random or unused weights; use a complete Qwen2.5-VL or JanusVLN checkpoint"
        )
