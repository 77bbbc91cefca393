"""Losses that say how many targets they summed over: loss_fn(logits, targets) -> (sum over valid targets, number of them)."""

from collections.abc import Callable

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


def smoothed(smoothing: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """cross_entropy against (1 - smoothing) onehot + smoothing / V; cross_entropy itself, which has passes of its own, for 0."""
    if not smoothing:
        return cross_entropy

    def loss_fn(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        flat, wanted = logits.flatten(0, -2), targets.flatten()
        total = F.cross_entropy(flat, wanted, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
        return total, (targets != IGNORE).sum()

    return loss_fn
