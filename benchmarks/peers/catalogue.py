"""The peers by the names of their rows. One is imported when it is measured: if it cannot be, that is its row."""

from __future__ import annotations

from importlib import import_module

from peers.base import Peer

OURS = "VGGT Feature Cache"
HOMES = {
    OURS: "ours.Ours",
    "torch.save, a file each": "torch_files.TorchFiles",
    "torch.save, a file each, mmap": "torch_files.MappedTorchFiles",
    "safetensors, a file each": "safetensors_files.SafetensorsFiles",
    "safetensors, shards": "safetensors_files.SafetensorsShards",
    "tensordict, memory map": "tensordict_map.TensorDictMap",
    "LMDB": "lmdb_tree.LmdbTree",
    "HDF5": "hdf5_file.Hdf5File",
    "HDF5, fletcher32": "hdf5_file.CheckedHdf5File",
    "zarr": "zarr_chunks.ZarrChunks",
    "TensorStore, crc32c": "tensorstore_chunks.TensorStoreChunks",
    "Lance": "lance_table.LanceTable",
    "WebDataset": "webdataset_tars.WebDatasetTars",
    "MosaicML Streaming": "mosaic_shards.MosaicShards",
    "LitData": "litdata_chunks.LitDataChunks",
    "torchcache": "torchcache_module.TorchCacheModule",
}


def peer_class(name: str) -> type[Peer]:
    """Raises ImportError where what the peer needs is not installed, or whatever its import raises."""
    module, _, attribute = HOMES[name].partition(".")
    found: type[Peer] = getattr(import_module(f"peers.{module}"), attribute)
    return found
