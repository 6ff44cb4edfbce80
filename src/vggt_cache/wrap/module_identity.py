"""What a module is, beside what it is called with: its source, its settings and its weights, each as a digest."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vggt_cache.call_spec import CallSpec
from vggt_cache.errors import SettingsError, errors_as
from vggt_cache.store.tensors import bytes_of


def identity_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> CallSpec:
    """Of a module with these parameters and buffers, without autocast. Raises SettingsError."""
    kind = type(module)
    return CallSpec(
        module=f"{kind.__module__}.{kind.__qualname__}",
        source=_source(module),
        settings=_settings(module),
        weights=_weights(tensors),
        autocast="none",
    )


def _weights(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(b"vggt-feature-cache module weights 1\0")
    for name, tensor in sorted(tensors.items()):
        hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(bytes_of(tensor.detach().cpu().contiguous()))
    return hasher.hexdigest()


def _source(module: nn.Module) -> str:
    """Of whole files: a class calls functions beside it. torch itself is taken as it is."""
    hasher = hashlib.sha256(b"vggt-feature-cache module source 1\0")
    for home in sorted({type(part).__module__ for part in module.modules()}):
        name = home.partition(".")[0]
        if name == "torch":
            continue
        package = sys.modules.get(name)
        hasher.update(json.dumps([home, str(getattr(package, "__version__", ""))]).encode())
        fault = f"the source of {home}, of which the module is made, cannot be read"
        remedy = ": define the module in a file, so that a change of it makes other features"
        with errors_as(SettingsError, fault, remedy, OSError, TypeError, KeyError):
            hasher.update(inspect.getsource(sys.modules[home]).encode())
    return hasher.hexdigest()


def _settings(module: nn.Module) -> str:
    """Of all parts by name: what they are, and what they have set beside tensors."""
    hasher = hashlib.sha256(b"vggt-feature-cache module settings 1\0")
    for name, part in module.named_modules():
        own = {
            key: _told(value)
            for key, value in vars(part).items()
            if not key.startswith("_") and key != "training"
        }
        told = {key: value for key, value in own.items() if value is not None}
        hasher.update(
            json.dumps([name, type(part).__qualname__, part.extra_repr(), told], sort_keys=True).encode()
        )
    return hasher.hexdigest()


def _told(value: Any) -> Any:
    """A setting as text; None where it is no plain value. Of a configuration all but where it was loaded from."""
    if isinstance(value, (tuple, list)):
        return [_told(part) for part in value]
    if isinstance(value, (str, int, float, bool, torch.dtype)):
        return repr(value)
    if callable(getattr(value, "to_dict", None)):
        return {
            key: repr(part)
            for key, part in value.to_dict().items()
            if key not in ("_name_or_path", "name_or_path")
        }
    if inspect.isfunction(value) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    return None
