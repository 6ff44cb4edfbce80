"""Why a sample cannot be trained on, and how that sentence leaves a DataLoader's worker."""

from __future__ import annotations

from vggt_cache.errors import VggtCacheError


class UnfitSampleError(Exception):
    """The reason why a sample cannot be trained on. Never leaves this package: `NavigationDataset` names the sample."""


def sentence_of(error: VggtCacheError) -> str:
    """The sentence of an error that may have come through a DataLoader.

    torch raises an error of a worker anew, of the same class, with the worker's traceback as its message; the
    sentence then stands behind the last name of that class. Other errors have their own text.
    """
    text = str(error)
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    _, found, sentence = text.rpartition(f"\n{name}: ")
    return sentence.strip() if found and text.startswith("Caught ") else text
