"""`python -m janusvln.export CHECKPOINT OUT --vggt_model_path VGGT`"""

from __future__ import annotations

from vggt_cache.requirements import TRAINER, require

require(TRAINER)

import argparse
import sys
from collections.abc import Sequence

from janusvln.export.directory import export
from vggt_cache.errors import VggtCacheError
from vggt_cache.output import print_any_name


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code. A known error is one sentence."""
    print_any_name()
    parser = argparse.ArgumentParser(
        prog="python -m janusvln.export",
        description="Write a model trained here as JanusVLN's published code (transformers 4.50) reads it.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory of a trained model")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument(
        "--vggt_model_path", required=True, help="the VGGT that the features were computed with"
    )
    given = parser.parse_args(argv)
    try:
        told = export(given.checkpoint, given.out, given.vggt_model_path)
    except VggtCacheError as error:
        print(f"[ERROR] {error}", file=sys.stderr)
        return error.exit_code
    for sentence in told:
        print(f"[WARN] {sentence}")
    print(f"[SUCCESS] Exported to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
