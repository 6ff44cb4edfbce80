"""A run that is told to stop keeps its work, and goes on as if it had not been stopped."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from janusvln.train.command import main
from janusvln.train.stop import StopCallback
from train_kit import Kit, largest_difference, logged
from train_stop_kit import CODES, ROOT, Command

STEPS = 20
PLAIN = ["--per_device_train_batch_size", 2, "--max_steps", STEPS, "--dataloader_num_workers", 2]
ZERO_3 = ["--per_device_train_batch_size", 1, "--deepspeed", ROOT / "scripts" / "zero3.json"]


@pytest.fixture(scope="module")
def whole(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    command = Command(kit, tmp_path_factory.mktemp("whole"), PLAIN)
    command.finish()
    return logged(command.output_dir)


def checkpoints(command: Command) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in command.output_dir.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.promise("Stopping keeps the work")
def test_a_stopped_run_has_the_losses_and_samples_of_one_that_was_not(
    kit: Kit, tmp_path: Path, whole: list[dict[str, float]]
) -> None:
    """All processes of it get the signal, its DataLoader's workers too. No checkpoint is due: --save_strategy is no."""
    command = Command(kit, tmp_path, PLAIN)
    for number, steps in ((signal.SIGTERM, 2), (signal.SIGUSR1, 3), (signal.SIGINT, 1)):
        before = max(checkpoints(command), default=0)
        run = command.start()
        assert run.wait_for_steps(steps), run.said()[-3000:]
        run.send(number)
        assert run.end() == CODES[number], run.said()[-3000:]
        said = run.said()
        (step,) = re.findall(rf"Stopped by {number.name} after step (\d+)", said)
        assert int(step) == max(checkpoints(command)) >= before + steps
        assert "[SUCCESS]" not in said
        assert "Traceback" not in said
    assert f"Resuming from {command.output_dir}/checkpoint-{max(checkpoints(command))}" in command.finish()
    assert largest_difference(whole, logged(command.output_dir)) == 0.0
    samples = command.samples()
    assert sorted(at for step in range(1, 17) for at in samples[step]) == list(range(32))


@pytest.mark.promise("Stopping keeps the work")
def test_all_ranks_stop_at_one_step_where_one_alone_is_told(kit: Kit, tmp_path: Path) -> None:
    command = Command(kit, tmp_path, [*ZERO_3, "--max_steps", 500, "--save_only_model", "True"], processes=2)
    run = command.start()
    assert run.wait_for_steps(3), run.said()[-3000:]
    run.send(signal.SIGTERM, rank=1)
    assert run.end() != 0
    said = run.said()
    (step,) = re.findall(r"Stopped by SIGTERM after step (\d+)", said)
    assert checkpoints(command) == [int(step)]
    assert set(re.findall(r"exitcode *: *(-?\d+)", said)) == {"143"}
    # Whole, though other checkpoints of this run hold the model alone: it can go on.
    found = {path.name for path in command.output_dir.glob("checkpoint-*/**/*")}
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", "latest"} <= found
    assert len([name for name in found if name.endswith("optim_states.pt")]) == 2
    noted = {tuple(json.loads(line)[:2]) for line in (tmp_path / "notes").read_text().splitlines()}
    assert {rank for at, rank in noted if at == int(step)} == {0, 1}
    assert max(at for at, _ in noted) == int(step)


def test_a_second_ctrl_c_ends_a_run_that_hangs_at_once(kit: Kit, tmp_path: Path) -> None:
    run = Command(kit, tmp_path, [*PLAIN, "--max_steps", 100_000]).start()
    assert run.wait_for_steps(1), run.said()[-3000:]
    # Without its workers, which are all stopped, no step of it can end.
    for worker in run.ranks()[0].children():
        worker.send_signal(signal.SIGSTOP)
    time.sleep(1)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait_for("[INFO] SIGINT: what is trained is saved"), run.said()[-3000:]
    time.sleep(0.6)
    os.kill(run.process.pid, signal.SIGINT)
    try:
        assert run.process.wait(timeout=60) == 130, run.said()[-3000:]
    finally:
        os.killpg(run.process.pid, signal.SIGKILL)
    assert "[INFO] SIGINT again: ended without a checkpoint" in run.said()


@pytest.mark.slow
@pytest.mark.promise("Never a hang")
def test_a_rank_that_is_told_to_stop_does_not_wait_for_one_that_is_gone(kit: Kit, tmp_path: Path) -> None:
    """torchrun tells the others with SIGTERM. With nccl they wait in a collective; gloo notices a dead process."""
    run = Command(kit, tmp_path, [*ZERO_3, "--max_steps", 500], processes=2).start()
    assert run.wait_for_steps(1), run.said()[-3000:]
    gone = run.ranks()[1]
    gone.suspend()
    run.send(signal.SIGTERM, rank=0)
    assert run.wait_for("[INFO] another process of this run does not answer"), run.said()[-3000:]
    gone.kill()
    assert run.end() != 0
    assert "Stopped by" not in run.said()


def test_before_the_first_step_a_signal_ends_the_run(kit: Kit, tmp_path: Path) -> None:
    command = Command(kit, tmp_path, PLAIN)
    run = command.start()
    assert run.wait_for("[INFO] VGGT feature cache enabled"), run.said()[-3000:]
    run.send(signal.SIGTERM)
    assert run.end() == 143
    assert "Traceback" not in run.said()


# ---------------------------------------------------------------- no finite number


@pytest.mark.parametrize(
    ("processes", "more"),
    [(1, PLAIN), pytest.param(2, [*ZERO_3, "--max_steps", STEPS], marks=pytest.mark.slow)],
)
def test_what_is_not_a_number_stops_all_ranks_and_leaves_the_checkpoint_before_it(
    kit: Kit, tmp_path: Path, processes: int, more: list[object]
) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 1]
    command = Command(kit, tmp_path, [*more, *saving], processes=processes)
    run = command.start(NAN_AT=f"4:{processes - 1}")
    assert run.end() == 1
    errors = [line for line in run.said().splitlines() if line.startswith("[ERROR] ")]
    assert len(errors) == processes
    assert len({line.split("the loss is")[1] for line in errors}) == 1
    assert "in step 4, which is no finite number" in errors[0]
    assert f"from the weights of {command.output_dir}/checkpoint-3" in errors[0]
    assert "[SUCCESS]" not in run.said()
    assert checkpoints(command) == [3]
    assert not (command.output_dir / "model.safetensors").exists()
    assert "Resuming from" in command.finish()


def test_weights_that_are_not_finite_are_not_saved_over_those_that_were(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update may be what spoils them: no gradient tells of it any more."""
    monkeypatch.delenv("VGGT_CACHE_DIR", raising=False)

    def spoil(self: StopCallback, args: Any, state: Any, control: Any, **found: Any) -> None:
        if state.global_step == 2:
            next(found["model"].parameters()).data[0] = math.inf

    monkeypatch.setattr(StopCallback, "on_step_end", spoil)
    saving = ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 1]
    assert main(kit.flags(tmp_path, *saving, "--max_steps", 2)) == 1
    assert "1 weights of the model (" in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# ---------------------------------------------------------------- the same run


def test_a_data_set_that_has_changed_is_not_gone_on_with(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many samples as before, of the same lengths, in another order: most would come twice or never."""
    monkeypatch.delenv("VGGT_CACHE_DIR", raising=False)
    data = shutil.copytree(kit.data, tmp_path / "data")
    saving = ["--save_strategy", "steps", "--save_steps", 2, "--train_data_root"]
    assert main(kit.flags(tmp_path / "out", *saving, data, "--max_steps", 2)) == 0
    moved = data.rename(tmp_path / "moved")  # where it lies does not count
    assert main(kit.flags(tmp_path / "out", *saving, moved, "--max_steps", 3)) == 0
    lines = (moved / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines[0]) == len(lines[16])  # the first steps of both episodes
    lines[0], lines[16] = lines[16], lines[0]
    (moved / "train.jsonl").write_bytes(b"".join(lines))
    capfd.readouterr()
    assert main(kit.flags(tmp_path / "out", *saving, moved, "--max_steps", 4)) == 2
    assert "annotations of digest" in capfd.readouterr().err
