"""Under DeepSpeed's ZeRO-3, with the weights spread over two processes."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from janusvln.demo.tiny_qwen import write_tiny_qwen
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from model_kit import feature, images, load, prompt, rows

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys, torch, deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, and only saves time
torch.set_num_threads(1)
from transformers.integrations import HfDeepSpeedConfig
from model_kit import JanusVLN, images, feature, prompt, rows
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1e9,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
source, target = sys.argv[1:]
deepspeed.init_distributed("gloo")
alive = HfDeepSpeedConfig(settings)
model = JanusVLN.from_pretrained(source, action_head=True)
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings
)
rank = torch.distributed.get_rank()
for step in range(3):
    # In the second step, process 1 has text alone; in the third, nobody has an action.
    if rank == 1 and step == 1:
        batch = rows(prompt())
    else:
        batch = {**rows(prompt((4, 6), (4, 6))), **images((4, 6), (4, 6)), "spatial_features": [feature((5, 6))]}
    action = -100 if step == 2 else rank
    loss = engine(
        **batch, labels=batch["input_ids"], action_labels=torch.tensor([action]), action_positions=torch.tensor([4])
    ).loss
    engine.backward(loss)
    engine.step()
    print("LOSS", step, loss.item(), flush=True)
engine.eval()
with torch.no_grad():
    text = rows(prompt())
    if rank == 1:
        batch = text
    print("LOSS eval", engine(**batch, labels=batch["input_ids"]).loss.item(), flush=True)
weights = engine._zero3_consolidated_16bit_state_dict()
if rank == 0:
    model.save_pretrained(target, state_dict=weights)
torch.distributed.barrier()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_two(source: Path, target: Path, scratch: Path) -> list[list[float]]:
    """The program in two processes; the losses of each."""
    port = free_port()
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }
        arguments = [sys.executable, "-c", PROGRAM, str(source), str(target)]
        with open(scratch / f"{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        for process in processes:
            process.wait(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(scratch / f"{rank}.log").read_text() for rank in range(2)]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)[-3000:]
    return [[float(line.split()[-1]) for line in log.splitlines() if line.startswith("LOSS")] for log in logs]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_ranks_with_different_batches_agree_and_what_they_save_loads_as_trained_in_one_process(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    load(write_tiny_qwen(tmp_path / "plain"), action_head=True).save_pretrained(source)
    together = run_two(source, target, tmp_path)

    model = JanusVLN.from_pretrained(source).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    view = {
        **rows(prompt((4, 6), (4, 6))),
        **images((4, 6), (4, 6)),
        "spatial_features": [feature((5, 6))],
    }
    for step in range(3):
        losses = []
        for rank in range(2):
            batch = rows(prompt()) if rank == 1 and step == 1 else view
            action = {"action_labels": torch.tensor([-100 if step == 2 else rank])}
            losses.append(
                model(**batch, labels=batch["input_ids"], **action, action_positions=torch.tensor([4])).loss
            )
        assert [losses[0].item(), losses[1].item()] == pytest.approx(
            [together[0][step], together[1][step]], rel=1e-4
        )
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    assert set(load_file(target / "model.safetensors")) == set(load_file(source / "model.safetensors"))
    again = JanusVLN.from_pretrained(target)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=1e-3, atol=1e-4, msg=name)
