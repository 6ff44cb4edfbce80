"""Codecs of stored features: how small, how far off, how fast on one core, and what limits them.

Theory. A bfloat16 activation's sign and mantissa are as good as random; its exponent is not. So no lossless codec that
looks at one value at a time gets below `bound`: (entropy of the exponent byte + 8) / 16 of the raw bytes. Knowing the
channel, the bound is `bound_given_channel`. Decoding is entropy decoding of one byte a value (`zstd_alone`) and putting
the bytes of a value together again (`join_alone`); both are measured beside it, as is a copy of the raw bytes (`copy`).
Speeds are in GB/s of raw bytes on one core, the median over calls that go round a ring of features larger than the
cache of the core. `get` is FeatureCache.get_by_key into memory that is used again, from page cache, checksum included.

Activations: the 1B architecture and the demo's encoder, with random weights of the size that trained ones have, on
frames of the demo. Trained encoders have outlier channels and massive activations, random ones have not, so both are
put in: 8 channels times 30; 3 tokens with 2 values of 300 standard deviations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import zstandard

import record
from bench_encoder import SIZES, random_encoder
from vggt_cache.codec import lossless
from vggt_cache.codec.base import Int8
from vggt_cache.codec.lossless import PIECE_VALUES, Lossless, join
from vggt_cache.codec.quantise import decode_int8, encode_int8
from vggt_cache.demo.dataset import write_dataset
from vggt_cache.frames import decode_frame
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FeatureCache, ShardWriter, create_store

RING = 8
"""Buffers that are used in turn: together larger than a core's share of the cache."""


def features_of(size: str, width: int, count: int, device: str) -> list[torch.Tensor]:
    """bfloat16 [h, w, C] of frames of the demo."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        data = write_dataset(folder, episodes=count, steps=2)
        names = sorted((data.root / "structured").rglob("*.png"))
        frames = [name.read_bytes() for name in names[:: max(1, len(names) // count)][:count]]
    pixels = [decode_frame(frame, Preprocessing(image_size=width)) for frame in frames]
    encoder = random_encoder(SIZES[size], device, "float32")
    return [encoder.frame_features(torch.from_numpy(one)[None])[0].bfloat16().cpu() for one in pixels]


def with_outlier_channels(feature: torch.Tensor, count: int = 8, factor: float = 30.0) -> torch.Tensor:
    changed = feature.clone()
    chosen = torch.randperm(feature.shape[-1], generator=torch.Generator().manual_seed(0))[:count]
    changed[..., chosen] *= factor
    return changed


def with_massive_activations(feature: torch.Tensor, tokens: int = 3, factor: float = 300.0) -> torch.Tensor:
    changed = feature.clone().view(-1, feature.shape[-1])
    rows = torch.randperm(len(changed), generator=torch.Generator().manual_seed(0))[:tokens]
    changed[rows[:, None], torch.tensor([11, 1029 % feature.shape[-1]])] = (
        factor * feature.float().std().item()
    )
    return changed.view(feature.shape)


# ---------------------------------------------------------------- small, and how far off


def entropy(values: np.ndarray) -> float:
    """Bits of one value."""
    counts = np.bincount(values)
    shares = counts[counts > 0] / len(values)
    return float(-(shares * np.log2(shares)).sum())


def sizes_and_errors(features: list[torch.Tensor]) -> dict[str, float]:
    """Averages over the features, and the worst token of all."""
    rows: list[dict[str, float]] = []
    for feature in features:
        values = feature.reshape(-1, feature.shape[-1])
        exponents = (words_of(feature) >> 7 & 0xFF).reshape(values.shape)
        bound = (entropy(exponents.reshape(-1)) + 8) / 16
        given = np.mean([entropy(channel) for channel in exponents.T])
        packed = len(encoded(feature)) / feature.nbytes
        stored = encode_int8(values)
        difference = decode_int8(stored, *values.shape).double() - values.double()
        token_errors = difference.norm(dim=1) / values.double().norm(dim=1)
        rows.append(
            {
                "lossless_ratio": packed,
                "bound": bound,
                "bound_given_channel": float((given + 8) / 16),
                "lossless_over_bound": packed / bound - 1,
                "int8_ratio": len(stored) / feature.nbytes,
                "int8_relative_error": float(difference.norm() / values.double().norm()),
                "int8_worst_token": float(token_errors.max()),
            }
        )
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return means | {"int8_worst_token": max(row["int8_worst_token"] for row in rows)}


def words_of(feature: torch.Tensor) -> np.ndarray:
    return feature.reshape(-1).view(torch.int16).numpy().view(np.uint16)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def encoded(feature: torch.Tensor) -> memoryview:
    h, w, channels = feature.shape
    return Lossless().encode(bytes_of(feature), h * w, channels)


# ---------------------------------------------------------------- fast


def gb_per_s(work: Callable[[int], object], raw_bytes: int, calls: int) -> float:
    """Median over calls; `work` is told the number of the ring's place."""
    places, times = cycle(range(RING)), []
    for place in range(RING):
        work(place)
    for _ in range(calls):
        place = next(places)
        began_s = time.perf_counter()
        work(place)
        times.append(time.perf_counter() - began_s)
    return raw_bytes / statistics.median(times) / 1e9


def speeds(feature: torch.Tensor, calls: int) -> dict[str, float]:
    """GB/s of raw bytes, one core."""
    h, w, channels = feature.shape
    cells, size = h * w, feature.nbytes
    ring = [torch.empty_like(feature) for _ in range(RING)]
    sources = [bytes_of(feature.clone()) for _ in range(RING)]
    packed = [bytearray(encoded(feature)) for _ in range(RING)]
    small = [bytearray(Int8().encode(source, cells, channels)) for source in sources]
    targets = [bytes_of(tensor) for tensor in ring]
    codec, int8 = Lossless(), Int8()

    def copy(place: int) -> None:
        targets[place][:] = sources[place]

    figures = {
        "copy": gb_per_s(copy, size, calls),
        "lossless_encode": gb_per_s(lambda n: codec.encode(sources[n], cells, channels), size, calls),
        "lossless_decode": gb_per_s(
            lambda n: codec.decode(memoryview(packed[n]), targets[n], cells, channels), size, calls
        ),
        "int8_encode": gb_per_s(lambda n: int8.encode(sources[n], cells, channels), size, calls),
        "int8_decode": gb_per_s(
            lambda n: int8.decode(memoryview(small[n]), targets[n], cells, channels), size, calls
        ),
    }
    return figures | parts_of_decoding(packed, ring, calls) | peers(feature, calls)


def parts_of_decoding(packed: list[bytearray], ring: list[torch.Tensor], calls: int) -> dict[str, float]:
    count, size = ring[0].numel(), ring[0].nbytes
    tools = lossless._tools()
    pieces = list(lossless._pieces(count))

    def frames(place: int) -> Iterator[tuple[memoryview, int, int]]:
        found = lossless._frames(memoryview(packed[place]), count)
        return ((frame, start, stop) for frame, (start, stop) in zip(found, pieces, strict=True))

    planes = [[tools.unpack(frame, b - a).copy() for frame, a, b in frames(n)] for n in range(RING)]
    rest = [np.frombuffer(packed[place], np.uint16, count // 2) for place in range(RING)]
    values = [words_of(tensor) for tensor in ring]

    def unpack(place: int) -> None:
        for frame, start, stop in frames(place):
            tools.unpack(frame, stop - start)

    def put_together(place: int) -> None:
        for plane, (a, b) in zip(planes[place], pieces, strict=True):
            join(plane, rest[place][a // 2 : b // 2], values[place][a:b], tools.scratch[: (b - a) // 2])

    return {
        "zstd_alone": gb_per_s(unpack, size, calls),
        "join_alone": gb_per_s(put_together, size, calls),
    }


def peers(feature: torch.Tensor, calls: int) -> dict[str, float]:
    """What is at hand without splitting, or with zstandard's own search for matches."""
    raw, exponents = bytes(bytes_of(feature)), (words_of(feature) >> 7 & 0xFF).astype(np.uint8).tobytes()
    figures = {}
    for name, data, kept in (("raw_bytes", raw, 0), ("exponents", exponents, len(exponents))):
        packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
        packed = packer.compress(data)
        figures |= {
            f"zstd_1_of_{name}_ratio": (len(packed) + kept) / len(raw),
            f"zstd_1_of_{name}_decode": gb_per_s(
                lambda _, packed=packed, unpacker=unpacker: unpacker.decompress(packed),
                len(raw),
                max(5, calls // 4),
            ),
        }
    return figures


def store_speeds(feature: torch.Tensor, calls: int) -> dict[str, float]:
    """Reading back through the cache, from page cache, into memory that is used again."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, codec in (
            ("none", "bfloat16", "none"),
            ("lossless", "bfloat16", "lossless"),
            ("int8", "int8", "none"),
        ):
            spec = spec_for(feature, dtype)
            with ShardWriter(create_store(Path(folder) / name, spec), spec, codec=codec) as writer:
                for place in range(RING):
                    writer.append(bytes([place]) * 16, feature)
                writer.commit()
            with FeatureCache.open(Path(folder) / name, context="frame") as cache:
                figures[f"get_{name}"] = gb_per_s(reader(cache, feature), feature.nbytes, calls)
    return figures


def reader(cache: FeatureCache, feature: torch.Tensor) -> Callable[[int], object]:
    ring = [torch.empty_like(feature) for _ in range(RING)]
    return lambda place: cache.get_by_key(bytes([place]) * 16, out=ring[place])


def spec_for(feature: torch.Tensor, dtype: str) -> FeatureSpec:
    encoder = EncoderSpec(
        weights_digest="0" * 64, embed_dim=feature.shape[-1] // 2, depth=24, num_heads=16, img_size=518,
        patch_size=14, patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="float32",
    )  # fmt: skip
    return FeatureSpec(encoder=encoder, preprocessing=Preprocessing(), feature_dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b", "small"])
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--features", type=int, default=3, help="of each encoder")
    parser.add_argument("--calls", type=int, default=64, help="of each measurement")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the encoder"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    for size in arguments.sizes:
        features = features_of(size, arguments.width, arguments.features, arguments.device)
        figures[size] = sizes_and_errors(features)
        figures[f"{size}_outlier_channels"] = sizes_and_errors(list(map(with_outlier_channels, features)))
        figures[f"{size}_massive_activations"] = sizes_and_errors(
            list(map(with_massive_activations, features))
        )
        if size == arguments.sizes[0]:
            figures["shape"] = list(features[0].shape)
            figures["piece_values"] = PIECE_VALUES
            figures["gb_per_s"] = speeds(features[0], arguments.calls)
            figures["gb_per_s"] |= store_speeds(features[0], arguments.calls)
    record.write("codec", "cpu", vars(arguments), figures)


if __name__ == "__main__":
    main()
