"""VGGT's aggregator as somebody's module in memory: what it is, the digest of its weights, and our encoder on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from vggt_cache.encoder.checkpoint import WeightsDigest, config_of_shapes, expected_shapes, on_meta
from vggt_cache.encoder.config import EncoderConfig
from vggt_cache.encoder.model import Encoder
from vggt_cache.errors import CheckpointError, SettingsError, errors_as
from vggt_cache.identity import EncoderSpec

_LARGEST_DIFFERENCE = 0.02
"""Relative, between module and encoder on small frames. Rounding to bfloat16 makes 0.01; another network far more."""
Tensors = Mapping[str, Tensor]


class ModuleWeights:
    """The weights of a module that is VGGT's aggregator. They stay where they are: there is no second copy.

    Only where DeepSpeed's ZeRO-3 divides them among ranks, whole ones are kept on the side, so that a rank that
    computes needs no other rank. Raises CheckpointError for a module that is not such an aggregator.
    """

    def __init__(self, module: nn.Module, layers: int | Sequence[int]) -> None:
        self._module = module
        self._whole: Tensors | None = _gathered(module)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._whole.items()}
        self.config = _config(module, shapes)
        self.layers = self.config.absolute_layers(layers)
        self._names = sorted(on_meta(self.config, self.layers).state_dict())
        self._seen: object = None
        self._digest = ""
        self._encoder: tuple[object, Encoder] | None = None
        self._is_checked = False

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "parameters"}
        return {**kept, "_whole": None, "_encoder": None}

    def settle(self) -> None:
        """The model stands as it will be trained: weights that were moved to a GPU need not stay on the CPU, too."""
        if not self._is_divided():
            self._whole = None

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name. To go through the module for them takes long, so that is done once, until `forget`."""
        return dict(self._module.named_parameters())

    def forget(self) -> None:
        """The module may have other parameters now."""
        self.__dict__.pop("parameters", None)

    def _is_divided(self) -> bool:
        """By DeepSpeed's ZeRO-3, which then leaves empty parameters."""
        return any(map(_is_part, self.parameters.values()))

    @property
    def dtype(self) -> torch.dtype:
        return self._tensors()["camera_token"].dtype

    def spec(self, compute_dtype: str) -> EncoderSpec:
        """The encoder's part of a feature's identity: the digest is that of a checkpoint with just these weights.

        It is computed once, and again when the weights have been written to or converted.
        """
        tensors = self._tensors()
        state = sum(tensor._version for tensor in tensors.values()), self.dtype
        if state != self._seen:
            digest = WeightsDigest()
            for name in self._names:
                digest.add(name, tensors[name])
            self._seen, self._digest, self._is_checked = state, digest.hex(), False
        return EncoderSpec(
            weights_digest=self._digest,
            **dataclasses.asdict(self.config),
            layer=self.layers[-1],
            compute_dtype=compute_dtype,
        )

    @contextmanager
    def encoder(self, device: torch.device, compute_dtype: str, **output: Any) -> Iterator[Encoder]:
        """Our encoder on `device`. Weights that are there in the right dtype are used in place, others are converted
        and forgotten afterwards. Raises CheckpointError where the module computes something else than our encoder."""
        kind = compute_dtype, *sorted(output.items())
        if self._encoder is None or self._encoder[0] != kind:
            self._encoder = kind, on_meta(self.config, self.layers, compute_dtype, **output)
        encoder, tensors = self._encoder[1], self._tensors()
        if not self._is_checked:
            self._check_numbers()
            self._is_checked = True
        dtypes = {name: weight.dtype for name, weight in encoder.state_dict().items()}
        weights = {name: tensors[name].detach().to(device, dtype) for name, dtype in dtypes.items()}
        encoder.load_state_dict(weights, assign=True)
        encoder.requires_grad_(False)
        del weights
        try:
            yield encoder
        finally:
            encoder.to("meta")

    def _tensors(self) -> Tensors:
        if not self._is_divided():
            return self.parameters
        if self._whole is None:
            raise SettingsError(
                "DeepSpeed has divided the weights of VGGT among ranks since they were first used: put the "
                "CachedAggregator into the model before deepspeed.initialize, and call it only afterwards"
            )
        return self._whole

    def _check_numbers(self) -> None:
        """Names and shapes tell little of what is computed: a fork may have changed anything."""
        if self._is_divided():
            return
        tensors = self._tensors()
        weight = tensors["camera_token"]
        device = weight.device
        generator = torch.Generator().manual_seed(0)
        images = torch.rand((1, 2, 3, 28, 42), generator=generator)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            seen, named = images.to(device, weight.dtype), {}
            if "use_cache" in call_names(self._module):  # which takes one frame at a time
                seen, named = seen[:, :1], {"past_key_values": [None] * self.config.depth, "use_cache": True}
            live = self._module(seen, **named)[0][self.layers[-1]][0].float()
        encoder = on_meta(self.config, self.layers, "float32", tokens="all")
        encoder.load_state_dict(
            {name: tensors[name].to(device, torch.float32) for name in self._names}, assign=True
        )
        pixels = images.to(weight.dtype).float()[0, : len(live)].permute(0, 2, 3, 1).contiguous()
        ours = encoder.joint_features(encoder.patch_tokens(pixels.to(device))[None])[0]
        ours = ours[:, -1] if len(self.layers) > 1 else ours
        difference = float((ours - live).norm() / live.norm())
        if not difference < _LARGEST_DIFFERENCE:
            raise CheckpointError(
                f"{type(self._module).__name__} gives other numbers than VGGT's aggregator with the same weights "
                f"(relative difference {difference:.2g}): it is a variant that this encoder does not compute; use "
                'producer="module", so that it computes what is missing itself'
            )


def call_names(module: nn.Module) -> set[str]:
    """Names of what a module's `forward` takes."""
    code = type(module).forward.__code__
    return set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _is_part(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _gathered(module: nn.Module) -> Tensors:
    """The whole weights. All ranks make their wrapper at the same place of their program, so they can gather here."""
    if not any(map(_is_part, module.parameters())):
        return {name: parameter.detach() for name, parameter in module.named_parameters()}
    gather = import_module("deepspeed").zero.GatheredParameters
    whole = {}
    for name, parameter in module.named_parameters():
        gathering: AbstractContextManager[Any] = gather([parameter]) if _is_part(parameter) else nullcontext()
        with gathering:
            whole[name] = parameter.detach().cpu().clone()
    return whole


def _config(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> EncoderConfig:
    fault = f"{type(module).__name__} has not the weights of VGGT's aggregator"
    remedy = (
        ": give the module that is called with images, such as model.vggt.aggregator; for other encoders use "
        "CachedModule"
    )
    unknown = LookupError, ValueError, ArithmeticError, CheckpointError
    with errors_as(CheckpointError, fault, remedy, *unknown):
        config = config_of_shapes(shapes)
    expected = expected_shapes(config)
    expected.pop("patch_embed.mask_token")
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    wrong = [name for name in wrong if name != "patch_embed.mask_token"]
    if wrong:
        raise CheckpointError(
            f"{type(module).__name__} differs from VGGT's aggregator in {len(wrong)} weights, such as {wrong[0]} "
            f"({shapes.get(wrong[0])} in place of {expected.get(wrong[0])}): it is another network; use CachedModule"
        )
    return config
