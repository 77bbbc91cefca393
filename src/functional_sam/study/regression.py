"""Least squares whose standard errors allow for rows that belong together: the many measurements of one run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy


@dataclass(frozen=True)
class Fit:
    """y = X b + e by least squares."""

    coefficients: np.ndarray
    stderr: np.ndarray  # clustered
    r2: float  # share of the variance of y that X explains
    clusters: int
    rows: int

    def p(self, column: int) -> float:
        """Two-sided p of "this coefficient is zero": partial F test, 1 and clusters - 1 degrees of freedom, or t."""
        return float(2 * scipy.stats.t.sf(abs(self.coefficients[column] / self.stderr[column]), self.clusters - 1))


def fit(y: Sequence[float], X: np.ndarray, clusters: Sequence[object]) -> Fit:
    """Least squares of y on the columns of X [rows, columns], one of which is constant, with standard errors clustered as CR1:

        cov b = c (X^T X)^-1 (sum_g X_g^T e_g e_g^T X_g) (X^T X)^-1,  c = G / (G - 1) (n - 1) / (n - k)

    G clusters of rows with residuals e_g, n rows, k the rank of X: a column that follows from others counts for
    nothing. Source: Cameron and Miller 2015, equations 10 to 12.
    """
    values = np.asarray(y, dtype=float)
    n = len(X)
    b, _, k, _ = np.linalg.lstsq(X, values, rcond=None)
    residuals = values - X @ b
    bread = np.linalg.pinv(X.T @ X)
    names = list(dict.fromkeys(clusters))
    of = np.array([names.index(one) for one in clusters])
    scores = np.stack([X[of == g].T @ residuals[of == g] for g in range(len(names))])
    factor = len(names) / (len(names) - 1) * (n - 1) / (n - k)
    covariance = factor * bread @ (scores.T @ scores) @ bread
    r2 = 1.0 - float(residuals @ residuals) / float(((values - values.mean()) ** 2).sum())
    return Fit(b, np.sqrt(np.diag(covariance)), r2, len(names), n)
