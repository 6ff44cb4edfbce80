"""Checkpoints: opened, identified and loaded. `encoder.weights` says which ones are accepted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from vggt_cache.encoder.config import EncoderConfig
from vggt_cache.encoder.locate import find_directory
from vggt_cache.encoder.model import Encoder
from vggt_cache.encoder.tensor_file import TensorFile
from vggt_cache.encoder.weights import Place, checked_weights, on_meta
from vggt_cache.errors import CheckpointError, SettingsError
from vggt_cache.identity import EncoderSpec


class Checkpoint:
    """Checked against its architecture, nothing loaded yet. Make one with `open`."""

    def __init__(
        self, *, location: str, config: EncoderConfig, layer: int, places: Mapping[str, Place]
    ) -> None:
        self.location = location
        self.config = config
        self.layer = layer
        """Output to compute, as a pair index counted from 0."""
        self._places = {name: places[name] for name in sorted(on_meta(config, layer).state_dict())}
        self._digest: str | None = None

    @classmethod
    def open(cls, location: str, *, layer: int = -2) -> Checkpoint:
        """The checkpoint at `location`: a directory, or a hub id such as `facebook/VGGT-1B` (downloaded).

        `layer`: output to compute; negative values count from the end. Reads headers only. Raises
        CheckpointError when the checkpoint is absent, only there as a pickle, damaged, or not exactly
        the aggregator that its configuration describes; SettingsError when it has no such layer.
        """
        try:
            config, places = checked_weights(find_directory(location))
        except OSError as error:
            raise CheckpointError(
                f"{location} cannot be read ({error.strerror or error}): check the path and its permissions"
            ) from error
        return cls(location=location, config=config, layer=config.absolute_layer(layer), places=places)

    def weights_digest(self) -> str:
        """sha256 (hex) over the weights that `layer` needs, in their stored dtypes.

        Covers names (without prefix), dtypes, shapes and bytes in the order of the names, so that it does not
        depend on sharding, on the prefix, or on weights that no feature depends on. Reads one tensor at a time.
        """
        if self._digest is None:
            for _ in self._tensors():
                pass
        assert self._digest is not None
        return self._digest

    def spec(self, compute_dtype: str) -> EncoderSpec:
        """The encoder's part of a feature's identity."""
        config = self.config
        return EncoderSpec(
            weights_digest=self.weights_digest(),
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            img_size=config.img_size,
            patch_size=config.patch_size,
            patch_embed=config.patch_embed,
            layer=self.layer,
            compute_dtype=compute_dtype,
        )

    def load(self, *, device: torch.device | str = "cpu", compute_dtype: str = "float32") -> Encoder:
        """The encoder on `device`: matrices in `compute_dtype`, everything else in float32.

        Raises CheckpointError when a weight is NaN or infinite, or when the weights are no longer those of
        `weights_digest`; SettingsError for a device that is not there.
        """
        target = _available(device)
        encoder = on_meta(self.config, self.layer, compute_dtype)
        dtypes = {name: weight.dtype for name, weight in encoder.state_dict().items()}
        weights: dict[str, Tensor] = {}
        for name, weight in self._tensors():
            if not weight.isfinite().all():
                place = self._places[name]
                raise CheckpointError(
                    f"{place.path} holds NaN or infinite values in {place.name}: features would be NaN; "
                    "download the checkpoint again, or use another one"
                )
            weights[name] = weight.to(target, dtypes[name])
        encoder.load_state_dict(weights, assign=True)
        return encoder

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights in use by name; when all are read, their digest is set, or compared with the earlier one."""
        hasher = hashlib.sha256(b"vggt-feature-cache weights 1\0")
        with ExitStack() as stack:
            files: dict[Path, TensorFile] = {}
            for name, place in self._places.items():
                if place.path not in files:
                    files[place.path] = stack.enter_context(TensorFile(place.path))
                file = files[place.path]
                if file.entries.get(place.name) != place.entry:
                    raise self._changed()
                weight = file.read(place.name)
                hasher.update(json.dumps([name, place.entry.dtype, place.entry.shape]).encode() + b"\n")
                hasher.update(weight.view(-1).view(torch.uint8).numpy().data)
                yield name, weight
        if self._digest not in (None, hasher.hexdigest()):
            raise self._changed()
        self._digest = hasher.hexdigest()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"the weights at {self.location} changed while they were in use: features would carry the "
            "identity of other weights; leave the checkpoint alone, and start again"
        )


def _available(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(
            f"device is {device!r}, which torch does not know: use cpu or cuda (or cuda:1)"
        ) from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device is {target}, but torch sees {torch.cuda.device_count()} CUDA devices: use cpu, or check the "
            "driver, CUDA_VISIBLE_DEVICES and that torch was installed with CUDA"
        )
    return target
