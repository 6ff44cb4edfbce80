"""The spatial merger: VGGT's patch features to tokens of the language model's width.

Computes what JanusVLN's merger computes (arXiv:2509.22548): each patch is normed by its root mean square, four
neighbouring patches become one token, and two linear layers with a GELU bring it to the language model's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

MERGE_SIZE = 2
NORM_EPS = 1e-6


class SpatialMerger(nn.Module):
    """Parameters `ln_q.weight` [C], `mlp.0` (4C to hidden) and `mlp.2` (hidden to out), as JanusVLN names them."""

    def __init__(self, channels: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.ln_q = Qwen2_5_VLRMSNorm(channels, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(channels * MERGE_SIZE**2, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_size)
        )

    def forward(self, groups: Tensor) -> Tensor:
        """groups: [tokens, 4, C] in any float dtype, see `group_patches`. Returns [tokens, out] in the weights' dtype.

        The cast to the weights' dtype comes before the norm, as in the reference.
        """
        x = self.ln_q(groups.to(self.ln_q.weight.dtype))
        tokens: Tensor = self.mlp(x.flatten(1))
        return tokens


def even_grid(feature: Tensor) -> tuple[int, int]:
    """(h, w) of a feature [h, w, C] without the last row and column that have no partner."""
    h, w = feature.shape[:2]
    return h - h % MERGE_SIZE, w - w % MERGE_SIZE


def group_patches(feature: Tensor) -> Tensor:
    """[h, w, C] to [h//2 * w//2, 4, C]: 2x2 neighbours row-major, inside a group (0,0), (0,1), (1,0), (1,1)."""
    h, w = even_grid(feature)
    even = feature[:h, :w].reshape(h // MERGE_SIZE, MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE, -1)
    return even.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def merge(merger: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """Spatial tokens of each feature [h, w, C], as [h//2 * w//2, out].

    One call of the module whatever the number of features: where its weights are spread over processes (ZeRO-3),
    all of them have to make the same calls.
    """
    groups = [group_patches(feature) for feature in features]
    tokens: Tensor = merger(torch.cat(groups))
    return list(torch.split(tokens, [len(group) for group in groups]))
