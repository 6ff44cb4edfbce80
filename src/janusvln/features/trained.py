"""The encoder that a trained model's features came from, for computing more of the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.errors import CheckpointError, SettingsError


def features_of(model: str, feature_spec: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`feature_spec` of a model's configuration. Raises CheckpointError where the model has none."""
    if not feature_spec:
        raise CheckpointError(
            f"{model} does not say which features it was trained with (feature_spec in its config.json), so which ones "
            "to compute for it is not known: give a model that was trained here, or a released JanusVLN checkpoint"
        )
    return feature_spec


def encoder_of(model: str, feature_spec: Mapping[str, Any], vggt_model_path: str) -> Checkpoint:
    """The VGGT at `vggt_model_path`, up to the model's layer. Raises SettingsError where it is another one.

    Released checkpoints do not say which weights they were trained with: theirs are not compared.
    """
    vggt = Checkpoint.open(vggt_model_path, layer=feature_spec.get("layer", -2))
    trained = feature_spec.get("weights_digest")
    if trained is not None and trained != vggt.weights_digest():
        raise SettingsError(
            f"--vggt_model_path {vggt_model_path} holds another VGGT (weights {vggt.weights_digest()[:16]}) than the "
            f"one {model} was trained with (weights {trained[:16]}): its answers would be wrong without a word; give "
            "the one that it was trained with"
        )
    return vggt
