"""The trace of a symmetric matrix known by its products, and its quadratic form along a direction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from functional_sam.curvature.lanczos import MAX_BASIS_BYTES, Product, orthogonalize, rows_within
from functional_sam.errors import UserError
from functional_sam.vectors import Space, dot, unit


@dataclass(frozen=True)
class TraceEstimate:
    """A mean, its standard error (nan for n = 1) and the number n of independent samples behind it."""

    mean: float
    stderr: float
    n: int
    num_products: int


def estimate(samples: Sequence[float], num_products: int | None = None) -> TraceEstimate:
    """Mean and standard error of independent samples."""
    values = torch.tensor(list(samples), dtype=torch.float64)
    stderr = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return TraceEstimate(float(values.mean()), stderr, len(values), len(values) if num_products is None else num_products)


def hutchinson(
    product: Product, parameters: Sequence[Tensor], probes: int = 30, *, generator: Generator | None = None
) -> TraceEstimate:
    """tr A = E[x^T A x], x of independent signs; the variance of a sample is 2 (|A|_F^2 - sum of A_ii^2).

    parameters: tensors shaped like a vector. Costs `probes` products.
    Raises UserError for less than one probe. Source: Hutchinson 1989.
    """
    _at_least(probes, 1)
    space = Space(parameters)
    samples = []
    for _ in range(probes):
        x = space.tensors(space.signs(generator))
        samples.append(dot(x, product(x)))
    return estimate(samples)


def hutch_plus_plus(
    product: Product,
    parameters: Sequence[Tensor],
    num_products: int = 30,
    *,
    max_basis_bytes: int = MAX_BASIS_BYTES,
    generator: Generator | None = None,
) -> TraceEstimate:
    """tr A with the largest eigenvalues taken exactly: tr(Q^T A Q) + E[x^T (1 - QQ^T) A (1 - QQ^T) x].

    Q an orthonormal basis of A times random signs. A third of the products goes into each of Q, tr(Q^T A Q) and the samples, n of
    which are behind the standard error; given Q the first part is exact. It wins where a few eigenvalues carry the trace, as with
    H_G, and loses to hutchinson by a factor of 3 in samples where they do not. Q holds num_products / 3 vectors, or as many as fit
    max_basis_bytes; what is left goes into samples.
    Raises UserError for less than 6 products, a budget of less than one vector. Source: Meyer, Musco, Musco and Woodruff 2021
    (arXiv 2010.09649).
    """
    _at_least(num_products, 6)
    space = Space(parameters)
    rank = min(num_products // 3, space.size, rows_within(max_basis_bytes, space, 1))
    Q = torch.empty(rank, space.local_size, dtype=space.dtype, device=space.device)
    used, low = 0, 0.0
    rows = 0
    for _ in range(rank):
        y = space.flat(product(space.tensors(space.signs(generator))))
        used += 1
        size = space.norm(y)
        orthogonalize(y, Q[:rows], space)
        left = space.norm(y)
        if left > 1e3 * torch.finfo(y.dtype).eps * size:  # otherwise A has no more directions to give
            Q[rows] = y / left
            rows += 1
    for q in Q[:rows]:
        direction = space.tensors(q)
        low += dot(direction, product(direction))
        used += 1
    samples: list[float] = []
    while used < num_products or len(samples) < 2:
        x = space.signs(generator)
        orthogonalize(x, Q[:rows], space)
        direction = space.tensors(x)
        samples.append(low + dot(direction, product(direction)))
        used += 1
    return estimate(samples, used)


def quadratic(product: Product, direction: Sequence[Tensor]) -> float:
    """eps^T A eps along eps = direction / |direction|. Raises UserError for a direction of zero."""
    eps = unit(direction, "the direction")
    return dot(eps, product(eps))


def _at_least(given: int, least: int) -> None:
    if given < least:
        raise UserError(f"{given} products: {least} or more are needed")
