"""Curvature as Adam sees it: P^1/2 A P^1/2, P = 1 / (sqrt(v_hat) + e) its preconditioner, v_hat its second moment."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from functional_sam.errors import UserError


class Products(Protocol):
    """What CurvatureProducts and AdamGeometry have in common."""

    @property
    def parameters(self) -> list[nn.Parameter]: ...

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]: ...

    def hessian(self, v: Sequence[Tensor]) -> list[Tensor]: ...

    def gauss_newton(self, v: Sequence[Tensor]) -> list[Tensor]: ...

    def functional(self, v: Sequence[Tensor]) -> list[Tensor]: ...

    def split(self, v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]: ...


class AdamGeometry:
    """The products of P^1/2 H P^1/2, of its halves, and P^1/2 g: derivatives by x, where theta = P^1/2 x with P held fixed.

    A unit step along the gradient by x is a step along P g by theta, which is the preconditioned ascent. The eigenvalues are those
    of P A, the largest of which, times the learning rate, says whether Adam is stable (Cohen et al. 2022, arXiv 2207.14484).
    """

    def __init__(self, products: Products, scales: list[Tensor]) -> None:
        self.products, self.scales = products, scales  # P^1/2

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.products.parameters

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L and P^1/2 g."""
        loss, g = self.products.loss_and_gradient()
        return loss, self._scaled(g)

    def gradient(self) -> list[Tensor]:
        """P^1/2 g."""
        return self.loss_and_gradient()[1]

    def hessian(self, v: Sequence[Tensor]) -> list[Tensor]:
        """P^1/2 H P^1/2 v."""
        return self._scaled(self.products.hessian(self._scaled(v)))

    def gauss_newton(self, v: Sequence[Tensor]) -> list[Tensor]:
        """P^1/2 H_G P^1/2 v."""
        return self._scaled(self.products.gauss_newton(self._scaled(v)))

    def functional(self, v: Sequence[Tensor]) -> list[Tensor]:
        """P^1/2 H_F P^1/2 v."""
        return self._scaled(self.products.functional(self._scaled(v)))

    def split(self, v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(P^1/2 H_G P^1/2 v, P^1/2 H_F P^1/2 v)."""
        logit, func = self.products.split(self._scaled(v))
        return self._scaled(logit), self._scaled(func)

    def _scaled(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [v_i.detach() * scale for v_i, scale in zip(v, self.scales, strict=True)]


def adam_scales(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    second_moments: Sequence[Tensor] | None,
    eps: float,
    gradient: Callable[[], list[Tensor]],
) -> list[Tensor]:
    """P^1/2 for each parameter."""
    if (optimizer is None) == (second_moments is None):
        raise UserError("Adam's geometry comes from optimizer= or from second_moments=: give one of the two")
    if optimizer is not None:
        denominators = adam_denominators(parameters, optimizer, gradient)
        if denominators is None:
            raise UserError("this Adam has not stepped yet: it has no second moment and so no geometry")
        return [d.rsqrt() for d in denominators]
    given = list(second_moments or ())
    if [t.shape for t in given] != [p.shape for p in parameters]:
        raise UserError("second_moments are shaped unlike the parameters: give one tensor for each parameter")
    return [(v_hat.detach().to(p.dtype).sqrt() + eps).rsqrt() for v_hat, p in zip(given, parameters, strict=True)]


def adam_denominators(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None, gradient: Callable[[], list[Tensor]]
) -> list[Tensor] | None:
    """sqrt(v_hat) + e for each parameter, v_hat = exp_avg_sq / (1 - beta2^step); None if the optimizer has stepped none of them.

    One that it has not stepped counts as at its first step, v_hat = g^2. AMSGrad's running maximum takes the place of exp_avg_sq.
    Raises UserError without an Adam that holds all parameters.
    """
    if optimizer is None:
        raise UserError("ascent='adam' needs optimizer=, the Adam or AdamW that trains the model")
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    if not all("betas" in groups.get(parameter, {}) for parameter in parameters):
        raise UserError("ascent='adam' needs an Adam or AdamW that holds every trainable parameter of the model")
    states: list[Any] = [optimizer.state.get(parameter, {}) for parameter in parameters]
    if not any("exp_avg_sq" in state for state in states):
        return None
    g = gradient() if not all("exp_avg_sq" in state for state in states) else [None] * len(states)
    denominators = []
    for g_i, parameter, state in zip(g, parameters, states, strict=True):
        if "exp_avg_sq" in state:
            second = state["max_exp_avg_sq"] if "max_exp_avg_sq" in state else state["exp_avg_sq"]
            v_hat = second.to(parameter.dtype) / (1 - groups[parameter]["betas"][1] ** float(state["step"]))
        else:
            assert g_i is not None
            v_hat = g_i.square()
        denominators.append(v_hat.sqrt() + groups[parameter]["eps"])
    return denominators
