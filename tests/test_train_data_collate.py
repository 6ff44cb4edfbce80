"""Batches, padded and packed: each sample comes out of the model as if it had been alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from janusvln.data.collate import PackedCollator, PaddedCollator
from janusvln.data.dataset import NavigationDataset
from janusvln.data.images import QwenPixels
from janusvln.demo.tiny_qwen import TOKEN_IDS
from train_data_kit import make_dataset, talk, text_of, tiny_qwen, write_frames, write_records

PAD = TOKEN_IDS["<|endoftext|>"]
IMAGE_TOKEN = TOKEN_IDS["<|image_pad|>"]
Batch = dict[str, Any]


@pytest.fixture
def dataset(tmp_path: Path) -> NavigationDataset:
    """Samples of two frames, of none, and of one; the first is the longest but one."""
    names = write_frames(tmp_path, 3)
    write_records(
        tmp_path,
        [
            {"images": names[:2], "conversations": talk("<image>then<image>where?", "TURN_LEFT")},
            {
                "conversations": talk(
                    "A longer question that shows nothing at all, so that it is text.", "Nothing."
                )
            },
            {"image": names[2], "conversations": talk("<image>", "Stop")},
        ],
    )
    return make_dataset(tmp_path, action_head=True, action_weight=3.0)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Qwen2_5_VLForConditionalGeneration:
    found = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_qwen(), attn_implementation=request.param)
    return found.eval()


NAMES = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw", "labels")


def run(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Any:
    if "feature_requests" in batch:
        pixels = QwenPixels(str(tiny_qwen()))
        shown = [pixels.values(request.frames) for request in batch["feature_requests"]]
        grids = torch.tensor(batch["image_grid_thw"])
        batch = {**batch, "pixel_values": torch.cat(shown), "image_grid_thw": grids}
    with torch.no_grad():
        return model(**{name: batch[name] for name in NAMES if name in batch}, use_cache=False)


# ---------------------------------------------------------------- fields


def test_padding_is_on_the_right_masked_and_never_learned(dataset: NavigationDataset) -> None:
    items = [dataset[at] for at in range(3)]
    batch = PaddedCollator(PAD)(items)
    longest = max(len(item["input_ids"]) for item in items)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        for name, filling in (("input_ids", PAD), ("labels", -100), ("loss_weights", 0.0)):
            assert torch.equal(batch[name][row, :length], item[name])
            assert (batch[name][row, length:] == filling).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert torch.equal(batch["position_ids"][:, row, :length], item["position_ids"])
        assert (batch["position_ids"][:, row, length:] == 1).all()
    assert batch["position_ids"].shape == (3, 3, longest)
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        assert batch[name].dtype == torch.int64


def test_the_mask_follows_from_lengths_and_not_from_ids(dataset: NavigationDataset) -> None:
    item = dataset[0]
    item["input_ids"][3] = PAD
    assert (PaddedCollator(PAD)([item])["attention_mask"] == 1).all()


def test_packed_samples_stand_end_to_end_and_count_from_zero(dataset: NavigationDataset) -> None:
    items = [dataset[at] for at in range(3)]
    batch = PackedCollator()(items)
    lengths = [len(item["input_ids"]) for item in items]
    for name in ("input_ids", "labels", "loss_weights"):
        assert torch.equal(batch[name], torch.cat([item[name] for item in items])[None])
    assert "attention_mask" not in batch
    assert batch["position_ids"].shape == (4, 1, sum(lengths))
    assert batch["position_ids"][0, 0].tolist() == [at for length in lengths for at in range(length)]
    assert torch.equal(
        batch["position_ids"][1:, 0], torch.cat([item["position_ids"] for item in items], dim=1)
    )


@pytest.mark.parametrize("collate", [PaddedCollator(PAD), PackedCollator()], ids=["padded", "packed"])
def test_images_and_requests_stand_in_the_order_of_the_samples_that_have_any(
    dataset: NavigationDataset, collate: Any
) -> None:
    batch = collate([dataset[at] for at in range(3)])
    ids = batch["input_ids"].flatten()
    assert [ids[place].tolist() for place in batch["image_positions"]] == [
        [IMAGE_TOKEN] * 4,
        [IMAGE_TOKEN] * 2,
    ]
    assert torch.equal(torch.cat(batch["image_positions"]), (ids == IMAGE_TOKEN).nonzero()[:, 0])
    assert [request.index for request in batch["feature_requests"]] == [0, 2]
    assert batch["image_grid_thw"] == [[1, 2, 4]] * 3


@pytest.mark.parametrize("collate", [PaddedCollator(PAD), PackedCollator()], ids=["padded", "packed"])
def test_a_batch_of_texts_has_no_image_fields(dataset: NavigationDataset, collate: Any) -> None:
    batch = collate([dataset[1], dataset[1]])
    assert not {"image_grid_thw", "image_positions", "feature_requests"} & set(batch)


@pytest.mark.parametrize("collate", [PaddedCollator(PAD), PackedCollator()], ids=["padded", "packed"])
def test_actions_are_predicted_from_the_last_token_of_each_prompt(
    dataset: NavigationDataset, collate: Any
) -> None:
    batch = collate([dataset[at] for at in (1, 0, 2)])
    assert batch["action_labels"].tolist() == [-100, 2, 0]
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    answers = [text_of(ids[at + 1 : at + 5]) for at in batch["action_positions"].tolist()]
    assert answers == ["Noth", "TURN", "Stop"]
    assert (labels[batch["action_positions"]] == -100).all()


def test_fields_that_nobody_asked_for_are_absent(tmp_path: Path) -> None:
    write_records(tmp_path, [{"conversations": talk("x", "y")}])
    items = [make_dataset(tmp_path)[0]] * 2
    assert set(PaddedCollator(PAD)(items)) == {"input_ids", "labels", "attention_mask", "position_ids"}
    assert set(PackedCollator()(items)) == {"input_ids", "labels", "position_ids"}


# ---------------------------------------------------------------- through the model


def test_positions_are_those_that_the_model_makes_itself(
    dataset: NavigationDataset, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    batch = PaddedCollator(PAD)([dataset[0]])
    is_image = (batch["input_ids"] == model.config.image_token_id).int()
    expected, _ = model.model.get_rope_index(
        batch["input_ids"],
        is_image,
        torch.tensor(batch["image_grid_thw"]),
        attention_mask=batch["attention_mask"],
    )
    assert torch.equal(batch["position_ids"], expected)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("order", [(0, 2), (2, 1, 0), (0, 0)])
def test_together_each_sample_has_the_logits_and_the_loss_that_it_has_alone(
    dataset: NavigationDataset, model: Qwen2_5_VLForConditionalGeneration, kind: str, order: tuple[int, ...]
) -> None:
    items = [dataset[at] for at in order]
    alone = [run(model, PaddedCollator(PAD)([item])) for item in items]
    together = run(model, (PaddedCollator(PAD) if kind == "padded" else PackedCollator())(items))
    lengths = [len(item["input_ids"]) for item in items]
    rows = list(together.logits) if kind == "padded" else list(together.logits[0].split(lengths))
    for row, single, length in zip(rows, alone, lengths, strict=True):
        torch.testing.assert_close(row[:length], single.logits[0], rtol=1e-5, atol=1e-5)
    counts = torch.tensor([int((item["labels"] != -100).sum()) for item in items])
    losses = torch.stack([single.loss for single in alone])
    torch.testing.assert_close(together.loss, (losses * counts).sum() / counts.sum(), rtol=1e-5, atol=1e-5)


def test_without_the_row_of_text_positions_packed_samples_would_see_each_other(
    dataset: NavigationDataset, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    batch = PackedCollator()([dataset[0], dataset[2]])
    apart = run(model, batch).logits
    mixed = run(model, {**batch, "position_ids": batch["position_ids"][1:]}).logits
    assert (apart - mixed)[0, -1].abs().max() > 1e-3
