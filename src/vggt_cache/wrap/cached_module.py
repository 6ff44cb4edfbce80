"""`CachedModule`: any frozen encoder in anybody's model, its outputs remembered on disk.

model.vision_tower = CachedModule(model.vision_tower, "/path/to/cache")
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from vggt_cache.call_spec import CallSpec
from vggt_cache.errors import SettingsError, require_one_of
from vggt_cache.identity import FeatureSpec
from vggt_cache.pixel_cache import PixelCache
from vggt_cache.place import absolute
from vggt_cache.store import FeatureCache
from vggt_cache.store.object_store import system_of
from vggt_cache.store.staged import Staging
from vggt_cache.wrap.calls import (
    Leaves,
    flat_inputs,
    from_record,
    input_key,
    put_together,
    take_apart,
    to_record,
    with_leaves,
)
from vggt_cache.wrap.module import ModuleInPlace
from vggt_cache.wrap.module_identity import identity_of
from vggt_cache.wrap.shelf import MISS, Shelf

_CPU = torch.device("cpu")
_SAME = 1e-2
"""Relative difference of a row alone from the same row in a batch: rounding is less, a mix of rows is more."""


class CachedModule(ModuleInPlace):
    """In place of a frozen module: what it gave for the same inputs is read, and anything else it computes itself.

    What it gives is the module's own output, bit for bit, under the caller's autocast, on the device of the inputs: a
    tensor, tuple, list, mapping or ModelOutput. The identity is the source of the module's classes, what they have set,
    weights in their dtype, autocast, and shapes, dtypes and bytes of all inputs.

    batch: the first dimension of all tensors that go in and come out counts independent samples, each of which is
        remembered by itself, so that other batches find it; that is checked once. False: the whole call is one.
    miss: `fill` computes and stores, `encode` only computes, `error` raises MissingFeatureError.
    stage: as for CachedAggregator.
    offload: as for CachedAggregator; a miss needs the weights where the inputs are, so it goes with miss="error".

    Raises SettingsError for a module that is in training mode, has parameters which require gradients, or draws random
    numbers, and for inputs or outputs that cannot be stored.
    """

    def __init__(
        self,
        module: nn.Module,
        cache_dir: str | os.PathLike[str],
        *,
        batch: bool = True,
        miss: str = "fill",
        offload: bool = False,
        threads: int = 4,
        stage: Staging | None = None,
    ) -> None:
        require_one_of("miss", miss, MISS)
        super().__init__(module, offload=offload)
        self._cache_dir, self._miss = absolute(cache_dir), miss
        self._batch, self._threads, self._stage = batch, threads, stage
        self._known: tuple[object, CallSpec] | None = None
        self._is_probed = self._is_batch_checked = False

    def forward(self, *args: Any, **named: Any) -> Any:
        self._refuse()
        leaves: Leaves = []
        form = flat_inputs([list(args), named], leaves)
        if not leaves:
            raise SettingsError("the module is called without a tensor: there is nothing to remember it by")
        device = leaves[0].device
        shelf = self._shelf(device)
        if not self._batch:
            parts = [leaves]
        else:
            rows = _rows(leaves)
            parts = [[leaf[row : row + 1] for leaf in leaves] for row in range(rows)]
        keys = [input_key(shelf.store.spec.fingerprint, form, part) for part in parts]
        labels = [f"{type(self.wrapped).__name__} of {[list(leaf.shape) for leaf in part]}" for part in parts]

        def compute(missing: Sequence[int]) -> list[Tensor]:
            together = [torch.cat([parts[at][place] for at in missing]) for place in range(len(leaves))]
            return self._compute(args, named, together, len(missing))

        records = [from_record(record, device) for record in shelf.features(keys, labels, compute)]
        form_out, first = records[0]
        if self._batch:
            first = [
                torch.cat(rows) if len(rows) > 1 else rows[0]
                for rows in zip(*(own for _, own in records), strict=True)
            ]
        return put_together(form_out, first, type(self.wrapped).__module__.partition(".")[0])

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_tensors", "_parts")}
        return {**kept, "_shelves": {}}

    # ------------------------------------------------------------ steps

    def _compute(self, args: Any, named: Any, leaves: Leaves, rows: int) -> list[Tensor]:
        """One record for each of the rows, or for the whole call."""
        if not self._is_probed:
            self._probe(args, named, leaves)
        form_out, found = self._called(args, named, leaves)
        if not self._batch:
            return [to_record(form_out, found)]
        if any(leaf.ndim == 0 or len(leaf) != rows for leaf in found):
            raise _not_a_batch(f"of {rows} samples it gives {[list(leaf.shape) for leaf in found][:4]}")
        if not self._is_batch_checked:
            if rows > 1:
                self._check_batch(self._called(args, named, [leaf[:1] for leaf in leaves])[1], found)
            else:  # later ones may come in company
                two = [torch.cat([leaf, leaf.flip(-1)]) for leaf in leaves]
                self._check_batch(found, self._called(args, named, two)[1])
            self._is_batch_checked = True
        return [to_record(form_out, [leaf[row : row + 1] for leaf in found]) for row in range(rows)]

    def _called(self, args: Any, named: Any, leaves: Leaves) -> tuple[Any, Leaves]:
        """Form and tensors of the module's output for inputs of this form with these tensors."""
        own_args, own_named = with_leaves([list(args), named], iter(leaves))
        found: Leaves = []
        with torch.no_grad():
            form = take_apart(self.wrapped(*own_args, **own_named), found)
        return form, found

    def _probe(self, args: Any, named: Any, leaves: Leaves) -> None:
        before = _random_states()
        outputs = [self._called(args, named, leaves)[1] for _ in range(2)]
        draws = any(not torch.equal(one, other) for one, other in zip(before, _random_states(), strict=True))
        same = all(_equal(one, other) for one, other in zip(*outputs, strict=True))
        if draws or not same:
            raise SettingsError(
                f"{type(self.wrapped).__name__} "
                + ("draws random numbers" if draws else "gives another output for the same input")
                + ": one of its outputs would be repeated for ever; switch that off (dropout, sampling, masks), or "
                "train without the cache"
            )
        self._is_probed = True

    def _check_batch(self, alone: Leaves, found: Leaves) -> None:
        for one, batch in zip(alone, found, strict=True):
            row = batch[:1].double()
            if one.shape != batch[:1].shape or not (one.double() - row).norm() <= _SAME * row.norm() + 1e-6:
                raise _not_a_batch("the first sample alone gives something else than among others")

    def _refuse(self) -> None:
        name = type(self.wrapped).__name__
        if any(part.training for part in self._parts):
            raise SettingsError(
                f"{name} is in training mode, in which it may do other things in every step (dropout): call .eval() on "
                "it behind model.train(), or train it without a cache"
            )
        if any(tensor.requires_grad for tensor in self._tensors.values()):
            raise SettingsError(
                f"{name} has parameters that require gradients, and what comes from a cache has none: freeze it "
                "(.requires_grad_(False)), or train it without a cache"
            )

    # ------------------------------------------------------------ identity

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers. To go through the module for them takes long, so that is done once."""
        return dict([*self.wrapped.named_parameters(), *self.wrapped.named_buffers()])

    @cached_property
    def _parts(self) -> list[nn.Module]:
        return list(self.wrapped.modules())

    def _changed(self) -> None:
        for name in ("_tensors", "_parts"):
            self.__dict__.pop(name, None)

    def _shelf(self, device: torch.device) -> Shelf:
        enabled = torch.is_autocast_enabled(device.type)
        autocast = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if enabled else "none"
        spec = dataclasses.replace(self._spec(), autocast=autocast)
        shelf = self._shelves.get(spec.fingerprint)
        if shelf is None or shelf.pid != os.getpid():
            fill = self._miss == "fill"
            store = _CallCache(self._cache_dir, cast("FeatureSpec", spec), fill=fill, stage=self._stage)
            shelf = Shelf(store, _CPU, miss=self._miss, threads=self._threads)
            self._shelves[spec.fingerprint] = shelf
        return shelf

    def _spec(self) -> CallSpec:
        """Made once, and again when a weight has been written to or converted."""
        tensors = self._tensors
        state = [(tensor._version, tensor.dtype) for tensor in tensors.values()]
        if self._known is None or state != self._known[0]:
            self._known = state, identity_of(self.wrapped, tensors)
        return self._known[1]


class _CallCache(PixelCache):
    """The same store of records by key, of module calls."""

    def _open(self, fill: bool) -> FeatureCache:
        fs = system_of(self._cache_dir)
        return FeatureCache(self._cache_dir, self.spec, root=None, fs=fs, stage=self._stage)


def _rows(leaves: Leaves) -> int:
    lengths = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1 or 0 in lengths:
        raise _not_a_batch(f"its inputs have the shapes {[list(leaf.shape) for leaf in leaves][:4]}")
    return lengths.pop()


def _not_a_batch(why: str) -> SettingsError:
    return SettingsError(
        f"the first dimension of what the module takes and gives is no batch of independent samples ({why}): give "
        "batch=False, and whole calls are remembered"
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    nan_at_the_same_places = torch.equal(one.isnan(), other.isnan())
    return nan_at_the_same_places and torch.equal(one.nan_to_num(), other.nan_to_num())


def _random_states() -> list[Tensor]:
    has_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if has_gpu else [])]
