"""The identity of what any frozen module gives: all that determines it, except the inputs.

A store of such outputs is one of the store's own kind with another specification. Its records are bytes, in which
`wrap/calls.py` puts the tensors of one output; their shape is `[h, w, ROW_BYTES]`, the last rows filled up with zeros.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vggt_cache.errors import SpecMismatchError

ROW_BYTES = 4096
KIND = "module call"
CONTEXT = "module"
"""In place of a context, in the names of stores: what a module gives is its own business."""


class _Width(NamedTuple):
    channels: int


@dataclass(frozen=True, kw_only=True)
class CallSpec:
    """As the store asks a FeatureSpec, so it asks this."""

    module: str
    """Dotted name of the class."""
    source: str
    """sha256 (hex) over the source files and package versions of all classes in the module."""
    settings: str
    """sha256 (hex) over what the parts of the module have set: numbers, texts, configurations."""
    weights: str
    """sha256 (hex) over names, dtypes, shapes and bytes of parameters and buffers."""
    autocast: str
    """`none`, or the dtype of the caller's autocast."""
    kind: str = KIND

    encoder = _Width(ROW_BYTES)
    feature_dtype = "uint8"
    axes = ("h", "w", ROW_BYTES)
    context = CONTEXT

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def short_name(self) -> str:
        """Of its folder in a cache directory."""
        return f"{CONTEXT}-{self.fingerprint[:16]}"

    @property
    def text(self) -> str:
        """In words, for messages and tables."""
        return f"outputs of {self.module}, weights {self.weights[:8]}, autocast {self.autocast}"

    @property
    def of_given_pixels(self) -> CallSpec:
        """Inputs are always taken as they are."""
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CallSpec:
        """Raises SpecMismatchError."""
        try:
            fields = json.loads(text)
            spec = cls(**fields)
            if not all(type(value) is str for value in fields.values()) or spec.to_json() != text.strip():
                raise ValueError("it is not in canonical form")
        except (ValueError, TypeError, RecursionError) as error:
            raise SpecMismatchError(
                f"the specification of a module's outputs cannot be understood ({error}): it was written by another "
                "version of this project or is damaged; use another cache directory"
            ) from error
        return spec
