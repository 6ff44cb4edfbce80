"""`python -m vggt_cache` is `vggt-cache`."""

import sys

from vggt_cache.cli import main

if __name__ == "__main__":
    sys.exit(main())
