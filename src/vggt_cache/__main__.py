"""`python -m vggt_cache` is `vggt-cache`: the command line, where its packages are there."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vggt_cache.requirements import CACHE, MONITOR, require


def main(argv: Sequence[str] | None = None) -> int:
    """As `vggt_cache.cli.main`, which cannot even be imported without some of the packages."""
    given = sys.argv[1:] if argv is None else argv
    require(MONITOR if given[:1] == ["monitor"] else CACHE)
    from vggt_cache.cli import main as run

    return run(given)


if __name__ == "__main__":
    sys.exit(main())
