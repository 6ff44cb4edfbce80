"""Which features a training run uses: the cache's, or those of an encoder that runs live.

Context, image size, layer and numerics come from the cache. Flags can only agree with it, or say which of
several caches in a directory is meant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.errors import AmbiguousCacheError, CacheNotFoundError, NotACacheError, SettingsError
from vggt_cache.identity import FeatureSpec, Preprocessing
from vggt_cache.precompute.settings import choose_compute_dtype
from vggt_cache.store import FeatureCache, create_store, list_stores
from vggt_cache.store.directory import describe_spec

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


@dataclass(frozen=True, kw_only=True)
class WantedFeatures:
    """What the flags say about features; None where they say nothing."""

    context: str | None = None
    image_size: int | None = None
    resize_mode: str | None = None
    alpha: str | None = None
    layer: int | None = None
    feature_dtype: str | None = None
    compute_dtype: str | None = None
    fingerprint: str | None = None
    """First hex digits of a specification's fingerprint."""

    def contradictions(self, spec: FeatureSpec) -> list[str]:
        """Flags that do not agree with a specification, each with both values."""
        found = [
            f"--{name} {getattr(self, name)} (the cache: {value})"
            for name, value in spec.contradictions(asdict(self)).items()
        ]
        if self.fingerprint and not spec.fingerprint.startswith(self.fingerprint):
            found.append(f"--vggt_cache_fingerprint {self.fingerprint} (the cache: {spec.fingerprint[:16]})")
        return found

    def spec_of(self, location: str, device: str) -> FeatureSpec:
        """A new specification; what the flags leave open is as published. Reads VGGT's weights, for their digest."""
        named = AS_PUBLISHED | {name: value for name, value in asdict(self).items() if value is not None}
        checkpoint = Checkpoint.open(location, layer=named["layer"])
        return FeatureSpec(
            encoder=checkpoint.spec(choose_compute_dtype(named["compute_dtype"], device)),
            preprocessing=Preprocessing(
                image_size=named["image_size"], resize_mode=named["resize_mode"], alpha=named["alpha"]
            ),
            context=named["context"],
            feature_dtype=named["feature_dtype"],
        )


def open_cache(
    cache_dir: str, wanted: WantedFeatures, *, fill: bool, location: str | None, device: str
) -> FeatureCache:
    """The cache to train from; with `fill`, made where there is none that agrees with the flags.

    Raises SettingsError where the flags contradict the cache, and what opening raises.
    """
    specs = _stores(cache_dir, fill)
    agreeing = [spec for spec in specs if not wanted.contradictions(spec)]
    if len(agreeing) == 1:
        return FeatureCache.open(cache_dir, spec=agreeing[0])
    if len(agreeing) > 1:
        raise AmbiguousCacheError(
            f"{cache_dir} holds {len(agreeing)} caches that could be meant: "
            f"{'; '.join(map(describe_spec, agreeing))}; say which one, by --context or --vggt_cache_fingerprint"
        )
    if not fill:
        raise _contradiction(cache_dir, wanted, specs)
    spec = live_spec(wanted, location, device)
    create_store(cache_dir, spec)
    return FeatureCache.open(cache_dir, spec=spec)


def live_spec(wanted: WantedFeatures, location: str | None, device: str) -> FeatureSpec:
    """The specification of features that are computed here. Reads all weights once, for their digest."""
    if not location:
        raise SettingsError(
            "neither VGGT_CACHE_DIR (or --vggt_cache_dir) nor --vggt_model_path is given, so there are no features to "
            "train on: give a cache, or VGGT's path to compute them live"
        )
    return wanted.spec_of(location, device)


def summary(spec: FeatureSpec) -> dict[str, object]:
    """What a trained model's config says about the features it was trained with."""
    return {
        **spec.settings,
        "weights_digest": spec.encoder.weights_digest,
        "fingerprint": spec.fingerprint,
    }


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
    differing = _differing(trained, spec)
    _refuse(trained, spec, model, [name for name in MUST_AGREE if name in differing])
    return _told(trained, spec, model, [name for name in ("image_size", "resize_mode") if name in differing])


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
    differing = _differing(trained, spec)
    _refuse(trained, spec, checkpoint, [name for name in MUST_AGREE_TO_RESUME if name in differing])
    return _told(trained, spec, checkpoint, [name for name in ROUNDING if name in differing])


def _differing(trained: dict[str, Any], spec: FeatureSpec) -> list[str]:
    """Names of what is another now. Fingerprints are compared as if the roundings were equal."""
    feature_dtype, compute_dtype = (trained.get(name, summary(spec)[name]) for name in ROUNDING)
    rounded = replace(
        spec, feature_dtype=feature_dtype, encoder=replace(spec.encoder, compute_dtype=compute_dtype)
    )
    now = summary(spec) | {"fingerprint": rounded.fingerprint}
    return [name for name in now if trained.get(name) not in (None, now[name])]


def _refuse(trained: dict[str, Any], spec: FeatureSpec, model: str, names: Sequence[str]) -> None:
    if names:
        name = names[0]
        raise SettingsError(
            f"{model} was trained with features of {name} {trained[name]}, and those of this run have {name} "
            f"{summary(spec)[name]}: they are different numbers, so the model would silently be wrong; use a "
            f"cache with {name} {trained[name]}, or start from a model that was not trained with other features, in "
            "an empty --output_dir"
        )


def _told(trained: dict[str, Any], spec: FeatureSpec, model: str, names: Sequence[str]) -> list[str]:
    return [
        f"{model} was trained with features of {name} {trained[name]}, and goes on with {name} {summary(spec)[name]}"
        for name in names
    ]


def _stores(cache_dir: str, fill: bool) -> Sequence[FeatureSpec]:
    try:
        return list_stores(cache_dir)
    except (CacheNotFoundError, NotACacheError):
        if fill:
            return []
        raise


def _contradiction(cache_dir: str, wanted: WantedFeatures, specs: Sequence[FeatureSpec]) -> Exception:
    if not specs:
        return NotACacheError(
            f"{os.path.abspath(cache_dir)} holds no feature cache: check VGGT_CACHE_DIR, or make the cache with "
            "scripts/precompute_vggt_features.py (or train with --vggt_cache_miss fill)"
        )
    return SettingsError(
        f"{' and '.join(wanted.contradictions(specs[0]))} contradicts {cache_dir}, which holds "
        f"{'; '.join(map(describe_spec, specs))}: leave the flag out to use the cache as it is, or precompute with it"
    )
