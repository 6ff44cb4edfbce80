"""Which features a training run uses: the cache's, or those of an encoder that runs live.

Context, image size, layer and numerics come from the cache. Flags can only agree with it, or say which of
several caches in a directory is meant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from janusvln.data.dataset import flag
from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.errors import (
    AmbiguousCacheError,
    CacheNotFoundError,
    CheckpointError,
    NotACacheError,
    SettingsError,
    VggtCacheError,
)
from vggt_cache.flags import about_flag
from vggt_cache.identity import FeatureSpec, Preprocessing
from vggt_cache.place import absolute
from vggt_cache.precompute.settings import PrecomputeSettings, choose_compute_dtype
from vggt_cache.store import FeatureCache, create_store, list_stores
from vggt_cache.store.directory import describe_spec
from vggt_cache.store.staged import Staging

AS_PUBLISHED: dict[str, Any] = {
    "context": "causal",
    "image_size": 644,
    "resize_mode": "crop",
    "alpha": "white",
    "layer": -2,
    "feature_dtype": "bfloat16",
    "compute_dtype": "auto",
}
"""What JanusVLN was published with: taken where there is no cache and no flag says otherwise."""


def _as_in_the_cache(name: str) -> Any:
    text = f"{about_flag(PrecomputeSettings, name)['help']} (default: the cache's; without one {AS_PUBLISHED[name]})"
    return flag(None, text.replace("%", "%%"))


@dataclass
class WantedFeatures:
    """What the flags say about features; None where they say nothing."""

    context: str | None = _as_in_the_cache("context")
    image_size: int | None = _as_in_the_cache("image_size")
    resize_mode: str | None = _as_in_the_cache("resize_mode")
    alpha: str | None = _as_in_the_cache("alpha")
    layer: int | None = _as_in_the_cache("layer")
    feature_dtype: str | None = _as_in_the_cache("feature_dtype")
    compute_dtype: str | None = _as_in_the_cache("compute_dtype")
    vggt_cache_fingerprint: str | None = flag(None, "which cache, where several share the directory")
    """First hex digits of a specification's fingerprint."""

    def contradictions(self, spec: FeatureSpec) -> list[str]:
        """Flags that do not agree with a specification, each with both values."""
        differing = spec.contradictions(asdict(self))
        if not spec.fingerprint.startswith(self.vggt_cache_fingerprint or ""):
            differing["vggt_cache_fingerprint"] = spec.fingerprint[:16]
        return [f"--{name} {getattr(self, name)} (the cache: {value})" for name, value in differing.items()]


def open_cache(
    cache_dir: str,
    wanted: WantedFeatures,
    *,
    fill: bool,
    location: str | None,
    device: str,
    io: str | None = None,
    stage: Staging | None = None,
) -> FeatureCache:
    """The cache to train from; with `fill`, made where there is none that agrees with the flags.

    Raises SettingsError where the flags contradict the cache, and what opening raises.
    """
    specs: Sequence[FeatureSpec] = ()
    try:
        specs = list_stores(cache_dir)
    except (CacheNotFoundError, NotACacheError):
        if not fill:
            raise
    agreeing = [spec for spec in specs if not wanted.contradictions(spec)]
    agreeing = [spec for spec in agreeing if not unfit(spec)] or agreeing
    if len(agreeing) > 1 and location and os.path.isdir(location):
        agreeing = _of_this_encoder(agreeing, location) or agreeing
    if len(agreeing) > 1:
        raise AmbiguousCacheError(
            f"{cache_dir} holds {len(agreeing)} caches that could be meant: "
            f"{'; '.join(map(describe_spec, agreeing))}; say which one, by --context or --vggt_cache_fingerprint "
            "(in the environment VGGT_CACHE_FINGERPRINT)"
        )
    if not agreeing and fill:
        agreeing = [live_spec(wanted, location, device)]
        create_store(cache_dir, agreeing[0])
    if agreeing:
        if unfit(agreeing[0]):
            raise SettingsError(unfit(agreeing[0]))
        return FeatureCache.open(cache_dir, spec=agreeing[0], io=io, stage=stage)
    if not specs:
        raise NotACacheError(
            f"{absolute(cache_dir)} holds no feature cache: check VGGT_CACHE_DIR, or make the cache with "
            "scripts/precompute_vggt_features.py (or train with --vggt_cache_miss fill)"
        )
    raise SettingsError(
        f"{' and '.join(wanted.contradictions(specs[0]))} contradicts {cache_dir}, which holds "
        f"{'; '.join(map(describe_spec, specs))}: leave the flag out to use the cache as it is, or precompute with it"
    )


def _of_this_encoder(specs: Sequence[FeatureSpec], location: str) -> list[FeatureSpec]:
    """Those made with the weights in a directory, all of which are read for it."""
    found = []
    with suppress(VggtCacheError):  # told when it is needed
        for spec in specs:
            checkpoint = Checkpoint.open(location, layer=spec.encoder.layer)
            if checkpoint.weights_digest() == spec.encoder.weights_digest:
                found.append(spec)
    return found


def live_spec(wanted: WantedFeatures, location: str | None, device: str) -> FeatureSpec:
    """The specification of features that are computed here; what the flags leave open is as published.

    Reads all of VGGT's weights once, for their digest.
    """
    if not location:
        raise SettingsError(
            "neither VGGT_CACHE_DIR (or --vggt_cache_dir) nor --vggt_model_path is given, so there are no features to "
            "train on: give a cache, or VGGT's path to compute them live"
        )
    given = {name: getattr(wanted, name) for name in AS_PUBLISHED}
    named = AS_PUBLISHED | {name: value for name, value in given.items() if value is not None}
    checkpoint = Checkpoint.open(location, layer=named["layer"])
    spec = FeatureSpec(
        encoder=checkpoint.spec(choose_compute_dtype(named["compute_dtype"], device)),
        preprocessing=Preprocessing(**{name: named[name] for name in ("image_size", "resize_mode", "alpha")}),
        context=named["context"],
        feature_dtype=named["feature_dtype"],
    )
    if unfit(spec):
        raise SettingsError(unfit(spec))
    return spec


def unfit(spec: FeatureSpec) -> str:
    """Why JanusVLN cannot be trained on such features, in a sentence; empty where it can."""
    if spec.axes == ("h", "w", spec.encoder.channels) and spec.pool is None:
        return ""
    return (
        f"these features are of context {spec.context}, {spec.kept_text}, and JanusVLN takes all patches of the last "
        "frame and of one layer: precompute with --context causal (or frame), one --layer and --tokens patches"
    )


def summary(spec: FeatureSpec) -> dict[str, object]:
    """What a trained model's config says about the features it was trained with."""
    named = {"weights_digest": spec.encoder.weights_digest, "fingerprint": spec.fingerprint}
    return {**spec.settings, **named}


# ------------------------------------------------------------ features that a model was trained with

MUST_AGREE = ("context", "layer", "weights_digest")
"""A model trained on one value of these has learned nothing about another."""
MUST_AGREE_TO_RESUME = (*MUST_AGREE, "image_size", "resize_mode", "alpha", "fingerprint")
"""A run that is resumed sees one kind of feature from its first step to its last. The fingerprint stands for all that
has no name here, such as our own computation's version."""
ROUNDING = ("feature_dtype", "compute_dtype")
"""These may differ even then: they move a feature within its rounding, and a cache may be converted meanwhile, or the
run go on on another device. How features are coded on disk is no part of a specification and is not compared."""


def check_trained_with(trained: dict[str, Any] | None, spec: FeatureSpec, model: str) -> list[str]:
    """Raises SettingsError where a model to start from was trained with other features.

    `trained` is the model's own summary, None for a model that has seen no features. Returns the
    differences that a user may want (another image size), as sentences.
    """
    if not trained:
        return []
    return _compared(trained, spec, model, refused=MUST_AGREE, told=("image_size", "resize_mode"))


def check_resumed_with(trained: dict[str, Any] | None, spec: FeatureSpec, checkpoint: str) -> list[str]:
    """Raises SettingsError where the checkpoint that a run would go on from was trained with other features.

    As `check_trained_with`, and stricter: only roundings may differ.
    """
    if not trained:
        raise SettingsError(
            f"{checkpoint} does not say which features it was trained with (feature_spec in its config.json), so "
            "whether this run's are the same cannot be known: give an empty --output_dir, and to go on from its "
            f"weights alone --model_name_or_path {checkpoint}"
        )
    return _compared(trained, spec, checkpoint, refused=MUST_AGREE_TO_RESUME, told=ROUNDING)


def _compared(
    trained: dict[str, Any], spec: FeatureSpec, model: str, *, refused: Sequence[str], told: Sequence[str]
) -> list[str]:
    """Fingerprints are compared as if the roundings were equal."""
    now = summary(spec)
    feature_dtype, compute_dtype = (trained.get(name, now[name]) for name in ROUNDING)
    encoder = replace(spec.encoder, compute_dtype=compute_dtype)
    rounded = replace(spec, feature_dtype=feature_dtype, encoder=encoder)
    same = now | {"fingerprint": rounded.fingerprint}
    differing = [name for name in same if trained.get(name) not in (None, same[name])]
    for name in refused:
        if name in differing:
            raise SettingsError(
                f"{model} was trained with features of {name} {trained[name]}, and those of this run have {name} "
                f"{now[name]}: they are different numbers, so the model would silently be wrong; use a "
                f"cache with {name} {trained[name]}, or start from a model that was not trained with other features, "
                "in an empty --output_dir"
            )
    return [
        f"{model} was trained with features of {name} {trained[name]}, and goes on with {name} {now[name]}"
        for name in told
        if name in differing
    ]


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
