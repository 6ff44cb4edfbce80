"""Losses, gradients, generation and precision of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import import_utils

from janusvln.demo.tiny_qwen import TOKEN_IDS, write_tiny_qwen
from janusvln.model import attention
from janusvln.model.fusion import SpatialFeatureError
from janusvln.model.modeling_qwen2_5_vl import KEPT, weighted_token_loss
from model_kit import feature, images, load, prompt, rows

SMALL, WIDE = (4, 6), (2, 8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(directory: Path) -> Any:
    return load(directory, action_head=True, distill_loss_weight=0.5, lam=0.7)


@pytest.fixture(scope="module")
def speaker(directory: Path) -> Any:
    """A model whose answer depends visibly on what it sees."""
    return load(directory, lam=5.0)


def learned(batch: dict[str, Tensor], tokens: int = 3) -> Tensor:
    labels = batch["input_ids"].clone()
    labels[:, :-tokens] = -100
    return labels


def two_samples() -> dict[str, Any]:
    batch = rows(prompt(SMALL, SMALL), prompt(WIDE)) | images(SMALL, SMALL, WIDE)
    return {**batch, "spatial_features": [feature((5, 6), 1), feature(WIDE, 2)], "labels": learned(batch)}


def gradients(model: Any) -> dict[str, Tensor | None]:
    return {name: weight.grad for name, weight in model.named_parameters()}


# ---------------------------------------------------------------- a batch without images


def test_a_batch_of_text_in_training_gives_every_parameter_a_gradient_and_changes_nothing(
    model: Any,
) -> None:
    batch = rows(prompt(), prompt(text=(7, 8, 9)))
    labels = learned(batch)
    quiet = model.eval()(**batch, labels=labels)
    loud = model.train()(**batch, labels=labels)
    assert torch.equal(loud.logits, quiet.logits)
    assert torch.equal(loud.loss, quiet.loss)
    loud.loss.backward()
    unused = ("merger.", "action_head.", "model.visual.")
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert (gradient.abs().max() == 0) == name.startswith(unused), name


def test_text_and_images_call_the_same_modules_in_the_same_order(model: Any) -> None:
    # Under ZeRO-3 each call gathers weights from all processes: another order on one of them would hang all.
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.train()
    orders = []
    text = rows(prompt(), prompt())
    for batch in (two_samples(), {**text, "labels": learned(text)}):
        calls.clear()
        model(**batch)
        orders.append(list(calls))
    assert orders[0] == orders[1]
    assert {"merger", "action_head", "model.visual", "lm_head"} <= set(orders[0])


def test_outside_training_text_runs_the_language_model_alone(model: Any) -> None:
    model.merger.register_forward_hook(lambda *_: pytest.fail("the merger ran for a batch of text"))
    model.eval()(**rows(prompt()))
    model.generate(**rows(prompt()), max_new_tokens=2, do_sample=False)


def test_features_are_only_read(model: Any) -> None:
    """A feature may be on its way to the disk at the same time, and belongs to a buffer that readers fill."""
    batch = two_samples()
    versions = [one._version for one in batch["spatial_features"]]
    model.train()(**batch).loss.backward()
    assert [one._version for one in batch["spatial_features"]] == versions


def test_a_batch_with_images_gives_every_parameter_a_gradient(model: Any) -> None:
    batch = {
        **two_samples(),
        "action_labels": torch.tensor([1, 3]),
        "action_positions": torch.tensor([5, 40]),
    }
    model.train()(**batch).loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


# ---------------------------------------------------------------- losses


def log_softmax(logits: Tensor) -> Tensor:
    return logits.double() - logits.double().exp().sum(-1, keepdim=True).log()


def test_without_weights_the_loss_is_the_mean_over_learned_tokens(directory: Path) -> None:
    model, batch = load(directory), two_samples()
    output = model(**batch)
    terms = [
        -log_softmax(output.logits[row, column - 1])[batch["labels"][row, column]]
        for row, column in (batch["labels"] != -100).nonzero().tolist()
    ]
    torch.testing.assert_close(output.loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-5)


def test_weights_count_each_learned_token_by_its_own_weight(directory: Path) -> None:
    model, batch = load(directory), two_samples()
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1)) * 3
    output = model(**batch, loss_weights=weights)
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        token = batch["labels"][row, column]
        total -= weights[row, column] * log_softmax(output.logits[row, column - 1])[token]
        weight += float(weights[row, column])
    torch.testing.assert_close(output.loss.double(), total / weight, rtol=1e-5, atol=1e-5)
    even = model(**batch, loss_weights=torch.full_like(weights, 2.0)).loss
    torch.testing.assert_close(even, model(**batch).loss)


def test_the_weighted_loss_of_nothing_is_zero_and_has_a_gradient() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    for labels, weight in ((torch.full((1, 4), -100), 1.0), (torch.zeros(1, 4, dtype=torch.long), 0.0)):
        loss = weighted_token_loss(logits, labels, torch.full((1, 4), weight))
        loss.backward()
        assert loss == 0
        assert logits.grad is not None
        assert (logits.grad == 0).all()


def test_the_action_head_reads_the_hidden_state_of_its_position(model: Any) -> None:
    batch = two_samples()
    length = batch["input_ids"].shape[1]
    row, column = 1, length - 4
    base = model(**batch, output_hidden_states=True)
    labels, positions = torch.tensor([-100, 2]), torch.tensor([3, row * length + column])
    output = model(**batch, action_labels=labels, action_positions=positions)
    logits = model.action_head(base.hidden_states[-1][row, column])
    torch.testing.assert_close(
        (output.loss - base.loss).double(), -0.5 * log_softmax(logits)[2], rtol=1e-4, atol=1e-5
    )
    both = model(**batch, action_labels=torch.tensor([0, 2]), action_positions=positions)
    other = model.action_head(base.hidden_states[-1][0, 3])
    expected = -0.5 * (log_softmax(logits)[2] + log_softmax(other)[0]) / 2
    torch.testing.assert_close((both.loss - base.loss).double(), expected, rtol=1e-4, atol=1e-5)


def test_samples_without_an_action_add_nothing_and_leave_the_head_a_gradient(model: Any) -> None:
    batch = two_samples()
    bare = model(**batch).loss
    none = model(
        **batch, action_labels=torch.tensor([-100, -100]), action_positions=torch.tensor([3, 4])
    ).loss
    assert torch.equal(bare, none)
    none.backward()
    assert (model.action_head.weight.grad == 0).all()


def test_the_language_model_runs_once_with_the_head(model: Any) -> None:
    calls = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    model(**two_samples(), action_labels=torch.tensor([1, 1]), action_positions=torch.tensor([3, 4]))
    assert len(calls) == 1


# ---------------------------------------------------------------- generation


def greedy(model: Any, steps: int, **batch: Any) -> Tensor:
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=mask, **batch).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def seeing(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def generate(model: Any, steps: int = 5, **batch: Any) -> Any:
    return model.generate(**batch, max_new_tokens=steps, do_sample=False, eos_token_id=None)


def test_generate_equals_repeated_forwards_of_the_whole_sequence(speaker: Any) -> None:
    batch = seeing(two_samples())
    ids = generate(speaker, **batch)
    assert torch.equal(ids, greedy(speaker, 5, **batch))
    output = generate(speaker, **batch, return_dict_in_generate=True, output_logits=True)
    mask = torch.cat([batch.pop("attention_mask"), torch.ones(2, 5, dtype=torch.long)], 1)
    whole = speaker(**{**batch, "input_ids": ids}, attention_mask=mask).logits
    # Closer than any answer needs: other positions of the tokens would change little else.
    torch.testing.assert_close(torch.stack(output.logits, 1), whole[:, -6:-1], rtol=1e-4, atol=1e-4)


def test_what_is_generated_depends_on_the_features(speaker: Any) -> None:
    batch = seeing(two_samples())
    other = {**batch, "spatial_features": [-values for values in batch["spatial_features"]]}
    answers, others = generate(speaker, **batch), generate(speaker, **other)
    assert (answers != others).any(1).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_answered_as_each_sample_alone(beams: int, speaker: Any) -> None:
    together = generate(speaker, num_beams=beams, **seeing(two_samples()))
    first = rows(prompt(SMALL, SMALL)) | images(SMALL, SMALL, WIDE)
    second = rows(prompt(WIDE)) | images(SMALL, SMALL, WIDE)
    cut = 2 * SMALL[0] * SMALL[1]
    first |= {"pixel_values": first["pixel_values"][:cut], "image_grid_thw": first["image_grid_thw"][:2]}
    second |= {"pixel_values": second["pixel_values"][cut:], "image_grid_thw": second["image_grid_thw"][2:]}
    features = two_samples()["spatial_features"]
    for row, (own, values) in enumerate(zip((first, second), features, strict=True)):
        alone = generate(speaker, num_beams=beams, **own, spatial_features=[values])
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_generate_takes_its_prompt_by_position_and_answers_text_alone(speaker: Any) -> None:
    batch = seeing(two_samples())
    by_name = generate(speaker, **batch)
    ids = batch.pop("input_ids")
    by_place = speaker.generate(ids, **batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(by_name, by_place)
    text = rows(prompt())
    assert torch.equal(generate(speaker, **text), greedy(speaker, 5, **text))


def test_generate_refuses_images_without_features_and_prompts_without_images(speaker: Any) -> None:
    batch = rows(prompt(SMALL))
    with pytest.raises(SpatialFeatureError, match="images without spatial_features"):
        generate(speaker, **batch, **images(SMALL))
    with pytest.raises(SpatialFeatureError, match="no image is given"):
        generate(speaker, **batch)


def test_generate_without_a_key_value_cache_still_sees_its_images(speaker: Any) -> None:
    batch = seeing(two_samples())
    assert torch.equal(generate(speaker, use_cache=False, **batch), generate(speaker, **batch))


# ---------------------------------------------------------------- memory and precision


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_gives_the_same_gradients(model: Any) -> None:
    batch = two_samples()
    model.train()(**batch).loss.backward()
    straight = {name: g.clone() for name, g in gradients(model).items() if g is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    assert model.model.language_model.layers[0].gradient_checkpointing
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, straight[name], msg=name)


def test_a_training_forward_keeps_no_key_value_cache(model: Any) -> None:
    batch = two_samples()
    assert model(**batch).get(KEPT) is None
    assert model(**seeing(batch)).get(KEPT) is not None


def test_bfloat16_runs_and_stays_close(directory: Path) -> None:
    batch = two_samples()
    exact = load(directory)(**batch)
    rounded = load(directory).bfloat16()
    output = rounded(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert abs(output.loss - exact.loss) < 0.1
    output.loss.backward()
    assert rounded.merger.mlp[0].weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = load(directory)(**batch).loss
    assert abs(mixed - exact.loss) < 0.1


@pytest.mark.parametrize(("installed", "expected"), [(True, "flash_attention_2"), (False, "sdpa")])
def test_flash_attention_is_taken_where_it_can_run(
    installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    assert attention.attention_implementation() == expected


def test_without_a_gpu_it_is_sdpa() -> None:
    if torch.cuda.is_available() and import_utils.is_flash_attn_2_available():
        pytest.skip("there is a GPU with flash_attn")
    assert attention.attention_implementation() == "sdpa"


def test_places_of_images_are_numbered_as_images(speaker: Any) -> None:
    batch = seeing(two_samples())
    kinds = (batch["input_ids"] == TOKEN_IDS["<|image_pad|>"]).int()
    assert torch.equal(speaker(**batch).logits, speaker(**batch, mm_token_type_ids=kinds).logits)
    flat = torch.arange(batch["input_ids"].shape[1]).expand(3, 2, -1)
    assert not torch.allclose(speaker(**batch).logits, speaker(**batch, position_ids=flat).logits)
