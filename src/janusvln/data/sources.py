"""Where training data is, from the trainer's flags."""

from __future__ import annotations

from vggt_cache.errors import DataError
from vggt_cache.samples import Sources, find_sources, sources_of_files


def sources_of(train_data_root: str | None, annotation_path: str | None, data_path: str | None) -> Sources:
    """A data root, or annotation files with the folders of their images. Raises DataError."""
    if annotation_path:
        return sources_of_files(annotation_path, data_path or "")
    try:
        return find_sources(train_data_root or "")
    except DataError as error:  # the reader is precompute's too, where the flag has another name
        raise DataError(str(error).replace("--data_root", "--train_data_root")) from error
