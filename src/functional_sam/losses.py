"""Losses that say how many targets they summed over: loss_fn(logits, targets) -> (sum over valid targets, number of them)."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over the targets that are not IGNORE, and their number.

    logits [..., V], targets [...] of class indices. The softmax runs in float32 at least.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, (targets != IGNORE).sum()
