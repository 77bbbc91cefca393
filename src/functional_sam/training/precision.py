"""Whether this machine multiplies bf16 natively: measured, since what a CPU says of itself does not tell."""

import functools
import time
import warnings

import torch

from functional_sam.config import Config

SIZE = 192  # of the square product that is timed: 14 MFLOP, a tenth of a second where bf16 is slowest
NATIVE = 1.5  # times as long as in float32, and it still counts as native


def warn_of_slow_bf16(config: Config) -> None:
    """One warning where a config asks for bf16 on a CPU that is much slower in it; nothing elsewhere."""
    if config.training.precision == "bf16" and config.runtime.device == "cpu" and (times := bf16_times()) > NATIVE:
        warnings.warn(
            f"a bf16 product takes {times:.0f} times as long as a float32 one on this CPU: training.precision=float32 avoids it",
            stacklevel=2,
        )


@functools.cache
def bf16_times() -> float:
    """Time of a bf16 product over that of a float32 one on this CPU."""
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return _seconds(x.bfloat16()) / _seconds(x)


def _seconds(x: torch.Tensor) -> float:
    """Of a product, the best of a few: the first one makes ready, and others may be at work."""
    best, began = float("inf"), time.perf_counter()
    for _ in range(20):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
        if start - began > 0.08:
            break
    return best
