"""A `CachedAggregator` gives what the module gives, hit or miss, and the module is not called."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import golden_recipe
from vggt_cache import CachedAggregator, Staging, precompute
from vggt_cache.encoder import Checkpoint, EncoderConfig
from vggt_cache.errors import CheckpointError, MissingFeatureError, SettingsError, SpecMismatchError
from vggt_module import Aggregator, FrameByFrame, with_golden_weights

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def aggregator(small_config: EncoderConfig) -> Aggregator:
    return with_golden_weights(small_config)


@pytest.fixture(scope="module")
def one_by_one(small_config: EncoderConfig) -> Aggregator:
    return with_golden_weights(small_config, FrameByFrame)


def images_of(seed: int, frames: int = 3, height: int = 42, width: int = 56) -> Tensor:
    """[S, 3, H, W] in [0, 1], each value k / 255."""
    pixels = [golden_recipe.image(seed, height, width, step) for step in range(frames)]
    return torch.stack(pixels).permute(0, 3, 1, 2).float() / 255


def called(module: nn.Module, images: Tensor, **named: Any) -> Any:
    with torch.no_grad():
        return module(images, **named)[0]


def differences(found: Any, live: Any, layer: int, tokens: slice = slice(None)) -> float:
    one, other = found[layer], live[layer]
    assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return float((one[:, :, tokens] - other[:, :, tokens]).abs().max())


@pytest.mark.parametrize("is_cached", [False, True])
def test_live_and_cached_agree_with_the_published_code(
    aggregator: Aggregator, one_by_one: Aggregator, tmp_path: Path, is_cached: bool
) -> None:
    joint, causal = golden_recipe.stored("joint.npz"), golden_recipe.stored("causal.npz")
    modules: list[nn.Module] = [aggregator, one_by_one]
    if is_cached:
        modules = [
            CachedAggregator(module, tmp_path / type(module).__name__, layers=range(4)) for module in modules
        ]
    outputs = called(modules[0], images_of(31, 3, 112, 140)[None])
    walked, _ = walk(modules[1], images_of(21, 3, 112, 154))
    for layer in range(4):
        for frame in range(3):
            name = f"s31_3x112x140/f{frame}/L{layer}"
            assert (
                golden_recipe.largest_difference(joint, name, outputs[layer][0, frame], special=5) < TOLERANCE
            )
    for layer in (0, 1, -2, -1):
        name = f"f2/L{layer}"
        assert golden_recipe.largest_difference(causal, name, walked[layer][0, 0], special=5) < TOLERANCE


@pytest.mark.slow
def test_what_is_staged_is_read_without_the_cache(aggregator: Aggregator, tmp_path: Path) -> None:
    images, stage = images_of(5, 1)[None], Staging(local_dir=tmp_path / "local")

    def output(**options: Any) -> Tensor:
        cached = CachedAggregator(aggregator, tmp_path / "cache", **options)
        found: Tensor = called(cached, images)[-2]
        cached.close()
        return found

    computed = output()
    assert torch.equal(output(miss="error", stage=stage), computed)
    for path in (tmp_path / "cache").rglob("*.safetensors"):  # whoever reads its record finds it damaged
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    assert torch.equal(output(miss="error", stage=stage), computed)


# ---------------------------------------------------------------- the call and its results


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ("all", [slice(None)]),
        ("patches", [slice(5, None)]),
        ("patches+camera", [slice(0, 1), slice(5, None)]),
    ],
)
@pytest.mark.parametrize("layers", [-2, (1, -1)])
def test_hit_and_miss_are_what_the_module_gives(
    aggregator: Aggregator, tmp_path: Path, tokens: str, kept: list[slice], layers: Any
) -> None:
    images = torch.stack([images_of(1), images_of(2)])
    live = called(aggregator, images)
    cached = CachedAggregator(aggregator, tmp_path, layers=layers, tokens=tokens)
    missed = called(cached, images)
    cached.flush()
    before, found = aggregator.calls, called(cached, images)
    assert aggregator.calls == before
    for layer in (layers,) if isinstance(layers, int) else layers:
        for part in kept:
            assert differences(missed, live, layer, part) < TOLERANCE
            assert torch.equal(missed[layer][:, :, part], found[layer][:, :, part])
        assert bool(missed[layer].isnan().any()) == (tokens != "all")


def test_a_list_without_a_batch_and_one_alone_in_a_batch_are_one(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    cached = CachedAggregator(aggregator, tmp_path)
    first = called(cached, images_of(1))
    again = called(cached, images_of(1)[None])
    assert torch.equal(first[-2], again[-2])
    assert first[-2].shape[:2] == (1, 3)


def test_only_what_is_missing_of_a_batch_is_computed(
    aggregator: Aggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = CachedAggregator(aggregator, tmp_path)
    called(cached, images_of(1)[None])
    computed: list[int] = []
    encode = cached._encode
    monkeypatch.setattr(
        cached, "_encode", lambda shelf, lists: computed.append(len(lists)) or encode(shelf, lists)
    )
    batch = torch.stack([images_of(2), images_of(1), images_of(3), images_of(2)])
    outputs, live = called(cached, batch), called(aggregator, batch)
    assert computed == [2]
    assert differences(outputs, live, -2) < TOLERANCE


def test_an_output_that_is_not_kept_says_what_to_ask_for(aggregator: Aggregator, tmp_path: Path) -> None:
    outputs = called(CachedAggregator(aggregator, tmp_path, layers=-2), images_of(1))
    assert len(outputs) == 4
    with pytest.raises(SettingsError, match=r"output 3 .* give CachedAggregator layers=\(2, 3\)"):
        outputs[-1]
    of_first_sample = [output[0] for output in outputs]  # as some models take a sample's part of all
    assert of_first_sample[2].shape == outputs[2][0].shape
    with pytest.raises(SettingsError, match="output 3"):
        _ = of_first_sample[3].shape
    with pytest.raises(SettingsError, match="output 0"):
        torch.cat([of_first_sample[0], of_first_sample[2]])
    with pytest.raises(IndexError):
        outputs[4]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtype_is_what_the_module_would_give(
    small_config: EncoderConfig, tmp_path: Path, weights: torch.dtype, autocast: bool
) -> None:
    if autocast and weights == torch.bfloat16:
        pytest.skip("LayerNorm of a CPU does not take both")
    module = with_golden_weights(small_config).to(weights)
    images = images_of(1).to(weights)
    cached = CachedAggregator(module, tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        live, found = called(module, images[None])[-2], called(cached, images[None])[-2]
    assert found.dtype == live.dtype
    assert float((found.float() - live.float()).norm() / live.float().norm()) < 0.02


def test_float_pixels_are_pixels_too(aggregator: Aggregator, tmp_path: Path) -> None:
    images = nn.functional.interpolate(images_of(51, 3, 100, 130), size=(112, 140), mode="bilinear")
    images[1] = images_of(3, 1, 112, 140)[0]  # one frame of bytes among floats
    cached = CachedAggregator(aggregator, tmp_path)
    assert differences(called(cached, images), called(aggregator, images[None]), -2) < TOLERANCE
    assert not torch.equal(called(cached, images + 1e-6)[-2], called(cached, images)[-2])


# ---------------------------------------------------------------- in somebody's model


def model_with(module: nn.Module) -> nn.Module:
    model = nn.Module()
    model.vggt = nn.Module()
    model.vggt.aggregator = module
    model.head = nn.Linear(768, 2)
    return model


def test_names_are_those_of_the_model_without_a_cache(aggregator: Aggregator, tmp_path: Path) -> None:
    plain, wrapped = model_with(aggregator), model_with(CachedAggregator(aggregator, tmp_path))
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in wrapped.named_parameters()]
    assert wrapped.load_state_dict(plain.state_dict()).missing_keys == []
    assert wrapped.vggt.aggregator.depth == 4
    wrapped.train()
    assert aggregator.training
    wrapped.eval()


def test_offloaded_weights_stay_on_the_cpu_and_in_the_state(
    small_config: EncoderConfig, tmp_path: Path
) -> None:
    plain = model_with(with_golden_weights(small_config))
    state = {name: weight.clone() for name, weight in plain.state_dict().items()}
    module = with_golden_weights(small_config)
    wrapped = model_with(CachedAggregator(module, tmp_path, offload=True)).to("meta")
    assert module.camera_token.device.type == "cpu"
    assert [name for name, _ in wrapped.named_parameters()] == ["head.weight", "head.bias"]
    assert list(wrapped.state_dict()) == list(state)
    wrapped = model_with(CachedAggregator(module, tmp_path, offload=True))
    module.camera_token.zero_()
    found = wrapped.load_state_dict(state)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert torch.equal(module.camera_token, state["vggt.aggregator.camera_token"])


def test_copies_and_pickles_read_the_same_cache(aggregator: Aggregator, tmp_path: Path) -> None:
    cached = CachedAggregator(aggregator, tmp_path)
    expected = called(cached, images_of(1))[-2]
    cached.flush()
    for other in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):  # noqa: S301
        other.wrapped.forward = None  # would fail if it were called
        assert torch.equal(called(other, images_of(1))[-2], expected)
        assert other.camera_token is other.wrapped.camera_token


def test_gradients_are_refused(small_config: EncoderConfig, tmp_path: Path) -> None:
    module = with_golden_weights(small_config)
    cached = CachedAggregator(module, tmp_path)
    assert not cached(images_of(1))[0][-2].requires_grad  # without no_grad, as some models call it
    module.camera_token.requires_grad_(True)
    with pytest.raises(SettingsError, match="gradients are asked"):
        cached(images_of(1))


# ---------------------------------------------------------------- which features


def test_the_identity_is_that_of_the_checkpoint(
    aggregator: Aggregator, small_checkpoint: Path, tmp_path: Path
) -> None:
    cached = CachedAggregator(aggregator, tmp_path, layers=(1, -1))
    assert cached._asked.spec("joint", "float32").encoder == Checkpoint.open(
        str(small_checkpoint), layer=(1, -1)
    ).spec("float32")


@pytest.mark.parametrize(
    ("tokens", "feature_dtype"), [("patches", "bfloat16"), ("patches+camera", "float32")]
)
def test_what_precompute_has_stored_is_found_without_saying_what_it_kept(
    aggregator: Aggregator, small_checkpoint: Path, tmp_path: Path, tokens: str, feature_dtype: str
) -> None:
    kept = {"tokens": tokens, "feature_dtype": feature_dtype, "device": "cpu"}
    precompute([images_of(1)], tmp_path, encoder=small_checkpoint, context="joint", **kept)
    stores = sorted(tmp_path.glob("joint-*"))
    cached = CachedAggregator(aggregator, tmp_path)
    cached._encode = None  # type: ignore[assignment]
    found, live = called(cached, images_of(1)[None]), called(aggregator, images_of(1)[None])
    close = TOLERANCE if feature_dtype == "float32" else 0.05
    assert differences(found, live, -2, slice(5, None)) < close
    assert sorted(tmp_path.glob("joint-*")) == stores


def test_a_cache_of_another_context_alone_is_told(
    aggregator: Aggregator, small_checkpoint: Path, tmp_path: Path
) -> None:
    """`frame` is what precompute makes where nobody says otherwise."""
    precompute([images_of(1)], tmp_path, encoder=small_checkpoint, context="frame", device="cpu")
    with pytest.warns(
        UserWarning, match="of context frame, and the module is called for those of context joint"
    ):
        called(CachedAggregator(aggregator, tmp_path), images_of(1)[None])


@pytest.mark.parametrize("asked", [{"layers": -1}, {"tokens": "all"}])
def test_a_cache_of_which_nothing_can_be_found_is_told(
    aggregator: Aggregator, small_checkpoint: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    precompute(
        [images_of(1)], tmp_path, encoder=small_checkpoint, context="joint", tokens="patches", device="cpu"
    )
    with pytest.warns(UserWarning, match="nothing of it is found, and all is computed anew"):
        called(CachedAggregator(aggregator, tmp_path, **asked), images_of(1))


def test_other_weights_are_refused(small_config: EncoderConfig, tmp_path: Path) -> None:
    module = with_golden_weights(small_config)
    called(CachedAggregator(module, tmp_path), images_of(1))
    module.camera_token.mul_(2)
    with pytest.raises(SpecMismatchError, match="made with other weights"):
        called(CachedAggregator(module, tmp_path), images_of(1))


def test_weights_that_change_in_the_model_are_other_weights(
    small_config: EncoderConfig, tmp_path: Path
) -> None:
    module = with_golden_weights(small_config)
    cached = CachedAggregator(module, tmp_path)
    called(cached, images_of(1))
    cached.flush()
    module.camera_token.mul_(2)
    with pytest.raises(SpecMismatchError, match="made with other weights"):
        called(cached, images_of(1))


def test_a_module_that_computes_something_else_is_refused(
    small_config: EncoderConfig, tmp_path: Path
) -> None:
    module = with_golden_weights(small_config)
    module._resnet_mean += 1
    with pytest.raises(CheckpointError, match="gives other numbers"):
        called(CachedAggregator(module, tmp_path), images_of(1))
    with pytest.raises(CheckpointError, match="has not the weights of VGGT"):
        CachedAggregator(nn.Linear(2, 2), tmp_path)


def test_miss_error_and_encode(aggregator: Aggregator, tmp_path: Path) -> None:
    filled = CachedAggregator(aggregator, tmp_path)
    expected = called(filled, images_of(1))[-2]
    filled.flush()
    strict = CachedAggregator(aggregator, tmp_path, miss="error")
    assert torch.equal(called(strict, images_of(1))[-2], expected)
    with pytest.raises(MissingFeatureError, match="3 frames of 56 x 42 pixels"):
        called(strict, images_of(2))
    called(CachedAggregator(aggregator, tmp_path, miss="encode"), images_of(2))
    with pytest.raises(MissingFeatureError):
        called(strict, images_of(2))
    with pytest.raises(SettingsError, match="miss is 'live'"):
        called(CachedAggregator(aggregator, tmp_path, miss="live"), images_of(2))


def test_two_that_fill_one_cache_find_what_the_other_has_computed(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    one, other = (CachedAggregator(aggregator, tmp_path) for _ in range(2))
    for seed, cached in enumerate((one, other)):
        called(cached, images_of(seed))
    for cached in (one, other):
        cached.flush()
    for cached in (one, other):
        cached._encode = None  # type: ignore[assignment]
        for seed in range(2):
            called(cached, images_of(seed))


def test_features_that_the_disk_does_not_have_yet_are_found_when_they_are_asked_again(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    cached = CachedAggregator(aggregator, tmp_path)
    expected = [called(cached, images_of(seed, 1, 14, 14))[-2] for seed in range(7)]
    cached._encode = None  # type: ignore[assignment]
    for seed in range(7):
        assert torch.equal(called(cached, images_of(seed, 1, 14, 14))[-2], expected[seed])


def test_what_is_written_into_a_result_is_not_stored(aggregator: Aggregator, tmp_path: Path) -> None:
    cached = CachedAggregator(aggregator, tmp_path)
    result = called(cached, images_of(1))[-2]
    expected = result.clone()
    result.zero_()
    assert torch.equal(called(cached, images_of(1))[-2], expected)
    cached.flush()
    assert torch.equal(called(cached, images_of(1))[-2], expected)


# ---------------------------------------------------------------- frame by frame


def walk(module: nn.Module, frames: Tensor, past: list[Any] | None = None) -> tuple[Any, list[Any]]:
    """As JanusVLN calls it: the last frame's outputs."""
    past = [None] * 4 if past is None else past
    outputs: Any = None
    for number, frame in enumerate(frames):
        with torch.no_grad():
            outputs, _, past = module(
                frame[None, None], past_key_values=past, use_cache=True, past_frame_idx=number
            )
    return outputs, past


def test_a_walk_gives_the_last_frames_output(one_by_one: Aggregator, tmp_path: Path) -> None:
    frames = images_of(1, 5)
    live, _ = walk(one_by_one, frames)
    cached = CachedAggregator(one_by_one, tmp_path)
    missed = walk(cached, frames)[0]
    assert differences(missed, live, -2) < TOLERANCE
    cached.flush()
    calls, encode = one_by_one.calls, cached._encode
    cached._encode = None  # type: ignore[assignment]
    found = walk(cached, frames)[0]
    assert torch.equal(found[-2], missed[-2])
    assert one_by_one.calls == calls
    assert torch.equal(
        [output[0] for output in found][-2], found[-2][0]
    )  # as some code takes a sample's part
    shorter = walk(cached, frames[:4])[
        0
    ]  # another feature; nothing is looked up or computed until it is indexed
    assert len(shorter) == 4
    cached._encode = encode  # type: ignore[method-assign]
    assert differences(shorter, walk(one_by_one, frames[:4])[0], -2) < TOLERANCE


def test_who_looks_at_keys_and_values_gets_the_modules(one_by_one: Aggregator, tmp_path: Path) -> None:
    """Evaluation with eviction: after each frame all but the first and the last two are dropped."""

    def evicted(past: list[Any]) -> list[Any]:
        if past[0][0].size(2) <= 3:
            return past
        return [[torch.cat([part[:, :, :1], part[:, :, -2:]], dim=2) for part in pair] for pair in past]

    def evaluate(module: nn.Module) -> list[Tensor]:
        past, features = [None] * 4, []
        for frame in images_of(4, 6):
            outputs, past = walk(module, frame[None], past)
            past = evicted(past)
            features.append(outputs[-2])
        return features

    cached = CachedAggregator(one_by_one, tmp_path)
    for found, live in zip(evaluate(cached), evaluate(one_by_one), strict=True):
        assert torch.equal(found, live)


def test_close_puts_all_on_disk_and_ends_the_threads_and_a_later_call_goes_on(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    began, images = threading.active_count(), images_of(5)
    cached = CachedAggregator(aggregator, tmp_path, layers=-2)
    first = called(cached, images)
    assert threading.active_count() > began
    cached.close()
    assert threading.active_count() == began
    only_read = CachedAggregator(aggregator, tmp_path, layers=-2, miss="error")
    assert differences(called(only_read, images), first, -2) == 0
    assert differences(called(cached, images), first, -2) == 0
