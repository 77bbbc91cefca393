"""Mean, standard error, paired difference, and a verdict that can be 'inconclusive'."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its standard error (sample standard deviation / sqrt(n); nan for n < 2)."""

    mean: float
    stderr: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.stderr:.4f} (n={self.n})"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error over independent seeds. A diverged run counts as inf, and makes the mean inf."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    if n < 2 or not np.isfinite(array).all():
        return Estimate(float(array.mean()), math.nan, n)
    return Estimate(float(array.mean()), float(array.std(ddof=1) / math.sqrt(n)), n)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean and standard error of values - baseline, seed by seed (both ran with the same initialization and data order)."""
    return estimate([a - b for a, b in zip(values, baseline, strict=True)])


def half_width(difference: Estimate) -> float:
    """Of the two-sided 95 % t interval of a mean over n seeds: 4.3 standard errors for n = 3, 2.8 for n = 5; inf for n < 2."""
    if difference.n < 2:
        return math.inf
    return float(stats.t.ppf(0.5 + LEVEL / 2, difference.n - 1) * difference.stderr)


def verdict(difference: Estimate, lower_is_better: bool = True) -> str:
    """better, worse, or inconclusive: whether the two-sided 95 % t interval of a paired difference leaves out zero.

    Divergence is worse: a loss that is infinite.
    """
    if math.isinf(difference.mean):
        return "worse (diverged)" if difference.mean > 0 else "better (the other diverged)"
    if difference.n < 2:
        return "inconclusive (n=1)"
    if not abs(difference.mean) > half_width(difference):
        return "inconclusive"
    return "better" if (difference.mean < 0) == lower_is_better else "worse"
