"""Which of the stores in a cache directory is meant."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vggt_cache.errors import AmbiguousCacheError, NotACacheError, SettingsError, SpecMismatchError
from vggt_cache.identity import CONTEXTS, FeatureSpec
from vggt_cache.store.filesystem import FileSystem
from vggt_cache.store.layout import STORE_NAME, survey


def select_store(
    cache_dir: str,
    *,
    spec: FeatureSpec | None,
    fingerprint: str | None,
    context: str | None,
    fs: FileSystem,
) -> FeatureSpec:
    """The one store in `cache_dir` that agrees with all that is given.

    Raises SettingsError, CacheNotFoundError, NotACacheError, AmbiguousCacheError, SpecMismatchError,
    CacheAccessError.
    """
    _check_choice(fingerprint, context)
    found = survey(cache_dir, fs)
    for name, error in found.unreadable:
        if not found.specs or (spec is not None and name == spec.short_name):
            raise error
    if not found.specs:
        raise _no_store(cache_dir)
    chosen = [
        candidate
        for candidate in found.specs
        if (spec is None or candidate == spec)
        and candidate.fingerprint.startswith(fingerprint or "")
        and context in (None, candidate.context)
    ]
    if not chosen:
        raise _no_match(cache_dir, found.specs, spec, fingerprint, context)
    if len(chosen) > 1:
        raise AmbiguousCacheError(
            f"{cache_dir} holds {len(chosen)} caches: {_listing(chosen)}; say which one is meant, by context or by the "
            "first digits of its fingerprint (on the command line --context or --fingerprint)"
        )
    return chosen[0]


def _check_choice(fingerprint: str | None, context: str | None) -> None:
    if context is not None and context not in CONTEXTS:
        raise SettingsError(
            f"context is {context!r}, which is none of {', '.join(CONTEXTS)}: choose one of these"
        )
    if fingerprint is not None and (not fingerprint or set(fingerprint) - set("0123456789abcdef")):
        raise SettingsError(
            f"fingerprint is {fingerprint!r}, which is not a row of hexadecimal digits: see `vggt-cache info`"
        )


def _no_store(cache_dir: str) -> NotACacheError:
    name = os.path.basename(os.path.abspath(cache_dir))
    if STORE_NAME.fullmatch(name):
        return NotACacheError(f"{cache_dir} is one store inside a cache: give the directory above it")
    return NotACacheError(
        f"{cache_dir} holds no feature cache: check the path, or make the cache with `vggt-cache precompute`"
    )


def _no_match(
    cache_dir: str,
    specs: Sequence[FeatureSpec],
    spec: FeatureSpec | None,
    fingerprint: str | None,
    context: str | None,
) -> SpecMismatchError:
    wanted = [describe_spec(spec)] if spec is not None else []
    wanted += [f"context {context}"] if context is not None else []
    wanted += [f"fingerprint {fingerprint}"] if fingerprint is not None else []
    return SpecMismatchError(
        f"{cache_dir} holds {_listing(specs)}, and {' with '.join(wanted)} is wanted: such features are not in this "
        "cache; precompute them, or ask for what it holds"
    )


def _listing(specs: Sequence[FeatureSpec]) -> str:
    return "; ".join(map(describe_spec, specs))


def describe_spec(spec: FeatureSpec) -> str:
    """One specification in a few words, for messages and tables."""
    return (
        f"{spec.short_name} (context {spec.context}, image size {spec.preprocessing.image_size} "
        f"{spec.preprocessing.resize_mode}, layer {spec.encoder.layer}, computed in {spec.encoder.compute_dtype}, "
        f"stored in {spec.feature_dtype}, weights {spec.encoder.weights_digest[:8]})"
    )
