"""A model with VGGT's aggregator in it, trained by a plain loop; as a program, under ZeRO-3 in several processes.

python wrap_training.py live|cached|offloaded CACHE_DIR    prints a loss a step, then how often VGGT was called when
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import golden_recipe
from vggt_cache import CachedAggregator
from vggt_cache.encoder import EncoderConfig
from vggt_module import Aggregator, with_golden_weights

STEPS, LISTS = 30, 5
"""Six epochs: in the first one everything is missing, in all others everything is found."""


class Model(nn.Module):
    def __init__(self, aggregator: nn.Module, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.vggt = nn.Module()
        self.vggt.aggregator = aggregator
        self.head = nn.Sequential(nn.Linear(768, 32), nn.GELU(), nn.Linear(32, 3))
        self._checkpointed = checkpointed

    def forward(self, images: Tensor, wanted: Tensor) -> Tensor:
        run = (lambda: checkpoint(self._out, images, use_reentrant=False)) if self._checkpointed else None
        out = run() if run is not None else self._out(images)
        return nn.functional.mse_loss(out, wanted)

    def _out(self, images: Tensor) -> Tensor:
        outputs, start = self.vggt.aggregator(images)
        return self.head(outputs[-2][:, :, start:].mean((1, 2)))


def made(how: str, cache_dir: str, **named: Any) -> tuple[Model, Aggregator]:
    aggregator = with_golden_weights(EncoderConfig.from_dict(golden_recipe.SMALL_CONFIG))
    module: nn.Module = aggregator
    if how != "live":
        module = CachedAggregator(aggregator, cache_dir, offload=how == "offloaded")
    torch.manual_seed(0)
    return Model(module, **named), aggregator


def batch_of(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    seed = step % LISTS + LISTS * rank
    pixels = torch.stack([golden_recipe.image(seed, 28, 42, frame) for frame in range(2)])
    return pixels.permute(0, 3, 1, 2)[None].float() / 255, torch.tensor([[seed % 3, seed % 2, 1.0]])


def trained(how: str, cache_dir: str, **named: Any) -> tuple[list[float], list[int]]:
    """The losses of 30 steps, and how often VGGT was called by the end of each."""
    model, aggregator = made(how, cache_dir, **named)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
    losses, calls = [], []
    for step in range(STEPS):
        loss = model(*batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        calls.append(aggregator.calls)
    return losses, calls


def main(how: str, cache_dir: str) -> None:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # would be compiled first, and only saves time
    )
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    model, aggregator = made(how, cache_dir)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        loss = engine(*batch_of(step, rank))
        engine.backward(loss)
        engine.step()
        print("LOSS", step, loss.item(), flush=True)
        if how != "live" and step == LISTS - 1:
            model.vggt.aggregator.flush()
            print("CALLS", aggregator.calls, flush=True)
    print("CALLS", aggregator.calls, flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
