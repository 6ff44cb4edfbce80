"""The vision tower attends with few calls and transformers' numbers; a training step never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLForConditionalGeneration

from janusvln.demo.tiny_qwen import TOKEN_IDS, tiny_config, write_tiny_qwen
from janusvln.model import attention
from janusvln.model.attention import BY_LENGTH, Grids, attend_by_length, tower_inputs, tower_layout
from janusvln.model.config import as_janusvln_config
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from model_kit import CHANNELS, HIDDEN, feature, images, load, places_of, prompt, rows

CPU = torch.device("cpu")
SMALL, WIDE = (4, 6), (2, 8)
PUBLISHED = ((1, 34, 46),) * 9
"""Nine frames of 644 x 476 pixels, as JanusVLN was published."""


def make_tower(implementation: str = "sdpa") -> Any:
    """A small tower with the published windows: three layers inside windows, one inside images."""
    config = tiny_config()
    config.vision_config.update({"depth": 4, "window_size": 112, "fullatt_block_indexes": [2]})
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=implementation)
    tower = model.model.visual
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if "qkv" in name:
                weight.mul_(
                    10
                )  # else attention is all but even, and which tokens see each other hardly matters
    return tower


def pixels_of(grids: Grids) -> Tensor:
    patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(patches, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))


def gradients(tower: Any, tokens: Tensor) -> list[Tensor]:
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((tokens * weights).sum(), list(tower.parameters())))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of q in each call of the kernel."""
    made: list[tuple[int, ...]] = []
    kernel: Callable[..., Any] = attention.sdpa_attention_forward

    def counted(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        made.append(tuple(query.shape))
        return kernel(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    return made


# ---------------------------------------------------------------- numbers


sides = st.integers(1, 13).map(lambda pairs: 2 * pairs)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.just(1), sides, sides), min_size=1, max_size=4).map(tuple))
def test_tokens_and_gradients_are_those_of_transformers_loop(grids: Grids) -> None:
    tower = make_tower()
    pixels = pixels_of(grids)
    loop = tower(pixels, grid_thw=torch.tensor(grids)).pooler_output
    expected = gradients(tower, loop)
    attend_by_length(tower)
    ours = tower(pixels, **tower_inputs(tower, grids, CPU)).pooler_output
    torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-6)
    for own, other in zip(gradients(tower, ours), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_the_comparison_would_see_a_token_that_attends_elsewhere() -> None:
    grids = ((1, 18, 22),)
    tower = make_tower()
    loop = tower(pixels_of(grids), grid_thw=torch.tensor(grids)).pooler_output
    whole = torch.tensor([0, 18 * 22], dtype=torch.int32)
    index, _ = attention.get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    other = tower(
        pixels_of(grids), grid_thw=torch.tensor(grids), window_index=index, cu_window_seqlens=whole
    ).pooler_output
    assert (loop - other).abs().max() > 1e-3


def test_a_layout_made_without_gradients_serves_training() -> None:
    grids = ((1, 10, 6), (1, 4, 22))
    tower = make_tower()
    attend_by_length(tower)
    tower_layout.cache_clear()
    with torch.inference_mode():
        tower(pixels_of(grids), **tower_inputs(tower, grids, CPU))
    tokens = tower(pixels_of(grids), **tower_inputs(tower, grids, CPU)).pooler_output
    assert all(gradient.isfinite().all() for gradient in gradients(tower, tokens))


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize("grids", [((1, 10, 22),) * 3, ((1, 8, 8), (1, 18, 22), (1, 2, 2)), ((1, 6, 4),)])
def test_a_layer_makes_one_call_for_each_length(grids: Grids, calls: list[tuple[int, ...]]) -> None:
    tower = make_tower()
    attend_by_length(tower)
    tower(pixels_of(grids), **tower_inputs(tower, grids, CPU))
    _, ends = attention.get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    windows, whole = set(ends.diff().tolist()), {h * w for _, h, w in grids}
    assert len(calls) == 3 * len(windows) + len(whole)
    assert {shape[2] for shape in calls} == windows | whole


def test_nine_published_frames_take_116_calls_and_not_7596() -> None:
    layout = tower_layout(PUBLISHED, 2, 112, 14, CPU)
    assert layout.windows.runs == ((180, 64), (36, 48), (45, 16), (9, 12))
    assert layout.images.runs == ((9, 34 * 46),)
    windows, whole = (sum(count for count, _ in part.runs) for part in (layout.windows, layout.images))
    assert 28 * windows + 4 * whole == 7596  # a window at a time, in the tower of Qwen2.5-VL
    assert 28 * len(layout.windows.runs) + 4 * len(layout.images.runs) == 116


# ---------------------------------------------------------------- where it is used


def test_our_model_attends_by_length_where_it_would_run_with_sdpa(
    tmp_path: Path, calls: list[tuple[int, ...]]
) -> None:
    directory = write_tiny_qwen(tmp_path)
    batch = rows(prompt((4, 6))) | images((4, 6)) | {"spatial_features": [feature((4, 6))]}
    logits = load(directory)(**batch).logits
    assert calls
    calls.clear()
    eager = load(directory, attn_implementation="eager")
    assert eager.model.visual.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**batch).logits, logits, rtol=1e-4, atol=1e-4)
    assert not calls


def test_other_code_may_call_the_tower_and_the_configuration_is_saved_without_it(tmp_path: Path) -> None:
    tower, grids = make_tower(), ((1, 10, 6),)
    loop = tower(pixels_of(grids), grid_thw=torch.tensor(grids)).pooler_output
    attend_by_length(tower)
    assert torch.equal(tower(pixels_of(grids), grid_thw=torch.tensor(grids)).pooler_output, loop)
    load(write_tiny_qwen(tmp_path / "plain")).save_pretrained(tmp_path / "saved")
    assert BY_LENGTH not in (tmp_path / "saved" / "config.json").read_text()
    assert load(tmp_path / "saved").model.visual.config._attn_implementation == BY_LENGTH


# ---------------------------------------------------------------- waiting


def trained_batch(device: str) -> dict[str, Any]:
    """Two samples of two images each, as the trainer hands them to the model."""
    batch = rows(prompt(SMALL, SMALL), prompt(WIDE, WIDE, text=(1, 2))) | images(SMALL, SMALL, WIDE, WIDE)
    ids = batch["input_ids"]
    kinds = (ids == TOKEN_IDS["<|image_pad|>"]).int()
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape).clone()
    on_device: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": positions,
        "mm_token_type_ids": kinds,
        "loss_weights": torch.ones(ids.shape),
        "pixel_values": batch["pixel_values"],
        "spatial_features": [feature(SMALL), feature(WIDE)],
        "image_positions": places_of(ids),
        "action_labels": torch.tensor([1, 2]),
        "action_positions": torch.tensor([3, ids.shape[1] + 3]),
    }
    moved = {
        name: [part.to(device) for part in value] if isinstance(value, list) else value.to(device)
        for name, value in on_device.items()
    }
    return moved | {"image_grid_thw": batch["image_grid_thw"].tolist()}


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "unique", "equal")
"""Operations whose result, or its size, the host needs before it can go on."""


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for the device ("meta"), in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moves = {part.device.type for part in tree_leaves((args, result)) if isinstance(part, Tensor)}
        copies = func.overloadpacket is torch.ops.aten._to_copy and moves == {"cpu", "meta"}
        if copies or func.overloadpacket.__name__.startswith(WAITING) or _picks_by_mask(func, args):
            self.found.append(str(func))
        return result


def _picks_by_mask(func: Any, args: Any) -> bool:
    indices = args[1] if func.overloadpacket is torch.ops.aten.index else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def test_a_training_step_never_waits_for_the_device() -> None:
    """On meta tensors, which have no values, so that whatever asks for one on the host is an error besides."""
    config = as_janusvln_config(tiny_config())
    config.update({"spatial_channels": CHANNELS, "spatial_hidden_size": HIDDEN, "action_head": True})
    with torch.device("meta"):
        model = JanusVLN(config).train()
    batch = trained_batch("meta")
    model(**batch)  # the layout of these grids is now remembered
    with Waits() as waits:
        model(**batch).loss.backward()
    assert waits.found == []
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name


@pytest.mark.parametrize("name", ["image_positions", "image_grid_thw"])
def test_without_what_the_trainer_knows_a_step_would_wait(name: str) -> None:
    config = as_janusvln_config(tiny_config())
    config.update({"spatial_channels": CHANNELS, "spatial_hidden_size": HIDDEN})
    with torch.device("meta"):
        model = JanusVLN(config).train()
    batch = trained_batch("meta")
    batch[name] = None if name == "image_positions" else torch.tensor(batch[name], device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        model(**batch)
