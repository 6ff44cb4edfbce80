"""Merger and fusion against values worked out in loops, without the code under test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from janusvln.demo.tiny_qwen import TOKEN_IDS, write_tiny_qwen
from janusvln.model.fusion import SpatialFeatureError, SpatialMerger, count_images, group_patches, merge
from model_kit import feature, images, load, places_of, prompt, rows, tokens_of

LAM = 0.7
SMALL, WIDE = (4, 6), (2, 8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return load(directory, lam=LAM)


@pytest.fixture(scope="module")
def plain(directory: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)


def expected_tokens(merger: Any, values: Tensor) -> np.ndarray:
    """float64, one token at a time."""
    weights = {name: w.detach().double().numpy() for name, w in merger.named_parameters()}
    patches = values.double().numpy()
    tokens = []
    for top in range(0, patches.shape[0] - 1, 2):
        for left in range(0, patches.shape[1] - 1, 2):
            four = []
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                patch = patches[top + row, left + column]
                four.append(patch / math.sqrt(np.mean(patch**2) + 1e-6) * weights["ln_q.weight"])
            hidden = weights["mlp.0.weight"] @ np.concatenate(four) + weights["mlp.0.bias"]
            hidden = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
            tokens.append(weights["mlp.2.weight"] @ hidden + weights["mlp.2.bias"])
    return np.array(tokens)


@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (5, 6), (4, 7), (5, 7)])
def test_the_merger_computes_the_reference_formula_and_drops_what_has_no_partner(
    grid: tuple[int, int], model: Any
) -> None:
    values = feature(grid)
    (tokens,) = merge(model.merger, [values])
    expected = expected_tokens(model.merger, values)
    assert tokens.shape == (grid[0] // 2 * (grid[1] // 2), 64)
    np.testing.assert_allclose(tokens.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_norm_adds_one_millionth_to_the_mean_square(model: Any) -> None:
    values = feature((2, 2)) * 1e-3
    (tokens,) = merge(model.merger, [values])
    np.testing.assert_allclose(tokens.detach().numpy(), expected_tokens(model.merger, values), atol=1e-4)


def test_several_features_are_merged_in_one_call_as_each_alone(model: Any) -> None:
    features = [feature((4, 6), 1), feature((5, 3), 2), feature((2, 2), 3)]
    calls = []
    handle = model.merger.register_forward_hook(lambda *_: calls.append(1))
    together = merge(model.merger, features)
    handle.remove()
    assert len(calls) == 1
    for tokens, values in zip(together, features, strict=True):
        torch.testing.assert_close(tokens, merge(model.merger, [values])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_cast_to_the_weights_dtype_before_the_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    merger = SpatialMerger(8, 16, 12).bfloat16()
    values = torch.randn(4, 4, 8, dtype=torch.float64).to(dtype)
    (tokens,) = merge(merger, [values])
    (cast_first,) = merge(merger, [values.bfloat16()])
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, cast_first)


def test_the_norm_is_computed_in_float32_and_cast_back_before_its_weight() -> None:
    torch.manual_seed(0)
    merger = SpatialMerger(64, 16, 12).bfloat16()
    merger.ln_q.weight.data = torch.rand(64).bfloat16() + 0.5
    x = group_patches(torch.randn(2, 2, 64).bfloat16())
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(merger.ln_q(x), merger.ln_q.weight * normed)


# ---------------------------------------------------------------- fusion


def expected_logits(
    model: Any, plain: Any, batch: dict[str, Tensor], owner: list[int], features: list[Tensor]
) -> Tensor:
    """A plain Qwen2.5-VL on embeddings where image i has the tokens of feature owner[i] added."""
    embeddings = plain.get_input_embeddings()(batch["input_ids"]).clone()
    parts = plain.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    fused = [
        part + LAM * torch.from_numpy(expected_tokens(model.merger, features[owner[i]])).float()
        for i, part in enumerate(parts)
    ]
    places = (batch["input_ids"] == TOKEN_IDS["<|image_pad|>"]).nonzero().tolist()
    for (row, column), token in zip(places, torch.cat(fused), strict=True):
        embeddings[row, column] = token
    positions, _ = plain.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=(batch["input_ids"] == TOKEN_IDS["<|image_pad|>"]).int(),
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    return plain(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=batch["attention_mask"]
    ).logits


def seen(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return logits[batch["attention_mask"].bool()]


def test_one_sample_equals_the_reference_rule_of_repeating(model: Any, plain: Any) -> None:
    batch = rows(prompt(SMALL, SMALL, SMALL)) | images(SMALL, SMALL, SMALL)
    features = [feature((5, 7))]
    ours = model(**batch, spatial_features=features).logits
    parts = torch.cat(plain.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])[1])
    spatial = torch.from_numpy(expected_tokens(model.merger, features[0])).float()
    repeated = parts + LAM * spatial.repeat(len(parts) // len(spatial), 1)
    embeddings = plain.get_input_embeddings()(batch["input_ids"])
    embeddings[batch["input_ids"] == TOKEN_IDS["<|image_pad|>"]] = repeated
    kinds = (batch["input_ids"] == TOKEN_IDS["<|image_pad|>"]).int()
    positions, _ = plain.model.get_rope_index(batch["input_ids"], kinds, batch["image_grid_thw"])
    reference = plain(inputs_embeds=embeddings, position_ids=positions).logits
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("counts", "grids"),
    [
        ((2, 2), (SMALL, SMALL)),
        ((3, 1), (SMALL, SMALL)),
        ((1, 3), (SMALL, WIDE)),
        ((2, 1), (WIDE, SMALL)),
        ((2, 0, 1), (SMALL, SMALL, WIDE)),
    ],
)
def test_a_batch_is_fused_sample_by_sample(
    counts: tuple[int, ...], grids: tuple[tuple[int, int], ...], model: Any, plain: Any
) -> None:
    batch = rows(*(prompt(*[grid] * count) for count, grid in zip(counts, grids, strict=True)))
    every = [grid for count, grid in zip(counts, grids, strict=True) for _ in range(count)]
    batch |= images(*every)
    with_images = [grid for count, grid in zip(counts, grids, strict=True) if count]
    features = [feature((h + 1, w), seed) for seed, (h, w) in enumerate(with_images)]
    kept = [count for count in counts if count]
    owner = [sample for sample, count in enumerate(kept) for _ in range(count)]
    expected = seen(expected_logits(model, plain, batch, owner, features), batch)
    by_rows = seen(model(**batch, spatial_features=features).logits, batch)
    places = places_of(batch["input_ids"])
    said = seen(model(**batch, spatial_features=features, image_positions=places).logits, batch)
    torch.testing.assert_close(by_rows, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(by_rows, said)


def test_a_packed_row_equals_its_samples_alone(model: Any) -> None:
    samples = [(SMALL, SMALL), (WIDE,), ()]
    prompts = [prompt(*grids, text=(seed + 1, seed + 2)) for seed, grids in enumerate(samples)]
    pictures = [images(*grids, seed=seed) for seed, grids in enumerate(samples)]
    features = [feature(SMALL, 1), feature(WIDE, 2)]
    alone, positions = [], []
    for index, ids in enumerate(prompts):
        row = rows(ids)
        own = {**pictures[index], "spatial_features": [features[index]]} if samples[index] else {}
        alone.append(model(**row, **own).logits)
        kinds = (row["input_ids"] == TOKEN_IDS["<|image_pad|>"]).int()
        grids = pictures[index]["image_grid_thw"] if samples[index] else None
        vision, _ = model.model.get_rope_index(row["input_ids"], kinds, grids)
        positions.append(torch.cat([torch.arange(len(ids)).expand(1, 1, -1), vision]))
    ids = torch.tensor([[token for ids in prompts for token in ids]])
    places = (ids[0] == TOKEN_IDS["<|image_pad|>"]).nonzero()[:, 0]
    packed = model(
        input_ids=ids,
        position_ids=torch.cat(positions, -1),
        pixel_values=torch.cat([p["pixel_values"] for p in pictures]),
        image_grid_thw=torch.cat([p["image_grid_thw"] for p in pictures[:2]]),
        spatial_features=features,
        image_positions=places.split([2 * tokens_of(SMALL), tokens_of(WIDE)]),
    ).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


def test_without_lam_the_logits_are_those_of_the_plain_model_bit_for_bit(directory: Path, plain: Any) -> None:
    batch = rows(prompt(SMALL, SMALL), prompt(WIDE)) | images(SMALL, SMALL, WIDE)
    ours = load(directory, lam=0.0)(**batch, spatial_features=[feature(SMALL), feature(WIDE)]).logits
    kinds = (batch["input_ids"] == TOKEN_IDS["<|image_pad|>"]).int()
    assert torch.equal(ours, plain(**batch, mm_token_type_ids=kinds).logits)


# ---------------------------------------------------------------- refusals


def refusal(model: Any, **batch: Any) -> str:
    with pytest.raises(SpatialFeatureError) as caught:
        model(**batch)
    return str(caught.value)


@pytest.mark.promise("Never silent")
def test_another_grid_is_refused_and_both_are_named(model: Any) -> None:
    batch = rows(prompt(SMALL)) | images(SMALL)
    text = refusal(model, **batch, spatial_features=[feature((5, 9))])
    assert "5 x 9 patches" in text
    assert "4 x 8 are used" in text
    assert "image of 4 x 6 patches" in text
    # The same number of patches the other way round would be added without an error.
    assert "6 x 4 patches" in refusal(model, **batch, spatial_features=[feature((6, 4))])


def test_images_without_features_and_features_without_images_are_refused(model: Any) -> None:
    batch = rows(prompt(SMALL)) | images(SMALL)
    assert "images without spatial_features" in refusal(model, **batch)
    assert "images without spatial_features" in refusal(model, **batch, spatial_features=[])
    text_only = rows(prompt())
    assert "features without images" in refusal(model, **text_only, spatial_features=[feature(SMALL)])


def test_a_prompt_with_places_for_images_and_no_image_is_refused(model: Any) -> None:
    assert "6 image tokens, but no image is given" in refusal(model, **rows(prompt(SMALL)))


def test_too_few_or_too_many_features_are_refused(model: Any) -> None:
    batch = rows(prompt(SMALL), prompt(SMALL)) | images(SMALL, SMALL)
    assert "1 features are given for 2 samples" in refusal(model, **batch, spatial_features=[feature(SMALL)])
    three = [feature(SMALL)] * 3
    assert "3 features are given for 2 samples" in refusal(model, **batch, spatial_features=three)


def test_places_that_the_images_do_not_fill_are_refused(model: Any) -> None:
    batch = rows(prompt(SMALL, SMALL), prompt(SMALL, SMALL)) | images(*[SMALL] * 4)
    given = {"spatial_features": [feature(SMALL, 1), feature(SMALL, 2)]}
    places = torch.cat(places_of(batch["input_ids"]))
    for sizes in ([7, 17], [11, 13], [24, 0]):
        assert "image" in refusal(model, **batch, **given, image_positions=places.split(sizes))
    few = [place[:-1] for place in places_of(batch["input_ids"])]
    assert "sample 0 of the batch has 11 image tokens" in refusal(
        model, **batch, **given, image_positions=few
    )
    three = places.split([12, 6, 6])
    assert "2 features are given for 3 samples" in refusal(model, **batch, **given, image_positions=three)


def test_images_that_do_not_fill_their_places_are_refused() -> None:
    six = (1, 4, 6)
    assert count_images([12, 0, 6], [six, six, six]) == [2, 1]
    for tokens_per_row, grids in (([6], [six, six]), ([12], [six]), ([7, 5], [six, six]), ([5], [six])):
        with pytest.raises(SpatialFeatureError):
            count_images(tokens_per_row, grids)
