"""Which features a wrapped aggregator is asked for: as its user said, and what was left open as a cache has it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vggt_cache.errors import CacheNotFoundError, NotACacheError, SpecMismatchError
from vggt_cache.identity import GIVEN_PIXELS, FeatureSpec
from vggt_cache.store import list_stores
from vggt_cache.store.directory import describe_spec
from vggt_cache.wrap.shelf import warn
from vggt_cache.wrap.weights import ModuleWeights


@dataclass(frozen=True)
class Asked:
    """What is wanted of the outputs of a module; None: left open."""

    weights: ModuleWeights
    cache_dir: str
    tokens: str | None = field(kw_only=True)
    pool: tuple[int, int] | None = field(kw_only=True)
    feature_dtype: str | None = field(kw_only=True)

    def spec(
        self, context: str, compute_dtype: str, *, tokens: str = "all", feature_dtype: str = ""
    ) -> FeatureSpec:
        """As asked; `tokens` and `feature_dtype` (default: as it is computed) are for what was left open."""
        layers = self.weights.layers
        return FeatureSpec(
            encoder=self.weights.spec(compute_dtype),
            preprocessing=GIVEN_PIXELS,
            context=context,
            feature_dtype=self.feature_dtype or feature_dtype or compute_dtype,
            layers=layers if len(layers) > 1 else (),
            tokens=self.tokens or tokens,
            pool=self.pool,
        )

    def chosen(self, context: str, compute_dtype: str) -> FeatureSpec:
        """As asked, and else as a cache that is there. Raises SpecMismatchError for other weights."""
        wanted = self.spec(context, compute_dtype)
        there: Sequence[FeatureSpec] = ()
        with suppress(CacheNotFoundError, NotACacheError):
            there = list_stores(self.cache_dir)
        alike = [spec.of_given_pixels for spec in there if not spec.contradictions({"context": context})]
        self._check_weights(wanted, alike)
        # Special tokens alone would give the outputs another shape.
        open_kinds = {(spec.tokens, spec.feature_dtype) for spec in alike if spec.tokens != "special"}
        kinds = [self.spec(context, compute_dtype, tokens=one, feature_dtype=two) for one, two in open_kinds]
        found = {spec for spec in kinds if spec in alike}
        if len(found) == 1:
            return found.pop()
        self._warn_of_others(wanted, there, alike)
        return wanted

    def _check_weights(self, wanted: FeatureSpec, alike: Sequence[FeatureSpec]) -> None:
        own = wanted.encoder.weights_digest
        if not alike or any(spec.encoder.weights_digest == own for spec in alike):
            return
        other = alike[0].encoder
        if other.layer == wanted.encoder.layer:
            raise SpecMismatchError(
                f"{self.cache_dir} was made with other weights ({other.weights_digest[:16]}) than those of the "
                f"module ({own[:16]}, {self.weights.dtype}): its features would be another encoder's; load the "
                "same checkpoint in the same dtype before the module is wrapped, give offload=True where the "
                "model is converted to another dtype afterwards, or use another cache directory"
            )

    def _warn_of_others(
        self, wanted: FeatureSpec, there: Sequence[FeatureSpec], alike: Sequence[FeatureSpec]
    ) -> None:
        """Features are there, and not one of them is what the module is asked for."""
        own = wanted.encoder.weights_digest
        seen_otherwise = [spec for spec in there if spec.encoder.weights_digest == own]
        if seen_otherwise and not alike:
            warn(
                f"{self.cache_dir} holds features of context {seen_otherwise[0].context}, and the module is called for "
                f"those of context {wanted.context}: nothing of it is found, and all is computed anew; precompute with "
                f"--context {wanted.context}, or leave it to the first epoch"
            )
        elif alike and wanted not in alike:
            warn(
                f"{self.cache_dir} holds {'; '.join(map(describe_spec, alike))}, and the module is asked for "
                f"{describe_spec(wanted)}: nothing of it is found, and all is computed anew; to read it, ask for "
                "what it holds (layers, tokens, pool, feature_dtype), under the autocast that it was computed in"
            )
