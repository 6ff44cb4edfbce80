"""The loss of a step: the mean of its micro-batches' means, as published, or over all its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from janusvln.model.modeling_qwen2_5_vl import learned
from janusvln.train.command import main
from train_kit import Kit, largest_difference, logged
from train_processes_kit import train


def sizes(batch: int, accumulation: int) -> list[object]:
    return ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]


def test_over_the_step_batch_and_accumulation_are_the_same_training(kit: Kit, tmp_path: Path) -> None:
    """With the action head and unequal weights of lines, which are means over numbers of their own."""
    runs = {}
    for mean in ("step", "micro_batch"):
        for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
            out = tmp_path / f"{mean}{batch}"
            more = [*sizes(batch, accumulation), "--max_steps", 4, "--loss_mean_over", mean]
            assert main(kit.flags(out, *more, "--action_head", "True", "--action_weight", "0.5")) == 0
            runs[mean, batch] = logged(out)
    for batch in (2, 1):
        assert largest_difference(runs["step", 8], runs["step", batch]) < 1e-4
        assert largest_difference(runs["micro_batch", 8], runs["micro_batch", batch]) > 1e-2
    # In one micro-batch there is nothing to choose.
    assert largest_difference(runs["step", 8], runs["micro_batch", 8]) < 1e-5


@pytest.mark.slow
def test_over_the_step_two_ranks_under_zero_3_are_the_same_training(kit: Kit, tmp_path: Path) -> None:
    more = ["--max_steps", 3, "--loss_mean_over", "step"]
    assert main(kit.flags(tmp_path / "one", *more, *sizes(8, 1))) == 0
    two = train(kit, tmp_path / "two", *more, "--gradient_accumulation_steps", 4, config="zero3.json")
    assert largest_difference(logged(tmp_path / "one"), two) < 1e-4
    assert "mismatch" not in (tmp_path / "two" / "log").read_text()  # of accelerate's count and DeepSpeed's


def test_what_is_counted_is_what_the_losses_are_means_over() -> None:
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, -100]])  # the first one is predicted by nothing
    assert learned({"labels": labels}).tolist() == [3, 0]
    weights = torch.tensor([[1.0, 0.5, 1.0, 2.0], [1.0, 1.0, 0.0, 1.0]])
    counted = learned({"labels": labels, "loss_weights": weights, "action_labels": torch.tensor([3, -100])})
    assert counted.tolist() == [2.5, 1]


def test_another_mean_is_refused(kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(kit.flags(tmp_path, "--loss_mean_over", "epoch")) == 2
    assert "--loss_mean_over epoch is none of micro_batch, step" in capfd.readouterr().err


def test_a_run_does_not_go_on_with_another_mean(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", 1, "--max_steps"]
    assert main(kit.flags(tmp_path, *saving, 1)) == 0
    assert main(kit.flags(tmp_path, *saving, 2, "--loss_mean_over", "step")) == 2
    assert (
        "written by --loss_mean_over micro_batch, and this run has --loss_mean_over step"
        in capfd.readouterr().err
    )
