"""Scan the training data, run the encoder once per feature, store the features.

The package can be called: `vggt_cache.precompute(lists, cache_dir, ...)` is `precompute.lists.precompute`, so that the
verb of the command is that of the library, whichever of the two was imported first.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *lists: Any, **settings: Any) -> Any:
        from vggt_cache.precompute.lists import precompute

        return precompute(*lists, **settings)


sys.modules[__name__].__class__ = _CallableModule
