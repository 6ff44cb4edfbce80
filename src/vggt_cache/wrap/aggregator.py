"""`CachedAggregator`: VGGT's aggregator in anybody's model, read from the cache instead of computed.

model.vggt.aggregator = CachedAggregator(model.vggt.aggregator, "/path/to/cache")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vggt_cache.codec.quantise import as_stored
from vggt_cache.errors import (
    SettingsError,
    require_one_of,
)
from vggt_cache.identity import SPECIAL_TOKENS
from vggt_cache.pixel_cache import PixelCache
from vggt_cache.pixels import as_levels
from vggt_cache.place import absolute
from vggt_cache.precompute.encode import BatchEncoder, of_one_dtype
from vggt_cache.store.staged import Staging
from vggt_cache.wrap.asked import Asked
from vggt_cache.wrap.cached_module import CachedModule
from vggt_cache.wrap.frames_seen import FramesSeen, LazyPair
from vggt_cache.wrap.module import ModuleInPlace
from vggt_cache.wrap.outputs import LazyOutputs, Outputs, as_outputs
from vggt_cache.wrap.shelf import MISS, Shelf
from vggt_cache.wrap.weights import ModuleWeights, call_names

_MOST_TOGETHER = 32
"""Frames encoded together; halved when the device is out of memory."""
_COMPUTE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class CachedAggregator(ModuleInPlace):
    """In place of VGGT's aggregator: the same call, the same results, and the module itself is not called.

        images [S, 3, H, W] or [B, S, 3, H, W], in [0, 1] -> (list of outputs [B, S, 5 + h * w, 2C], 5)

    The list is as long as the encoder is deep. In it stand the outputs `layers` (negative ones count from the end), of
    each the `tokens` that are kept (see FeatureSpec; others are NaN; default: those of a cache which is there, else
    all); any other output is refused when it is used. Each
    frame list of a batch is looked up by itself, by the pixels of its frames, and only those that are missing are
    computed: by this project's encoder on the module's own weights. dtype and device are what the module would give
    under the caller's autocast. JanusVLN's call, frame by frame with `past_key_values` and `use_cache`, gives causal
    features (see `frames_seen`).

    producer: `encoder`, or `module`: what is missing is computed by the wrapped module itself, under the caller's
        autocast. That is another identity (see CachedModule), needs tokens="all", and is right for any variant of VGGT.
    miss: `fill` computes and stores what is missing, `encode` only computes, `error` raises MissingFeatureError.
    feature_dtype: of storage; default: that of a cache which is there, else bfloat16 where the module computes in it.
    offload: the weights stay on the CPU, whatever the model around them does, and are no part of its parameters; they
        are still in its state_dict. While all features are found, they are never needed.
    threads: read from the disk.
    stage: where features are kept on a disk of this machine, and looked for first; see `FeatureCache.open`.

    `flush` at the end of an epoch puts all on disk for other ranks; without it that happens after a minute, or when the
    first list comes again. Raises SettingsError, CheckpointError; in a call also StoreErrors, and SpecMismatchError
    where the cache was made with other weights.
    """

    def __init__(
        self,
        module: nn.Module,
        cache_dir: str | os.PathLike[str],
        *,
        layers: int | Sequence[int] = -2,
        tokens: str | None = None,
        pool: tuple[int, int] | None = None,
        miss: str = "fill",
        producer: str = "encoder",
        feature_dtype: str | None = None,
        offload: bool = False,
        threads: int = 4,
        stage: Staging | None = None,
    ) -> None:
        require_one_of("miss", miss, MISS)
        require_one_of("producer", producer, ("encoder", "module"))
        super().__init__(module, offload=offload)
        self._own: CachedModule | None = None
        if producer == "module":
            if tokens not in (None, "all") or (pool, feature_dtype) != (None, None):
                raise SettingsError(
                    'with producer="module" the module\'s own outputs are kept as they are: leave tokens, pool and '
                    "feature_dtype out"
                )
            depth = len(module.frame_blocks)  # type: ignore[arg-type]
            several = [layers] if isinstance(layers, int) else list(layers)
            self._layers, self._depth = tuple(sorted({range(depth)[layer] for layer in several})), depth
            self._own = CachedModule(
                _Kept(module, self._layers), cache_dir, miss=miss, threads=threads, stage=stage
            )
        else:
            self._weights = ModuleWeights(module, layers)
            self._layers, self._depth = self._weights.layers, self._weights.config.depth
            self._asked = Asked(
                self._weights, absolute(cache_dir), tokens=tokens, pool=pool, feature_dtype=feature_dtype
            )
            self._asked.spec("joint", "float32")  # refuses wrong settings at once
        self._tokens, self._pool = tokens, pool
        self._cache_dir, self._miss = absolute(cache_dir), miss
        self._threads, self._stage = threads, stage
        self._names = call_names(module)
        self._most_together = _MOST_TOGETHER

    def forward(
        self,
        images: Tensor,
        past_key_values: list[Any] | None = None,
        use_cache: bool = False,
        past_frame_idx: int = 0,
    ) -> tuple[Any, ...]:
        self._refuse_gradients(images)
        if self._own is None:
            self._weights.settle()
        if use_cache and past_key_values is not None:
            return self._next_frame(images, past_key_values, past_frame_idx)
        batch = images[None] if images.ndim == 4 else images
        if batch.ndim != 5 or batch.shape[2] != 3:
            raise SettingsError(
                f"images are {list(images.shape)}, and the aggregator takes [S, 3, H, W] or [B, S, 3, H, W]"
            )
        if "use_cache" in self._names and batch.shape[1] > 1:
            # JanusVLN's module without its cache: all frames at once, none of which sees a later one.
            return tuple(self.wrapped(batch))
        if self._own is not None:
            kept = self._own(batch)
            return self._outputs(kept), SPECIAL_TOKENS
        shelf, dtype = self._shelf("joint", batch.device)
        features = self._features(shelf, batch)
        parts = [as_outputs(feature, shelf.store.spec, dtype) for feature in features]
        joined = [
            layer[0][None] if len(layer) == 1 else torch.stack(layer) for layer in zip(*parts, strict=True)
        ]
        return self._outputs(joined), SPECIAL_TOKENS

    def flush(self) -> None:
        super().flush()
        if self._own is not None:
            self._own.flush()

    def close(self) -> None:
        super().close()
        if self._own is not None:
            self._own.close()

    def _changed(self) -> None:
        if "_weights" in self.__dict__:
            self._weights.forget()

    def extra_repr(self) -> str:
        kept = f"layers={self._layers}, tokens={self._tokens!r}, pool={self._pool}"
        return f"cache_dir={self._cache_dir!r}, {kept}, miss={self._miss!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shelves": {}}

    # ------------------------------------------------------------ frame by frame

    def _next_frame(self, images: Tensor, past: list[Any], past_frame_idx: int) -> tuple[Any, ...]:
        before = past[0].seen if isinstance(past[0], LazyPair) else None
        if before is not None and before.pairs is not None:
            past[:] = (
                before.pairs
            )  # somebody looked into them, as evaluation does: the module goes on with them
        if not (past[0] is None or isinstance(past[0], LazyPair)) or tuple(images.shape[:2]) != (1, 1):
            return tuple(
                self.wrapped(images, past_key_values=past, use_cache=True, past_frame_idx=past_frame_idx)
            )
        seen = FramesSeen(images, before, self.wrapped)
        past[:] = [LazyPair(seen, layer) for layer in range(len(past))]
        shelf, dtype = (None, None) if self._own is not None else self._shelf("causal", images.device)

        def load() -> Sequence[Tensor]:
            if seen.outputs is not None:
                return [seen.outputs[layer] for layer in self._layers]
            if shelf is None or dtype is None:
                assert self._own is not None
                with seen.autocast():
                    found: Sequence[Tensor] = self._own(seen.images()[None], one_by_one=True)
                return found
            (feature,) = self._features(shelf, [seen.images()])
            return [output[None] for output in as_outputs(feature[None], shelf.store.spec, dtype)]

        return LazyOutputs(self._depth, lambda: self._outputs(load())), SPECIAL_TOKENS, past

    # ------------------------------------------------------------ steps

    def _outputs(self, kept: Sequence[Tensor]) -> Outputs:
        return Outputs.of(self._depth, self._layers, kept)

    def _features(self, shelf: Shelf, lists: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The features of ordered frame lists [S, 3, H, W], in the dtype of storage, on the shelf's device."""
        labels = [f"{len(images)} frames of {images.shape[3]} x {images.shape[2]} pixels" for images in lists]
        keys = shelf.store.keys(lists)
        return shelf.features(
            keys, labels, lambda missing: self._encode(shelf, [lists[at] for at in missing])
        )

    def _encode(self, shelf: Shelf, lists: Sequence[Tensor]) -> list[Tensor]:
        spec, device = shelf.store.spec, shelf.device
        frames = [frame for images in lists for frame in as_levels(images)]
        numbered = iter(range(len(frames)))
        numbers = [[next(numbered) for _ in images] for images in lists]
        found: dict[int, Tensor] = {}
        with (
            self._weights.encoder(
                device, spec.encoder.compute_dtype, tokens=spec.tokens, pool=spec.pool
            ) as encoder,
            torch.no_grad(),
        ):
            batched = BatchEncoder(
                encoder, self._most_together, self._halved, feature_dtype=spec.feature_dtype
            )
            for positions, batch in spec.context_rule.encode(
                batched, numbers, of_one_dtype(dict(enumerate(frames)))
            ):
                found.update(zip(positions, batch, strict=True))
        return [as_stored(found[at], spec.feature_dtype) for at in range(len(lists))]

    def _halved(self, batch_size: int) -> None:
        self._most_together = batch_size

    def _refuse_gradients(self, images: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        weights = self.wrapped.parameters() if self._own is not None else self._weights.parameters.values()
        if images.requires_grad or any(weight.requires_grad for weight in weights):
            raise SettingsError(
                "gradients are asked of the encoder or of its images, and what comes from a cache has none: freeze it "
                "(model.vggt.requires_grad_(False)) before it is wrapped, or train it without a cache"
            )

    # ------------------------------------------------------------ which cache

    def _shelf(self, context: str, device: torch.device) -> tuple[Shelf, torch.dtype]:
        """The features that the module would give now, and the dtype in which it would."""
        weights = self._weights.dtype
        autocast = torch.is_autocast_enabled(device.type)
        computes_in = torch.get_autocast_dtype(device.type) if autocast else weights
        if computes_in not in _COMPUTE:
            raise SettingsError(
                f"the module would compute in {computes_in}, and this encoder computes in float32 or bfloat16: "
                'change the autocast or the weights\' dtype, or use producer="module"'
            )
        compute_dtype = _COMPUTE[computes_in]
        encoder = self._weights.spec(compute_dtype)  # again each time: the weights may have changed
        key = context, f"{compute_dtype} {encoder.weights_digest}", device
        shelf = self._shelves.get(key)
        if shelf is None or shelf.pid != os.getpid():
            spec = self._asked.chosen(context, compute_dtype)
            store = PixelCache(self._cache_dir, spec, fill=self._miss == "fill", stage=self._stage)
            shelf = Shelf(store, device, miss=self._miss, threads=self._threads)
            self._shelves[key] = shelf
        return shelf, torch.float32 if autocast else weights


class _Kept(nn.Module):
    """The module with those of its outputs that are kept."""

    def __init__(self, module: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.module, self.layers = module, tuple(layers)
        self.training = module.training

    def forward(self, images: Tensor, one_by_one: bool = False) -> tuple[Tensor, ...]:
        outputs: Any = None
        if one_by_one:
            past = [None] * len(self.module.frame_blocks)  # type: ignore[arg-type]
            for number in range(images.shape[1]):
                frame = images[:, number : number + 1]
                outputs, _, past = self.module(
                    frame, past_key_values=past, use_cache=True, past_frame_idx=number
                )
        else:
            outputs = self.module(images)[0]
        return tuple(outputs[layer] for layer in self.layers)
