"""What a training step with features from the cache is made of.

    copies      the batch to the device             forward     from features to the loss
    features    waiting for what was read ahead     backward, optimizer

And of the forward: transformers' `visual tower`, `token embeddings`, `language model` and `head`; `ours`, which is the
merger, the sum and the checks around them; `other`, which is the loss and the model's own Python. The backward cannot
be split so: autograd does not tell whose it is. Shares are of the step's time, the mean of some steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from profile_parts import around_module, operation_shares, part, part_seconds
from stepper import Stepper

STEPS = 4
PHASES = ("copies", "features", "forward", "backward", "optimizer")
THEIRS = ("visual tower", "token embeddings", "language model", "head")
EMBED = "embed"
"""All of `_embed`: ours, and around it the visual tower and the token embeddings."""


def profile_cached_step(bench: Stepper) -> dict[str, Any]:
    seconds = _part_seconds(bench)
    step_s = sum(seconds[phase] for phase in PHASES)
    ours_s = seconds[EMBED] - seconds["visual tower"] - seconds["token embeddings"]
    forward = {name: seconds[name] for name in THEIRS} | {"ours": ours_s}
    forward["other"] = seconds["forward"] - sum(forward.values())
    return {
        "step_s": step_s / STEPS,
        "shares": {phase: seconds[phase] / step_s for phase in PHASES},
        "shares_of_the_forward": {name: one_s / step_s for name, one_s in forward.items()},
        "merger_share": seconds["merger"] / step_s,
        "operations": operation_shares(_steps(bench), bench.device, STEPS),
    }


def _part_seconds(bench: Stepper) -> dict[str, float]:
    step = _steps(bench)
    step()  # the first one is slower
    undo = _mark_parts(bench)
    try:
        return part_seconds(lambda: [step() for _ in range(STEPS)], bench.device)
    finally:
        for one in undo:
            one()


def _steps(bench: Stepper) -> Callable[[], None]:
    """A step with each call, its features announced in the call before."""
    number = 0
    bench.source.forget()
    bench.source.expect(bench.batches[0]["feature_requests"])

    def step() -> None:
        nonlocal number
        batch, number = bench.batches[number], (number + 1) % len(bench.batches)
        bench.source.expect(bench.batches[number]["feature_requests"])
        with part("copies", bench.device):
            tensors = bench.on_device(batch)
        with part("features", bench.device):
            features = bench.features("cached", batch)
        with part("forward", bench.device):
            loss = bench.model(**tensors, spatial_features=features).loss
        with part("backward", bench.device):
            loss.backward()
        with part("optimizer", bench.device):
            bench.optimizer.step()
            bench.optimizer.zero_grad()
        bench.source.step_done()

    return step


def _mark_parts(bench: Stepper) -> list[Callable[[], None]]:
    """Names the parts of the model's forward. Returns what takes the marks away."""
    model, device = bench.model, bench.device
    embed = model._embed

    def marked(*args: Any, **kwargs: Any) -> Any:
        with part(EMBED, device):
            return embed(*args, **kwargs)

    model._embed = marked
    modules = {
        "visual tower": model.model.visual,
        "token embeddings": model.get_input_embeddings(),
        "language model": model.model.language_model,
        "head": model.lm_head,
        "merger": model.merger,
    }
    return [
        lambda: delattr(model, "_embed"),
        *(around_module(module, name, device) for name, module in modules.items()),
    ]
