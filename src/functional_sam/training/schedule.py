"""Learning rate as in Nanodo: linear warm-up from a fraction of the peak, cosine decay to a fraction of it."""

import math

from functional_sam.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step (0-based) of a run of `steps` steps."""
    start, end, warmup = optimizer.lr * optimizer.lr_start, optimizer.lr * optimizer.lr_end, optimizer.warmup_steps
    if step < warmup:
        return start + (optimizer.lr - start) * step / warmup
    fraction = (step - warmup) / max(1, steps - warmup)
    return end + (optimizer.lr - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction)))
