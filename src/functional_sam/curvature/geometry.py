"""Curvature as Adam sees it: P^1/2 A P^1/2, P = 1 / (sqrt(v_hat) + e) its preconditioner, v_hat its second moment."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from functional_sam.curvature.ascent import require_holder
from functional_sam.curvature.operators import Names, Operator
from functional_sam.errors import UserError
from functional_sam.moments import denominator, owners, require_state


class Products(Protocol):
    """What CurvatureProducts and AdamGeometry have in common."""

    @property
    def parameters(self) -> list[nn.Parameter]: ...

    @property
    def hessian(self) -> Operator: ...

    @property
    def gauss_newton(self) -> Operator: ...

    @property
    def functional(self) -> Operator: ...

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]: ...

    def split(self, v: Any) -> tuple[Any, Any]: ...


class AdamGeometry:
    """The products of P^1/2 H P^1/2, of its halves, and P^1/2 g: derivatives by x, where theta = P^1/2 x with P held fixed.

    A unit step along the gradient by x is a step along P g by theta, which is the preconditioned ascent. The eigenvalues are those
    of P A, the largest of which, times the learning rate, says whether Adam is stable (Cohen et al. 2022, arXiv 2207.14484).
    """

    def __init__(self, products: Any, names: Names, scales: list[Tensor]) -> None:
        self.products, self.names, self.scales = products, names, scales  # P^1/2
        self.parameters: list[nn.Parameter] = names.parameters

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L and P^1/2 g."""
        loss, g = self.products.loss_and_gradient()
        return loss, self._scaled(g)

    def gradient(self) -> list[Tensor]:
        """P^1/2 g."""
        return self.loss_and_gradient()[1]

    @property
    def hessian(self) -> Operator:
        """P^1/2 H P^1/2."""
        return self._between(self.products.hessian)

    @property
    def gauss_newton(self) -> Operator:
        """P^1/2 H_G P^1/2."""
        return self._between(self.products.gauss_newton)

    @property
    def functional(self) -> Operator:
        """P^1/2 H_F P^1/2."""
        return self._between(self.products.functional)

    def split(self, v: Any) -> tuple[Any, Any]:
        """(P^1/2 H_G P^1/2 v, P^1/2 H_F P^1/2 v)."""
        logit, func = self.products.split(self._scaled(self.names.listed(v)))
        return self.names.as_given(self._scaled(logit), v), self.names.as_given(self._scaled(func), v)

    def _between(self, operator: Operator) -> Operator:
        return Operator(lambda v: self._scaled(operator(self._scaled(v))), self.names)

    def _scaled(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [v_i.detach() * scale for v_i, scale in zip(v, self.scales, strict=True)]


def adam_scales(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    second_moments: Sequence[Tensor] | None,
    eps: float,
) -> list[Tensor]:
    """P^1/2 for each parameter; zero for one that the optimizer has no second moment of yet, which ascents leave where it is."""
    if (optimizer is None) == (second_moments is None):
        raise UserError("Adam's geometry comes from optimizer= or from second_moments=: give one of the two")
    if optimizer is None:
        given = list(second_moments or ())
        if [t.shape for t in given] != [p.shape for p in parameters]:
            raise UserError("second_moments are shaped unlike the parameters: give one tensor for each parameter")
        return [(v_hat.detach().to(p.dtype).sqrt() + eps).rsqrt() for v_hat, p in zip(given, parameters, strict=True)]
    require_holder(parameters, optimizer, "Adam's geometry")
    require_state("adam", optimizer)
    groups = owners(optimizer)
    denominators = [denominator(optimizer, groups[p], p) for p in parameters]
    if all(d is None for d in denominators):
        raise UserError("this optimizer has not stepped yet: it has no second moment and so no geometry")
    return [torch.zeros_like(p) if d is None else d.to(p.dtype).rsqrt() for d, p in zip(denominators, parameters, strict=True)]
