"""Compare in pairs: means over seeds, 95 % intervals, Holm's correction within a family, and the test that says "no difference"."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import scipy  # .stats is imported where it is first used: it takes a second, which most commands can do without

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its standard error (sample standard deviation / sqrt(n); nan for n < 2).

    df: degrees of freedom of the standard error, n - 1 unless given.
    """

    mean: float
    stderr: float
    n: int
    df: float | None = None

    @property
    def size(self) -> float:
        """The number of seeds that would give these degrees of freedom: n, unless df is given."""
        return self.n if self.df is None else self.df + 1

    @property
    def testable(self) -> bool:
        """Whether a t test says anything: two seeds at least, all finite, and a spread.

        A spread of zero is no evidence: it is that of a count which a few seeds share, or of a metric that saw nothing.
        """
        return self.n > 1 and math.isfinite(self.mean) and math.isfinite(self.stderr) and self.stderr != 0.0

    @property
    def half_width(self) -> float:
        """Half of the two-sided 95 % t interval: 4.3 standard errors for n = 3, 2.4 for n = 8; inf for n < 2."""
        return float(_t(0.5 + LEVEL / 2, self.size) * self.stderr) if self.n > 1 else math.inf

    @property
    def p(self) -> float:
        """Two-sided p of "the mean is zero", Student's t; 1 where it is not testable."""
        if not self.testable:
            return 1.0
        return float(2 * scipy.stats.t.sf(abs(self.mean) / self.stderr, self.size - 1))

    @property
    def detectable(self) -> float:
        """The effect that a 5 % test on as many seeds of this spread finds with probability POWER; inf for n < 2.

        By the noncentral t: the sum of two quantiles of the central one is 5 % too small for n = 3, 1 % for n = 5.
        """
        return _noncentral(0.5 + LEVEL / 2, POWER, self.size) * self.stderr if self.n > 1 else math.inf


class Verdict(StrEnum):
    """What a paired comparison says."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "no difference"  # smaller than the margin, by two one-sided tests
    OPEN = "inconclusive"
    LOST = "worse (diverged)"
    WON = "better (the other diverged)"
    NONE = ""  # nothing to compare with

    @property
    def sign(self) -> int:
        """1 where the method is better, -1 where it is worse, else 0."""
        return {Verdict.BETTER: 1, Verdict.WON: 1, Verdict.WORSE: -1, Verdict.LOST: -1}.get(self, 0)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error over independent seeds. A diverged run counts as inf, and makes the mean inf."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    if n < 2 or not np.isfinite(array).all():
        return Estimate(float(array.mean()) if n else math.nan, math.nan, n)
    equal = np.ptp(array) <= 1e-12 * np.abs(array).max()  # but for rounding, as differences of counts are
    return Estimate(float(array.mean()), 0.0 if equal else float(array.std(ddof=1) / math.sqrt(n)), n)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Estimate the mean of values - baseline, seed by seed (one seed draws the same for both); two that diverged are equal.

    Where each diverged at a seed of its own there is a difference and it has no mean: nan, with a standard error of inf.
    """
    differences = [0.0 if a == b else a - b for a, b in zip(values, baseline, strict=True)]
    if {math.inf, -math.inf} <= set(differences):
        return Estimate(math.nan, math.inf, len(differences))
    return estimate(differences)


def unpaired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Estimate mean(values) - mean(others) of two independent samples; standard error and degrees of freedom by Welch."""
    a, b = estimate(values), estimate(others)
    if not (math.isfinite(a.stderr) and math.isfinite(b.stderr)):
        return Estimate(a.mean - b.mean, math.nan, min(a.n, b.n))
    squares = a.stderr**2, b.stderr**2
    parts = squares[0] ** 2 / (a.n - 1) + squares[1] ** 2 / (b.n - 1)
    return Estimate(
        a.mean - b.mean, math.sqrt(sum(squares)), min(a.n, b.n), sum(squares) ** 2 / parts if parts else a.n + b.n - 2.0
    )


def ratio(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """mean(values) / mean(others), paired, and its 95 % interval by Fieller: all r for which values - r others may have mean zero.

    The interval is nan where the mean of others may be zero (it then has no end), or n < 2, or a value is infinite.
    """
    a, b = np.asarray(values, dtype=float), np.asarray(others, dtype=float)
    n = len(a)
    if n < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()) or not b.mean():
        return math.nan, math.nan, math.nan
    t = _t(0.5 + LEVEL / 2, n)
    (aa, ab), (_, bb) = np.cov(a, b) * t**2 / n
    # (mean a - r mean b)^2 <= t^2 var(a - r b) / n, a quadratic in r
    second, first, zeroth = b.mean() ** 2 - bb, a.mean() * b.mean() - ab, a.mean() ** 2 - aa
    found = float(a.mean() / b.mean())
    if second <= 0:
        return found, math.nan, math.nan
    root = math.sqrt(max(0.0, first**2 - second * zeroth))
    return found, float((first - root) / second), float((first + root) / second)


def equivalent(difference: Estimate, margin: float) -> bool:
    """Whether |difference| < margin by two one-sided t tests of 5 %: the 90 % interval lies within the margin."""
    if not difference.testable:
        return False
    return abs(difference.mean) + float(_t(LEVEL, difference.size)) * difference.stderr < margin


def holm(ps: Sequence[float], more: int = 0) -> list[float]:
    """p values adjusted for their number (Holm 1979): the chance of one false claim in the family stays below 5 %.

    more: members of the family that are still to come, each as if its p were 1: what is below 5 % then stays so whatever they are.
    """
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) + more - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def significant(p: float) -> bool:
    """Whether a p value, adjusted for its family, is below 5 %."""
    return p < 1.0 - LEVEL


def verdict(difference: Estimate, *, lower_is_better: bool = True, margin: float = 0.0, p: float | None = None) -> Verdict:
    """Better or worse where p is below 5 %, else "no difference" where equivalent within the margin, else inconclusive.

    p: adjusted by the caller for its family; None: that of the difference alone. Divergence is worse: a loss that is infinite.
    """
    if math.isinf(difference.mean):
        return Verdict.LOST if (difference.mean > 0) == lower_is_better else Verdict.WON
    if significant(difference.p if p is None else p):
        return Verdict.BETTER if (difference.mean < 0) == lower_is_better else Verdict.WORSE
    return Verdict.SAME if margin and equivalent(difference, margin) else Verdict.OPEN


def adjusted(differences: Sequence[Estimate], more: int = 0) -> list[float]:
    """p of each comparison of a family, by Holm among its members.

    Divergences and single seeds are no members, and have p = 1. Where both diverged, at different seeds, nothing is told: a member
    with p = 1.
    """
    members = [i for i, one in enumerate(differences) if one.n > 1 and not math.isinf(one.mean)]
    found = dict(zip(members, holm([differences[i].p for i in members], more), strict=True))
    return [found.get(i, 1.0) for i in range(len(differences))]


def judged(differences: Sequence[Estimate], *, lower_is_better: bool = True, margin: float = 0.0, more: int = 0) -> list[Verdict]:
    """Judge a family of comparisons, with Holm's correction within it; more: those still to come, counted as null."""
    ps = adjusted(differences, more)
    return [verdict(one, lower_is_better=lower_is_better, margin=margin, p=p) for one, p in zip(differences, ps, strict=True)]


def family(differences: Sequence[Estimate], margin: float) -> dict[str, list[Any]]:
    """Columns of a table, a row a comparison: n, difference, standard error, half width, p by Holm, verdict within the family."""
    return {
        "n": [one.n for one in differences],
        "difference": [one.mean for one in differences],
        "stderr": [one.stderr for one in differences],
        "half_width": [one.half_width for one in differences],
        "p_holm": adjusted(differences),
        "verdict": list(map(str, judged(differences, margin=margin))),
    }


@functools.lru_cache(maxsize=64)
def _noncentral(probability: float, power: float, n: float) -> float:
    """Shift of Student's t, n - 1 degrees of freedom, that passes the quantile `probability` of the unshifted with chance power."""
    passed = _t(probability, n)
    return float(scipy.optimize.brentq(lambda shift: scipy.stats.nct.sf(passed, n - 1, shift) - power, 0.0, 100.0 * passed))


def _t(probability: float, n: float) -> float:
    """Quantile of Student's t with n - 1 degrees of freedom."""
    return float(scipy.stats.t.ppf(probability, n - 1))
