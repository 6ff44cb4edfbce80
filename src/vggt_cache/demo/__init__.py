"""The project's own example: a house to walk through, annotations in three layouts, a small checkpoint."""

from vggt_cache.demo.checkpoint import write_checkpoint
from vggt_cache.demo.dataset import DatasetSummary, write_dataset

__all__ = ["DatasetSummary", "write_checkpoint", "write_dataset"]
