"""What would undo a run from outside is one sentence: a forward that is not ours, a batch that cannot be sent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_outputs import CausalLMOutputWithPast

from janusvln.data.collate import PaddedCollator
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as Model
from janusvln.train.command import main
from janusvln.train.workers import _end
from train_kit import Kit, logged


@pytest.fixture(autouse=True)
def no_hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run that waits for ever fails."""
    monkeypatch.delenv("VGGT_CACHE_DIR", raising=False)

    def hangs(*_: object) -> None:
        raise TimeoutError("the run hangs")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(300)
    yield
    signal.alarm(0)


def refusal(capfd: pytest.CaptureFixture[str], flags: list[str]) -> str:
    assert main(flags) != 0
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[ERROR] ")]
    return sentence


# ---------------------------------------------------------------- the model


def test_a_forward_that_takes_no_features_ends_the_run_in_its_first_step(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, input_ids: Any = None, **_: object) -> CausalLMOutputWithPast:
        logits = self.lm_head(self.model.language_model.embed_tokens(input_ids)).float()
        return CausalLMOutputWithPast(loss=logits.mean(), logits=logits)

    monkeypatch.setattr(Model, "forward", forward)
    sentence = refusal(capfd, kit.flags(tmp_path / "out", "--max_steps", 2))
    assert "another forward than this project's model's is in use" in sentence
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_weights_that_are_quantised_are_refused(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(kit.qwen, tmp_path / "awq")
    fields = json.loads((model / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(fields))
    sentence = refusal(capfd, [*kit.flags(tmp_path / "out"), "--model_name_or_path", str(model)])
    assert "holds weights quantised by awq, which cannot be trained" in sentence


def test_an_attention_that_cannot_be_had_is_one_sentence(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sentence = refusal(capfd, kit.flags(tmp_path / "out", "--attn_implementation", "no_such"))
    assert "cannot be loaded with --attn_implementation no_such" in sentence


def test_the_log_gives_each_learning_rate_under_its_flag(kit: Kit, tmp_path: Path) -> None:
    more = [
        "--mm_projector_lr",
        2e-3,
        "--vision_tower_lr",
        3e-3,
        "--max_steps",
        2,
        "--lr_scheduler_type",
        "linear",
    ]
    assert main(kit.flags(tmp_path / "out", *more)) == 0
    first, second = logged(tmp_path / "out")
    assert first["learning_rate"] in (pytest.approx(1e-3), pytest.approx(5e-4))  # before or after the step
    for entry in (first, second):
        assert entry["mm_projector_lr"] == pytest.approx(2 * entry["learning_rate"])
        assert entry["vision_tower_lr"] == pytest.approx(3 * entry["learning_rate"])


# ---------------------------------------------------------------- batches on their way


class Unsendable:
    def __reduce__(self) -> Any:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )


def test_a_batch_that_cannot_be_sent_ends_the_run_in_one_sentence(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = PaddedCollator.__call__
    monkeypatch.setattr(PaddedCollator, "__call__", lambda *given: collate(*given) | {"more": Unsendable()})
    flags = kit.flags(tmp_path / "out", "--max_steps", 2, "--dataloader_num_workers", 1)
    assert main(flags) != 0
    err = capfd.readouterr().err
    assert "[WARN] a batch cannot be sent to the training process: unable to allocate shared memory" in err
    (sentence,) = [line for line in err.splitlines() if line.startswith("[ERROR] ")]
    assert "a process that reads samples has ended, out of shared memory" in sentence


def test_each_worker_is_shielded_and_ends_where_it_cannot_send_also_when_a_run_goes_on(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that goes on within an epoch is another one, made of the first."""
    seen = tmp_path / "seen"
    collate = PaddedCollator.__call__

    def noting(*given: Any) -> Any:
        ignored = {
            one.name for one in (signal.SIGINT, signal.SIGUSR1) if signal.getsignal(one) == signal.SIG_IGN
        }
        blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        threads = {thread.name for thread in threading.enumerate()}
        state = [
            os.getpid(),
            sorted(ignored),
            blocked,
            "shield" in threads,
            Queue._on_queue_feeder_error is _end,
        ]
        with open(seen, "a") as file:
            file.write(json.dumps(state) + "\n")
        return collate(*given)

    monkeypatch.setattr(PaddedCollator, "__call__", noting)
    saving = ["--dataloader_num_workers", 2, "--save_strategy", "steps", "--save_steps", 2, "--max_steps"]
    pids: set[int] = set()
    for steps in (2, 4):
        assert main(kit.flags(tmp_path / "out", *saving, steps)) == 0
        states = [json.loads(line) for line in seen.read_text().splitlines()]
        seen.unlink()
        assert {pid for pid, *_ in states}.isdisjoint({os.getpid(), *pids})
        pids |= {pid for pid, *_ in states}
        assert all(state == [["SIGINT", "SIGUSR1"], True, True, True] for _, *state in states)
    assert len(pids) == 4
    assert Queue._on_queue_feeder_error is not _end  # of this process


def test_too_little_shared_memory_is_told_before_the_run_begins(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = os.statvfs_result((4096, 4096, 16, 16, 16, 0, 0, 0, 0, 255))  # 64 KiB
    monkeypatch.setattr("janusvln.train.workers.os.statvfs", lambda path: small)
    sentence = refusal(capfd, kit.flags(tmp_path / "out", "--max_steps", 2, "--dataloader_num_workers", 8))
    assert "/dev/shm has 64.0 KiB free, and 1 x 8 workers that are 2 batches of" in sentence
    assert "--shm-size" in sentence
    assert main(kit.flags(tmp_path / "alone", "--max_steps", 1)) == 0  # without workers nothing is sent
