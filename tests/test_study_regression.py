"""Least squares with clustered standard errors."""

import numpy as np
import pytest
from scipy import stats

from functional_sam.study.regression import fit


def data(n=40, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=n)
    return x, 1.0 + 2.0 * x + random.normal(size=n) * (1 + abs(x))


def test_coefficients_and_r2_are_those_of_another_library():
    x, y = data()
    found, other = fit(list(y), np.stack([np.ones_like(x), x], 1), range(len(x))), stats.linregress(x, y)
    assert found.coefficients == pytest.approx([other.intercept, other.slope])
    assert found.r2 == pytest.approx(other.rvalue**2)
    assert (found.rows, found.clusters) == (40, 40)


def test_a_cluster_a_row_is_the_heteroskedastic_standard_error():
    """HC1 of a slope, written out."""
    x, y = data()
    found = fit(list(y), np.stack([np.ones_like(x), x], 1), range(len(x)))
    e, centred = y - found.coefficients[0] - found.coefficients[1] * x, x - x.mean()
    expected = np.sqrt(40 / 38 * (centred**2 @ e**2)) / (centred @ centred)
    assert found.stderr[1] == pytest.approx(expected)
    assert found.p(1) == pytest.approx(2 * stats.t.sf(found.coefficients[1] / expected, 39))


def test_measuring_a_run_ten_times_does_not_make_it_more_certain():
    x, y = data()
    X = np.stack([np.ones_like(x), x], 1)
    once, often = fit(list(y), X, range(40)), fit(list(np.tile(y, 10)), np.tile(X, (10, 1)), list(range(40)) * 10)
    assert often.coefficients == pytest.approx(once.coefficients)
    assert (often.rows, often.clusters) == (400, 40)
    assert often.p(1) == pytest.approx(2 * stats.t.sf(often.coefficients[1] / often.stderr[1], 39), rel=1e-6, abs=0.0)
    # But for the factor (n - 1) / (n - k), which counts rows.
    assert often.stderr == pytest.approx(once.stderr * np.sqrt(399 / 398 / (39 / 38)))


def test_a_column_that_follows_from_others_changes_nothing():
    x, y = data()
    X = np.stack([np.ones_like(x), np.sign(x), np.sign(x) ** 2, x], 1)  # the square of two values is constant
    found, plain = fit(list(y), X, range(40)), fit(list(y), X[:, [0, 1, 3]], range(40))
    assert found.r2 == pytest.approx(plain.r2)
    assert (found.coefficients[3], found.stderr[3]) == pytest.approx((plain.coefficients[2], plain.stderr[2]))
