"""A module that stands in the place of another one, with its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vggt_cache.wrap.shelf import Shelf


class ModuleInPlace(nn.Module):
    """Parameters, buffers and children are those of the wrapped module, under the same names, with no prefix.

    So `state_dict`, `named_parameters`, `save_pretrained`, devices, DDP and DeepSpeed see what they saw before. With
    `offload` only `state_dict` does: the weights are on the CPU and no part of the model otherwise.
    """

    wrapped: nn.Module
    """Called by nobody but this object."""

    def __init__(self, module: nn.Module, *, offload: bool) -> None:
        super().__init__()
        self.__dict__["wrapped"] = module  # not as a child: that would be a prefix
        self._offload = offload
        self._shelves: dict[Any, Shelf] = {}
        """By what is meant; opened when it is first asked for."""
        self.training = module.training
        if offload:
            module.requires_grad_(False).to("cpu")
        else:
            for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                self.__dict__[name] = module.__dict__[name]  # the very dicts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "wrapped" not in self.__dict__:
                raise
            return getattr(self.__dict__["wrapped"], name)

    def train(self, mode: bool = True) -> Any:
        self.wrapped.train(mode)
        self.training = mode
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.wrapped.requires_grad_(requires_grad)
        return self

    def flush(self) -> None:
        """Commit all that was computed here, and take in what others have committed. For the end of an epoch."""
        for shelf in self._shelves.values():
            shelf.flush()

    def close(self) -> None:
        """Commit all that was computed here, and end the threads. A later call opens the cache again.

        The end of the process does it, too.
        """
        for shelf in self._shelves.values():
            shelf.close()
        self._shelves.clear()

    def _changed(self) -> None:
        """Weights were loaded or moved: a subclass forgets what it knows of them."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._changed()
        return self if self._offload else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._offload:
            self.wrapped.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        self._changed()
        if not self._offload:
            return super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing, unexpected, errors
            )
        own = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        found = self.wrapped.load_state_dict(own, strict=False)
        missing.extend(prefix + name for name in found.missing_keys)
        unexpected.extend(prefix + name for name in found.unexpected_keys)
