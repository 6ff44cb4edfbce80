"""int8 features on the device: decoded there to the same values as on the CPU, and how long that takes.

`encoded_bytes_that_differ`: of a record made on the device from one made on the CPU. A channel that is capped by its
mean may be rounded otherwise there, because the mean's sum is in another order. `read_ahead_difference`: a stored
feature that reader threads brought to the device, from the same read on the CPU.
"""

from __future__ import annotations

import torch

from bench_encoder import seconds
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting, relative_difference
from vggt_cache.codec.quantise import decode_int8, encode_int8
from vggt_cache.delivery import ReadAhead
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing, feature_key
from vggt_cache.store import FeatureCache, ShardWriter, create_store


def run(setting: Setting, notes: Notes) -> None:
    h, w, channels = (3, 4, 64) if setting.dry else (35, 46, 2048)
    values = torch.randn(h, w, channels, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[..., :8] *= 30  # as real features have them
    tokens = values.view(-1, channels)
    there = tokens.to(setting.device)
    record = encode_int8(tokens)
    on_device = record.to(setting.device)

    def speed_s(work: object) -> float:
        return seconds(work, setting.device, setting.measurement_s)  # type: ignore[arg-type]

    notes.measure(
        "decoded_difference",
        lambda: relative_difference(
            decode_int8(on_device, *tokens.shape), decode_int8(record, *tokens.shape)
        ),
    )
    notes.measure(
        "encoded_bytes_that_differ", lambda: float((encode_int8(there).cpu() != record).double().mean())
    )
    notes.measure("decode_ms", lambda: 1e3 * speed_s(lambda: decode_int8(on_device, *tokens.shape)))
    notes.measure("encode_ms", lambda: 1e3 * speed_s(lambda: encode_int8(there)))
    notes.measure("read_ahead_difference", lambda: read_ahead_difference(setting, values))


def read_ahead_difference(setting: Setting, feature: torch.Tensor) -> float:
    channels = feature.shape[-1]
    encoder = EncoderSpec(
        weights_digest="0" * 64, embed_dim=channels // 2, depth=2, num_heads=channels // 128 or 1, img_size=518,
        patch_size=14, patch_embed="dinov2_vitl14_reg", layer=0, compute_dtype="bfloat16",
    )  # fmt: skip
    spec = FeatureSpec(encoder=encoder, preprocessing=Preprocessing(), context="frame", feature_dtype="int8")
    key = feature_key(spec, [bytes(32)])
    writer = ShardWriter(create_store(setting.work / "int8", spec), spec)
    writer.append(key, feature)
    writer.commit()
    with FeatureCache.open(setting.work / "int8", context="frame") as cache:
        reader = ReadAhead(cache, setting.device)
        found = reader.wait(reader.start(key))
        reference = cache.get_by_key(key)
        reader.close()
    assert found is not None
    assert reference is not None
    return relative_difference(found, reference)
