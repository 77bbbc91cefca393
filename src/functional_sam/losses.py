"""Losses that say how many targets they summed over: loss_fn(logits, targets) -> (sum over valid targets, number of them)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def num_valid(targets: Tensor) -> Tensor:
    """Targets that cross_entropy counts: class indices that are not IGNORE, or rows of probabilities."""
    if targets.is_floating_point():
        return torch.tensor(targets.numel() // max(targets.shape[-1], 1), device=targets.device)
    return (targets != IGNORE).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over the targets that are not IGNORE, and their number.

    logits [..., V], targets [...] of class indices, or [..., V] of probabilities (soft labels), of which every row counts. The
    softmax runs in float32 at least.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if targets.is_floating_point():
        soft = targets.flatten(0, -2).to(logits.dtype)
        return F.cross_entropy(logits.flatten(0, -2), soft, reduction="sum"), num_valid(targets)
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, num_valid(targets)


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
