"""Eigenvalues at the ends of a spectrum, and its density.

A a symmetric matrix of size P known by its products: hessian, gauss_newton or functional of CurvatureProducts, or of AdamGeometry.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from functional_sam.curvature.lanczos import MAX_BASIS_BYTES, Lanczos, Product, orthogonalize, rows_within
from functional_sam.errors import UserError
from functional_sam.vectors import Space

WIDTH = math.sqrt(1e-5)  # of a Gaussian, in units of the range


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue of A lies within `residual` of `value`; |value| is of the unit of A."""

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True)
class Eigenvalues:
    """What Lanczos found at the ends of the spectrum."""

    top: list[Eigenvalue]  # the largest first
    bottom: list[Eigenvalue]  # the smallest (most negative) first
    num_products: int
    num_restarts: int
    basis_bytes: int  # held on this rank

    @property
    def converged(self) -> bool:
        return all(eigenvalue.converged for eigenvalue in self.top + self.bottom)


def eigenvalues(
    product: Product,
    parameters: Sequence[Tensor],
    k: int = 1,
    end: str = "both",
    *,
    max_products: int = 300,
    max_basis_bytes: int = MAX_BASIS_BYTES,
    tolerance: float = 1e-3,
    generator: Generator | None = None,
) -> Eigenvalues:
    """The k largest and the k smallest eigenvalues by Lanczos with full reorthogonalization and thick restarts.

    parameters: tensors shaped like a vector, such as products.parameters. end: "top", "bottom" or "both".
    tolerance: converged means |A y - value y| <= tolerance * (largest |Ritz value|); the error of the value itself is about the
    square of that. It stops when all asked for have converged, or after max_products.
    max_basis_bytes: the basis (P numbers a vector) is never larger; when full it is contracted to the Ritz vectors of interest and
    grows again, at the price of more products. Beside it there are three vectors at a time.
    generator: of the starting vector. Multiple eigenvalues are found once each, as with any Lanczos of single vectors, until the
    others have converged to rounding.
    In float32 a product itself is uncertain by about 1e-6 of the largest eigenvalue, and so is a value near zero.
    Raises UserError for a budget that holds too few vectors, an unknown end or k < 1, FloatingPointError for a product that is not
    finite.
    Source: Wu and Simon 2000 (thick restart).
    """
    if end not in ("top", "bottom", "both") or k < 1:
        raise UserError(f"end={end!r}, k={k}: choose 'top', 'bottom' or 'both', and k of 1 or more")
    space = Space(parameters)
    k = min(k, space.size)
    sides = 2 if end == "both" else 1
    rows = min(rows_within(max_basis_bytes, space, sides * k + 3), max_products)
    lanczos, num_restarts = Lanczos(product, space, rows, generator), 0
    while True:
        lanczos.step()
        values, residuals, s = lanczos.ritz()
        size = lanczos.size
        top = list(range(size - 1, max(size - 1 - k, -1), -1)) if end != "bottom" else []
        bottom = list(range(min(k, size))) if end != "top" else []
        limit = tolerance * float(values.abs().max())
        whole = size == space.size
        enough = size >= min(sides * k, space.size)
        if whole or (enough and all(float(residuals[i]) <= limit for i in top + bottom) and size > sides * k):
            break
        if lanczos.num_products >= max_products:
            break
        if lanczos.exhausted:
            # Half of the basis, the ends first, as Wu and Simon advise for clustered eigenvalues.
            keep = max(sides * k, min(size // 2, size - 2))
            chosen = _ends(size, keep, end)
            lanczos.contract(s[:, chosen])
            num_restarts += 1

    def found(indices: list[int]) -> list[Eigenvalue]:
        return [Eigenvalue(float(values[i]), float(residuals[i]), whole or float(residuals[i]) <= limit) for i in indices]

    return Eigenvalues(found(top), found(bottom), lanczos.num_products, num_restarts, lanczos.Q.nbytes)


def _ends(size: int, keep: int, end: str) -> list[int]:
    low = keep if end == "bottom" else 0 if end == "top" else keep // 2
    return [*range(low), *range(size - (keep - low), size)]


@dataclass(frozen=True)
class Density:
    """A spectral density; its integral over the grid is 1, but for what lies outside of a grid that was given.

    grid: centres of the bins [G]. width: of the bins [G]. density [G]: the share of the eigenvalues in a bin by its width, the mean
    over the probes. stderr [G]: of that mean, nan with one probe.
    nodes, weights [probes, order]: Ritz values and the share of the spectrum that each stands for, from which any other density
    can be drawn without a product (`smooth`).
    """

    grid: Tensor
    width: Tensor
    density: Tensor
    stderr: Tensor
    sigma: float
    nodes: Tensor
    weights: Tensor
    size: int  # P
    num_products: int
    reorthogonalized: bool  # against all vectors; otherwise against as many of the last as the budget holds

    @property
    def integral(self) -> float:
        return float((self.density * self.width).sum())

    @property
    def trace(self) -> tuple[float, float]:
        """tr A and its standard error, of the same products."""
        each = self.size * (self.nodes * self.weights).sum(1)
        return float(each.mean()), float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan


def density(
    product: Product,
    parameters: Sequence[Tensor],
    probes: int = 10,
    order: int = 80,
    sigma: float | None = None,
    grid: int | Tensor = 1024,
    *,
    max_basis_bytes: int = MAX_BASIS_BYTES,
    generator: Generator | None = None,
) -> Density:
    """The distribution of the eigenvalues of A, smoothed by a Gaussian, by stochastic Lanczos quadrature.

    For a random unit vector, `order` steps of Lanczos give nodes theta_i and weights tau_i^2 with sum 1, so that
    sum tau_i^2 f(theta_i) estimates tr f(A) / P, exactly so for f a polynomial of degree 2 order - 1 with that vector; the mean is
    taken over `probes` of them. Costs probes * order products.
    sigma: the width of the Gaussian, in the unit of A; 3.2e-3 of the range (a variance of 1e-5 of its square) unless given.
    grid: a number of bins over the range and 6 sigma on each side, or their edges [G + 1], ascending. A bin holds the integral of
    the Gaussian over it, so that nothing is lost however narrow it is.
    max_basis_bytes: as many vectors as fit are kept for reorthogonalization. Without all of them copies of converged eigenvalues
    appear, which share the weight of the one that they copy.
    Raises UserError for numbers below 1, a budget of less than three vectors, edges that do not ascend; FloatingPointError for a
    product that is not finite.
    Source: Ghorbani, Krishnan and Xiao 2019 (arXiv 1901.10159; order 80 to 100; the 1e-5 of their code is a variance); Papyan 2018.
    """
    if probes < 1 or order < 1:
        raise UserError(f"probes={probes}, order={order}: both are 1 or more")
    space = Space(parameters)
    order = min(order, space.size)
    window = min(rows_within(max_basis_bytes, space, 3), order)
    found = [_quadrature(product, space, order, window, generator) for _ in range(probes)]
    nodes, weights = torch.stack([n for n, _, _ in found]), torch.stack([w for _, w, _ in found])
    span, size = float(nodes.max() - nodes.min()), float(nodes.abs().max())
    if span < 1e-6 * size or not size:  # a multiple of the identity
        span = size or 1.0
    sigma = WIDTH * span if sigma is None else sigma
    edges, each = smooth(nodes, weights, sigma, grid)
    return Density(
        grid=(edges[1:] + edges[:-1]) / 2,
        width=edges.diff(),
        density=each.mean(0),
        stderr=each.std(0) / math.sqrt(probes) if probes > 1 else torch.full_like(each[0], math.nan),
        sigma=sigma,
        nodes=nodes,
        weights=weights,
        size=space.size,
        num_products=sum(n for _, _, n in found),
        reorthogonalized=window == order,
    )


def smooth(nodes: Tensor, weights: Tensor, sigma: float, grid: int | Tensor) -> tuple[Tensor, Tensor]:
    """Edges of the bins [G + 1] and the density in them by each probe [probes, G]; see density."""
    if isinstance(grid, int):
        low, high = float(nodes.min()) - 6 * sigma, float(nodes.max()) + 6 * sigma
        edges = torch.linspace(low, high, grid + 1, dtype=torch.float64)
    else:
        edges = grid.detach().cpu().double()
    if sigma <= 0 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
        raise UserError(f"sigma={sigma}, {len(edges)} edges: sigma is positive, and the edges, two at least, ascend")
    each = []
    for node, weight in zip(nodes, weights, strict=True):
        below = torch.special.ndtr((edges.unsqueeze(1) - node) / sigma)  # [G + 1, order]
        each.append((below.diff(dim=0) @ weight) / edges.diff())
    return edges, torch.stack(each)


def _quadrature(product: Product, space: Space, order: int, window: int, generator: Generator | None) -> tuple[Tensor, Tensor, int]:
    """Nodes and weights of one random vector, with zero weights where fewer steps exhaust it, and the number of products."""
    Q = torch.zeros(window, space.local_size, dtype=space.dtype, device=space.device)
    alphas, betas = [], []
    q = space.gaussian(generator)
    q /= space.norm(q)
    before: Tensor | None = None
    beta, scale = 0.0, 0.0
    for j in range(order):
        Q[j % window] = q
        w = space.flat(product(space.tensors(q)))
        if before is not None:
            w.sub_(before, alpha=beta)
        alpha = float(orthogonalize(w, q.unsqueeze(0), space))
        orthogonalize(w, Q[: min(j + 1, window)], space)
        beta = space.norm(w)
        if not abs(alpha) < math.inf or not beta < math.inf:
            raise FloatingPointError(f"product {j + 1} of Lanczos is not finite: nor are the weights or the loss")
        alphas.append(alpha)
        scale = max(scale, abs(alpha), beta)
        if beta <= 10 * torch.finfo(w.dtype).eps * scale or j == order - 1:
            break
        betas.append(beta)
        before, q = q, w / beta
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    T = T + torch.diag(off, 1) + torch.diag(off, -1) if len(off) else T
    values, s = torch.linalg.eigh(T)
    missing = order - len(values)
    return torch.cat([values, values[-1:].expand(missing)]), torch.cat([s[0] ** 2, values.new_zeros(missing)]), len(values)
