"""Features in one byte a value: how far off they are, the same bits on every device, and said by the spec."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from codec_kit import BF16, INT8, KEYS, NUMBERS, given_back, write_packed
from store_kit import equal, make_feature, make_key, make_spec, write_shard
from vggt_cache.codec.base import Int8
from vggt_cache.codec.quantise import EncodedFeature, _most, decode_int8, decode_rows, encode_int8
from vggt_cache.errors import SettingsError
from vggt_cache.identity import feature_key, frame_digest
from vggt_cache.store import FeatureCache

TOKENS, CHANNELS = 300, 256
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def activations(kind: str = "plain") -> torch.Tensor:
    """bfloat16 [TOKENS, CHANNELS]: channels of different size, some with outliers."""
    generator = torch.Generator().manual_seed(7)
    sizes = torch.exp(torch.randn(CHANNELS, generator=generator) / 2)
    values = torch.randn(TOKENS, CHANNELS, generator=generator) * sizes
    if kind == "outlier channels":
        values[:, torch.randperm(CHANNELS, generator=generator)[:6]] *= 30
    if kind == "massive activations":
        values[torch.randperm(TOKENS, generator=generator)[:2], 11] = 300.0
    return values.bfloat16()


def decoded(values: torch.Tensor) -> torch.Tensor:
    return decode_int8(encode_int8(values), *values.shape)


def errors(values: torch.Tensor) -> tuple[float, float]:
    """Relative L2 error of the whole, and of the worst token."""
    exact = values.double()
    difference = decoded(values).double() - exact
    return float(difference.norm() / exact.norm()), float((difference.norm(dim=1) / exact.norm(dim=1)).max())


@pytest.mark.parametrize("kind", ["plain", "outlier channels", "massive activations"])
def test_the_error_is_at_most_one_percent_whatever_the_channels(kind: str) -> None:
    whole, worst = errors(activations(kind))
    assert whole <= 0.01
    assert worst <= 0.03


def test_a_massive_activation_costs_the_other_tokens_little() -> None:
    """Without the limit on a channel's normaliser the other tokens lose that channel."""
    values = activations("massive activations")
    others = values[:, 11].float().abs() < 100
    exact = values[others, 11].double()
    assert float((decoded(values)[others, 11].double() - exact).norm() / exact.norm()) < 0.2


def test_the_size_is_half_and_a_little() -> None:
    for tokens, channels in ((1036, 2048), (1610, 2048), (1036, 768)):
        (size, same) = Int8().size_limits(tokens, channels)
        assert size == same
        assert size <= 0.51 * 2 * tokens * channels
    assert len(encode_int8(activations())) == Int8().size_limits(TOKENS, CHANNELS)[0]


def test_zeros_stay_zeros() -> None:
    values = activations()
    values[5], values[:, 3] = 0, 0
    back = decoded(values)
    assert not back[5].any()
    assert not back[:, 3].any()
    assert not decoded(torch.zeros(4, 6, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e30, 1e35])
def test_values_of_any_size_keep_their_digits(factor: float) -> None:
    whole, _ = errors((activations().double() * factor).bfloat16())
    assert whole <= 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    values = activations()
    values[17, 3] = value
    with pytest.raises(SettingsError, match="not finite"):
        encode_int8(values)


def test_the_same_feature_gives_the_same_bytes_again() -> None:
    assert torch.equal(encode_int8(activations()), encode_int8(activations().clone()))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_record_of_another_length_is_refused(change: int) -> None:
    size, _ = Int8().size_limits(6, 4)
    with pytest.raises(ValueError, match="length"):
        Int8().decode(memoryview(bytearray(size + change)), memoryview(bytearray(48)), 6, 4)


def test_decoding_piece_by_piece_gives_the_same_bits_as_at_once() -> None:
    for values in (activations(), activations("outlier channels")[:1], torch.cat([activations()] * 5)):
        record, target = encode_int8(values), torch.empty_like(values)
        decode_rows(record, target)
        assert equal(target, decode_int8(record, *values.shape))


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e-37, 1e35])
def test_a_normaliser_depends_on_no_order_of_the_tokens(factor: float) -> None:
    """A sum in float32 would: devices add in different orders, and a mean near a boundary gives another normaliser."""
    sizes = (activations("massive activations").double() * factor).bfloat16().float().abs()
    largest, generator = sizes.amax(0), torch.Generator().manual_seed(3)
    most = _most(sizes, largest)
    for _ in range(20):
        assert torch.equal(_most(sizes[torch.randperm(TOKENS, generator=generator)], largest), most)


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e35])
def test_a_normaliser_is_made_from_the_sum_that_the_document_defines(factor: float) -> None:
    sizes = (activations("massive activations").double() * factor).bfloat16().float().abs()
    most = _most(sizes, sizes.amax(0))
    for channel in (0, 11, 100):
        column = [Fraction(size) for size in sizes[:, channel].tolist()]
        unit = Fraction(2) ** (math.frexp(max(column))[1] - 1 - 20)
        exact = 16 * sum(size // unit * unit for size in column) / TOKENS
        assert most[channel] == torch.tensor(float(exact), dtype=torch.float64).float()


@needs_gpu
def test_a_gpu_encodes_the_same_bits() -> None:
    for kind in ("plain", "outlier channels", "massive activations"):
        values = torch.cat([activations(kind)] * 3)
        assert torch.equal(encode_int8(values.cuda()).cpu(), encode_int8(values))


@needs_gpu
def test_a_gpu_decodes_the_same_bits() -> None:
    for kind in ("plain", "outlier channels", "massive activations"):
        record = encode_int8(activations(kind))
        feature = EncodedFeature(record=record.pin_memory(), shape=(15, 20, CHANNELS))
        assert equal(feature.decode_on("cuda").cpu(), feature.decode())


# ---------------------------------------------------------------- in a store


def test_int8_is_part_of_the_identity() -> None:
    digests = [frame_digest(b"frame")]
    assert INT8.fingerprint != BF16.fingerprint
    assert feature_key(INT8, digests) != feature_key(BF16, digests)


def test_the_feature_of_another_dtype_is_never_served(tmp_path: Path) -> None:
    write_packed(tmp_path, NUMBERS, INT8)
    write_shard(tmp_path, [9])
    with FeatureCache.open(tmp_path, spec=BF16) as cache:
        assert cache.get_by_key(KEYS[1]) is None


def test_records_can_be_decoded_elsewhere(tmp_path: Path) -> None:
    write_packed(tmp_path, NUMBERS, INT8)
    with FeatureCache.open(tmp_path) as cache:
        memory = torch.zeros(100, dtype=torch.uint8)
        for number, key in KEYS.items():
            encoded = cache.get_encoded(key)
            assert encoded is not None
            assert equal(encoded.decode(), given_back(number, INT8))
            assert equal(encoded.decode_on("cpu"), given_back(number, INT8))
            out = torch.empty(encoded.shape, dtype=torch.bfloat16)
            assert encoded.decode(out=out) is out
            assert equal(out, given_back(number, INT8))
            again = cache.get_encoded(key, out=memory)
            assert again is not None
            assert again.record.data_ptr() == memory.data_ptr()
            assert torch.equal(again.record, encoded.record)
        assert cache.get_encoded(make_key(9)) is None
        assert cache.stats.hits == 6
        for unfit in (memory[:40], memory.view(10, 10), memory.float(), memory[::2]):
            with pytest.raises(SettingsError, match="the record needs a contiguous"):
                cache.get_encoded(KEYS[1], out=unfit)
        with pytest.raises(SettingsError, match="the feature needs a contiguous"):
            encoded.decode(out=torch.empty(2, 3, 5, dtype=torch.bfloat16))


def test_only_int8_can_be_had_encoded(tmp_path: Path) -> None:
    write_shard(tmp_path, NUMBERS)
    with (
        FeatureCache.open(tmp_path) as cache,
        pytest.raises(SettingsError, match="keeps its features in bfloat16"),
    ):
        cache.get_encoded(KEYS[1])


def test_a_feature_that_is_not_finite_does_not_end_the_shard(tmp_path: Path) -> None:
    bad = make_feature(2, INT8)
    bad[0, 0, 0] = float("nan")
    with pytest.raises(SettingsError, match="not finite"):
        write_packed(tmp_path, {2: bad}, INT8)
    from vggt_cache.store import ShardWriter, create_store

    with ShardWriter(create_store(tmp_path, INT8), INT8) as writer:
        writer.append(KEYS[1], make_feature(1, INT8))
        with pytest.raises(SettingsError, match="not finite"):
            writer.append(KEYS[2], bad)
        writer.append(KEYS[3], make_feature(3, INT8))
        writer.commit()
    with FeatureCache.open(tmp_path) as cache:
        assert sorted(cache.keys()) == sorted([KEYS[1], KEYS[3]])


def test_float16_is_not_taken_for_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="it keeps"):
        write_packed(tmp_path, {1: make_feature(1, make_spec(feature_dtype="float16"))}, INT8)
