"""What JanusVLN's code, on transformers 4.50, expects to find where this project's checkpoints say it otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from janusvln.model.checkpoints import RELEASED_FEATURES
from janusvln.model.config import OWN_FIELDS, JanusVLNConfig
from vggt_cache.encoder.files import read_json
from vggt_cache.errors import CheckpointError, errors_as

TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_sliding_window", "sliding_window", "max_window_layers", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Of `text_config` here; at the top there."""
TOP_FIELDS = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings",
)  # fmt: skip
VISION_FIELDS = (
    "depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "in_channels", "patch_size",
    "spatial_merge_size", "temporal_patch_size", "tokens_per_second", "window_size", "out_hidden_size",
    "fullatt_block_indexes",
)  # fmt: skip
PUBLISHED_CHANNELS = 2048
"""JanusVLN's merger has this number written into its code; VGGT-1B gives it."""
_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


def published_name(name: str) -> str:
    """JanusVLN's name for a weight, from its name in our model."""
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def published_config(config: JanusVLNConfig, dtype: str) -> dict[str, Any]:
    """config.json in one level, with the fields that JanusVLN's code reads, and our own beside them.

    dtype: of the weights, such as `bfloat16`.
    """
    fields = config.to_dict()
    text, vision = fields["text_config"], fields["vision_config"]
    rope = dict(text["rope_parameters"])
    rope_theta = rope.pop("rope_theta")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGenerationForJanusVLN"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": dtype,
        "use_cache": True,
        **{name: text.get(name) for name in TEXT_FIELDS},
        **{name: fields[name] for name in TOP_FIELDS},
        "rope_theta": rope_theta,
        "rope_scaling": {"type": rope["rope_type"], **rope},
        "vision_config": {"model_type": "qwen2_5_vl", **{name: vision[name] for name in VISION_FIELDS}},
        **{name: fields[name] for name in OWN_FIELDS},
        "action_head": False,
        "vggt_merger_hidden_dim": config.spatial_hidden_size,
        "reference_frame": "first",
        "use_vggt_feature": True,
    }


def differences(config: JanusVLNConfig) -> list[str]:
    """What JanusVLN's code will do otherwise than this model's training did, as sentences for the user."""
    found = []
    spec = config.feature_spec or {}
    for name in ("image_size", "resize_mode"):
        if spec.get(name, RELEASED_FEATURES[name]) != RELEASED_FEATURES[name]:
            found.append(
                f"this model was trained with {name} {spec[name]}, and JanusVLN's code has {RELEASED_FEATURES[name]} "
                "written into its load_fn.py: change it there, or its answers will be worse"
            )
    if config.spatial_channels != PUBLISHED_CHANNELS:
        found.append(
            f"this model's features have {config.spatial_channels} channels, and JanusVLN's code builds VGGT-1B and a "
            f"merger of {PUBLISHED_CHANNELS}: it cannot load this model unless you change that"
        )
    if config.action_head:
        found.append("the action head is left out: JanusVLN's code has no place for it")
    return found


def processor_files(directory: Path) -> dict[str, str]:
    """Name and text of the files that transformers 4.50 makes tokenizer and processor of. Raises CheckpointError."""
    files = {name: text for name in _TOKENIZER_FILES if (text := _text(directory / name)) is not None}
    if "tokenizer.json" not in files and "vocab.json" not in files:
        raise CheckpointError(
            f"{directory} has no tokenizer.json, so nobody could ask the exported model anything: copy it from the "
            "Qwen2.5-VL that this model was trained from"
        )
    settings = read_json(directory / "tokenizer_config.json")
    files["tokenizer_config.json"] = as_json(_tokenizer_settings(settings))
    files["chat_template.json"] = as_json({"chat_template": _chat_template(directory, settings)})
    files["preprocessor_config.json"] = as_json(_image_settings(directory))
    if (generation := _text(directory / "generation_config.json")) is not None:
        files["generation_config.json"] = generation
    return files


def _tokenizer_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes a list into `extra_special_tokens`, at which 4.50 fails."""
    kept = {
        name: value
        for name, value in settings.items()
        if name not in ("backend", "is_local", "local_files_only")
    }
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return {**kept, "tokenizer_class": "Qwen2Tokenizer", "processor_class": "Qwen2_5_VLProcessor"}


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str:
    template = _text(directory / "chat_template.jinja")
    if template is None and (directory / "chat_template.json").is_file():
        template = read_json(directory / "chat_template.json").get("chat_template")
    template = settings.get("chat_template") if template is None else template
    if not isinstance(template, str):
        raise CheckpointError(
            f"{directory} has no chat template (chat_template.json or chat_template.jinja), which JanusVLN's "
            "evaluation makes its prompts with: copy it from the Qwen2.5-VL that this model was trained from"
        )
    return template


def _image_settings(directory: Path) -> dict[str, Any]:
    """4.50 reads limits as `min_pixels` and `max_pixels`; 5 says them in `size`."""
    try:
        settings: dict[str, Any] = Qwen2VLImageProcessorPil.from_pretrained(str(directory)).to_dict()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} has no preprocessor_config.json that can be read, which says how images are made numbers: "
            "copy it from the Qwen2.5-VL that this model was trained from"
        ) from error
    kept = {name: value for name, value in settings.items() if value is not None and not name.startswith("_")}
    size = settings["size"]
    return {
        **kept,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
    }


def _text(path: Path) -> str | None:
    fault, remedy = f"{path} cannot be read", ": copy or make it again"
    with errors_as(CheckpointError, fault, remedy, OSError, ValueError):
        return path.read_text(encoding="utf-8") if path.exists() else None


def as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
