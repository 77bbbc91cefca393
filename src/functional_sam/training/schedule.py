"""Learning rate: linear warm-up from a fraction of the peak, then a cosine to a fraction of it (Nanodo), a line, or the peak."""

import math
import warnings

from functional_sam.config import Config, OptimizerConfig


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


def warn_of_long_warmup(config: Config) -> None:
    """One warning where the run ends before the rate has reached its peak; nothing elsewhere."""
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.lr and optimizer.warmup_steps >= steps:
        last = learning_rate(optimizer, steps - 1, steps) / optimizer.lr
        warnings.warn(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is not below training.steps={steps}: "
            f"the learning rate ends at {last:.2g} of optimizer.lr",
            stacklevel=2,
        )
