"""Learning rate: linear warm-up from a fraction of the peak, then a cosine to a fraction of it (Nanodo), a line, or the peak."""

import math

from functional_sam.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step (0-based) of a run of `steps` steps."""
    start, end, warmup = optimizer.lr * optimizer.lr_start, optimizer.lr * optimizer.lr_end, optimizer.warmup_steps
    if step < warmup:
        return start + (optimizer.lr - start) * step / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    fraction = min(1.0, (step - warmup) / max(1, steps - warmup))
    if optimizer.schedule == "linear":
        return end + (optimizer.lr - end) * (1.0 - fraction)
    return end + (optimizer.lr - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))
