"""`python -m janusvln.demo DIR`: train on what `vggt-cache demo DIR` has made."""

from __future__ import annotations

from vggt_cache.requirements import TRAINER, require

require(TRAINER)

import sys

from janusvln.demo.compare import compare
from vggt_cache.errors import VggtCacheError
from vggt_cache.output import print_any_name

if __name__ == "__main__":
    print_any_name()
    try:
        compare(sys.argv[1] if len(sys.argv) > 1 else "demo")
    except VggtCacheError as error:
        print(f"[ERROR] {error}", file=sys.stderr)
        sys.exit(error.exit_code)
