"""The list that VGGT's aggregator gives, of which only some outputs are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from vggt_cache.errors import SettingsError
from vggt_cache.identity import SPECIAL_TOKENS, FeatureSpec


class Outputs(list[Any]):
    """A list of outputs [B, S, n, 2C], as long as the encoder is deep, with a `NotKept` where one is not kept.

    Indexing one that is not kept raises SettingsError; iterating, which some code does to take a sample's part of every
    output, gives it. Made of any iterable, since DeepSpeed makes lists anew by their class.
    """

    @classmethod
    def of(cls, depth: int, layers: Sequence[int], kept: Sequence[Tensor]) -> Outputs:
        outputs: list[Any] = [NotKept(layer, layers) for layer in range(depth)]
        for layer, output in zip(layers, kept, strict=True):
            outputs[layer] = output
        return cls(outputs)

    def __getitem__(self, index: Any) -> Any:
        output = super().__getitem__(index)
        return output.refuse() if isinstance(output, NotKept) else output


class LazyOutputs(Sequence[Any]):
    """The same, read or computed by `load` when it is first looked into. No list: DeepSpeed would look into that."""

    def __init__(self, depth: int, load: Callable[[], Outputs]) -> None:
        self._depth, self._load = depth, load
        self._outputs: Outputs | None = None

    def __len__(self) -> int:
        return self._depth

    def __getitem__(self, index: Any) -> Any:
        return self._loaded()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loaded())

    def _loaded(self) -> Outputs:
        if self._outputs is None:
            self._outputs = self._load()
        return self._outputs


class NotKept:
    """In place of an output that the cache does not keep: a part of it is no more than it, and all else is refused."""

    def __init__(self, layer: int, kept: Sequence[int]) -> None:
        wanted = ", ".join(map(str, sorted({*kept, layer})))
        self._sentence = (
            f"output {layer} of the encoder is asked for, and the cache keeps only {', '.join(map(str, kept))}: give "
            f"CachedAggregator layers=({wanted}), and both are kept"
        )

    def __getitem__(self, index: object) -> NotKept:
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python, and not the user, asks for
            raise AttributeError(name)
        self.refuse()

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, arguments: Any = (), named: Any = None
    ) -> NoReturn:
        for argument in arguments:
            for part in argument if isinstance(argument, list | tuple) else (argument,):
                if isinstance(part, cls):
                    part.refuse()
        raise TypeError(f"{cls.__name__} is no tensor")

    def refuse(self) -> NoReturn:
        raise SettingsError(self._sentence)


def as_outputs(feature: Tensor, spec: FeatureSpec, dtype: torch.dtype) -> list[Tensor]:
    """Of a feature of a list (FeatureSpec.shape, with frames), what the module gives of each kept layer.

    [S, 5 + h * w, 2C] in `dtype`, in the module's order. Tokens that are not kept are NaN, so that who takes one sees
    it. Where only special tokens are kept, [S, 5, 2C].
    """
    rows = feature.flatten(-3, -2) if spec.tokens == "patches" else feature
    layers = rows.unbind(1) if spec.layers else (rows,)
    kept_in_front = {"patches": 0, "patches+camera": 1}.get(spec.tokens)
    if kept_in_front is None:
        return [layer.to(dtype) for layer in layers]
    outputs = []
    for layer in layers:
        frames, tokens, channels = layer.shape
        output = layer.new_empty((frames, tokens - kept_in_front + SPECIAL_TOKENS, channels), dtype=dtype)
        output[:, kept_in_front:SPECIAL_TOKENS] = torch.nan
        output[:, :kept_in_front] = layer[:, :kept_in_front]
        output[:, SPECIAL_TOKENS:] = layer[:, kept_in_front:]
        outputs.append(output)
    return outputs
