"""The two losses that Qwen2.5-VL itself does not have: weighted tokens, and the action head's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NOT_LEARNED = -100
"""Label of tokens and samples that are not learned from."""


def weighted_token_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum(weight * cross entropy) / sum(weight) over the learned tokens, in float32; 0 where no weight is left.

    logits: [B, L, vocabulary]; labels: int64 [B, L], -100 where not learned; weights: [B, L], of the token itself (not
    of the place that predicts it). Labels and weights are shifted here.
    """
    targets = labels[:, 1:].flatten()
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=NOT_LEARNED, reduction="none"
    )
    counted = weights[:, 1:].flatten().float() * (targets != NOT_LEARNED)
    total = counted.sum()
    return (each * counted).sum() / total.where(total > 0, 1.0)


def action_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of action logits [samples, 4] in float32 over labels 0 to 3; -100 is left out.

    With no label left it is 0 and still hangs on the logits, so that every process has the same gradients to reduce.
    """
    kept = labels != NOT_LEARNED
    total = F.cross_entropy(logits.float(), labels, ignore_index=NOT_LEARNED, reduction="sum")
    return total / kept.sum().clamp(min=1)
