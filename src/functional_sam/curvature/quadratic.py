"""How far the quadratic picture of the loss holds along a direction.

L the mean loss, g its gradient, eps a unit vector, rho a distance: L(theta + rho eps) - L(theta) against
rho g.eps + rho^2/2 eps^T H eps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from functional_sam.curvature.ascent import Ascent, direction
from functional_sam.curvature.products import CurvatureProducts
from functional_sam.vectors import dot, ratio, unit


@dataclass(frozen=True)
class QuadraticPoint:
    """At one rho, in the unit of the loss (nats)."""

    rho: float
    measured: float  # L(theta + rho eps) - L(theta)
    linear: float  # rho g.eps
    quadratic: float  # rho^2/2 eps^T H eps

    @property
    def predicted(self) -> float:
        """Linear and quadratic term together."""
        return self.linear + self.quadratic

    @property
    def error(self) -> float:
        """|predicted - measured| / |measured|."""
        return ratio(abs(self.predicted - self.measured), abs(self.measured))


@dataclass(frozen=True)
class QuadraticFit:
    """The second-order prediction along eps, and what the loss does."""

    loss: float
    slope: float  # g.eps
    curvature_logit: float  # eps^T H_G eps
    curvature_func: float  # eps^T H_F eps
    points: list[QuadraticPoint]

    @property
    def curvature(self) -> float:
        """eps^T H eps."""
        return self.curvature_logit + self.curvature_func


def quadratic_fit(
    products: CurvatureProducts,
    rhos: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2),
    ascent: Ascent = "gradient",
    optimizer: torch.optim.Optimizer | None = None,
    eta: float | None = None,
) -> QuadraticFit:
    """The loss at theta + rho eps against its second-order prediction, for each rho.

    ascent, optimizer, eta: see functional_sam.curvature.ascent.direction; eps = d / |d| over products.parameters.
    Costs a gradient, a split and a forward for each rho. The weights are moved and put back by copy, bit for bit. In
    float32 the loss is uncertain by about 1e-6 nats: for rho below 0.01 use a float64 model.
    Raises UserError as decompose does.
    """
    loss, g = products.loss_and_gradient()
    eps = unit(direction(ascent, g, products.parameters, optimizer, eta))
    logit, func = products.split(eps)
    slope, curvature_logit, curvature_func = dot(g, eps), dot(eps, logit), dot(eps, func)
    at_start, points = float(products.loss()), []
    for rho in rhos:
        measured = float(products.loss_along(eps, rho)) - at_start
        points.append(QuadraticPoint(rho, measured, rho * slope, rho**2 / 2 * (curvature_logit + curvature_func)))
    return QuadraticFit(float(loss), slope, curvature_logit, curvature_func, points)
