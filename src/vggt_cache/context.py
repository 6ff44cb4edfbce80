"""What a feature belongs to. VGGT mixes frames, so a feature is defined only with the frames that were seen.

Each context is one object, and all that depends on the context is asked of it; nothing else asks which context it is.
There is no torch here: the encoder is passed in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Indexes = npt.NDArray[np.int64]

T = TypeVar("T")
Batch = TypeVar("Batch", covariant=True)


class ListEncoder(Protocol[Batch]):
    """The encoder as a context uses it: any number of frames or lists in, batches of features out."""

    def frames(self, pixels: Sequence[Any]) -> Iterator[Batch]:
        """Single frames, each seen alone."""

    def lists(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Any]) -> Iterator[Batch]:
        """Ordered lists of frames (as they are named in `pixels`), each frame seeing those before it."""

    def joint_lists(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Any]) -> Iterator[Batch]:
        """Ordered lists of frames, each frame seeing all of its list."""


class ContextRule(ABC):
    """The contract of a context. It holds no state."""

    name: str
    seen: str
    """What a feature belongs to, and which frames were seen for it, in a few words."""
    noun: str = "feature"
    """What is counted in the lines of a run."""
    features_per_block: int
    """How many features one process claims together while much is left; trees that share prefixes stay whole."""
    shares_prefixes: bool = False
    """Whether a frame's keys and values, once computed, serve all lists that begin with the same frames."""
    of_all_frames: bool = False
    """Whether a feature is of every frame that was seen, with an axis of frames, and not of the last one."""

    @abstractmethod
    def used(self, frames: Sequence[T]) -> Sequence[T]:
        """The frames of an ordered list that determine its feature: they are read, hashed into the key and encoded."""

    @abstractmethod
    def wanted_lists(self, frames: Indexes, offsets: Indexes) -> tuple[Indexes, Indexes]:
        """The frame lists whose features samples need; list i is frames[offsets[i]:offsets[i + 1]], as sample i is."""

    @abstractmethod
    def encode(
        self, encoder: ListEncoder[Batch], lists: Sequence[Sequence[int]], pixels: Mapping[int, Any]
    ) -> Iterator[Batch]:
        """The features of these frame lists. `pixels`: uint8 [H, W, 3] for each frame that is used."""

    def label(self, paths: Sequence[str]) -> str:
        """What the feature of these frames is called in messages."""
        return label_of_last(self.used(paths))


class FrameRule(ContextRule):
    """A feature belongs to one image, seen alone: every frame of a sample has its own."""

    name = "frame"
    seen = "each image alone"
    noun = "image"
    features_per_block = 64

    def used(self, frames: Sequence[T]) -> Sequence[T]:
        return frames[-1:]

    def wanted_lists(self, frames: Indexes, offsets: Indexes) -> tuple[Indexes, Indexes]:
        import numpy as np  # here: the command line asks for the names of contexts, and should start quickly

        return frames, np.arange(len(frames) + 1)

    def encode(
        self, encoder: ListEncoder[Batch], lists: Sequence[Sequence[int]], pixels: Mapping[int, Any]
    ) -> Iterator[Batch]:
        return encoder.frames([pixels[frames[-1]] for frames in lists])


class CausalRule(ContextRule):
    """A feature belongs to a list of frames: the last one's, having seen itself and all earlier ones."""

    name = "causal"
    seen = "the last frame of each list, having seen all earlier ones"
    features_per_block = 32
    shares_prefixes = True

    def used(self, frames: Sequence[T]) -> Sequence[T]:
        return frames

    def wanted_lists(self, frames: Indexes, offsets: Indexes) -> tuple[Indexes, Indexes]:
        return frames, offsets

    def encode(
        self, encoder: ListEncoder[Batch], lists: Sequence[Sequence[int]], pixels: Mapping[int, Any]
    ) -> Iterator[Batch]:
        return encoder.lists(lists, pixels)


class JointRule(CausalRule):
    """A feature belongs to a list of frames: all of them, each having seen all. As VGGT was trained."""

    name = "joint"
    seen = "all frames of each list, each having seen all of them"
    shares_prefixes = False
    of_all_frames = True

    def encode(
        self, encoder: ListEncoder[Batch], lists: Sequence[Sequence[int]], pixels: Mapping[int, Any]
    ) -> Iterator[Batch]:
        return encoder.joint_lists(lists, pixels)


CONTEXTS: Mapping[str, ContextRule] = {rule.name: rule for rule in (FrameRule(), CausalRule(), JointRule())}
"""By name; the first is what precompute does where nothing is said."""


def label_of_last(paths: Sequence[str]) -> str:
    """The last of some frames, and how many came before it."""
    return f"{paths[-1]} (after {len(paths) - 1} earlier frames)" if len(paths) > 1 else paths[-1]
