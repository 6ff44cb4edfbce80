#!/usr/bin/env python3
"""Precompute VGGT features: the same as `vggt-cache precompute`, without installing this project.

Runs from anywhere and needs no PYTHONPATH; `--help` lists the flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from vggt_cache.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["precompute", *sys.argv[1:]]))
