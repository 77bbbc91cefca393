"""How much of the sharpness gradient is logit and how much functional: H eps = H_G eps + H_F eps.

theta the parameters, g the gradient, eps a unit vector, H_G and H_F the halves of the Hessian (see products.py).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functional_sam.curvature.products import Batch, CurvatureProducts, Forward, LossFn
from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy

Ascent = str | Sequence[Tensor]


@dataclass(frozen=True)
class Decomposition:
    """The two halves of H eps and what is said of them. Lists are shaped like the trainable parameters; numbers are floats.

    A cosine is nan where one of its vectors is zero, as delta_func is on a model linear in theta.
    """

    loss: float  # mean loss, nats per target for cross-entropy
    gradient: list[Tensor]  # g
    delta_logit: list[Tensor]  # H_G eps
    delta_func: list[Tensor]  # H_F eps
    norm_gradient: float
    norm_logit: float
    norm_func: float
    share: float  # |delta_func| / (|delta_func| + |delta_logit|), in [0, 1]
    cosine: float  # between delta_logit and delta_func
    cosine_logit_gradient: float
    cosine_func_gradient: float
    curvature_logit: float  # eps^T H_G eps, never negative for a loss convex in the logits
    curvature_func: float  # eps^T H_F eps


def decompose(
    model: nn.Module,
    batches: Iterable[Batch],
    ascent: Ascent = "gradient",
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
) -> Decomposition:
    """The two halves of the sharpness gradient along one ascent direction d: delta_logit = H_G eps, delta_func = H_F eps.

    eps = d / |d|, where d is
        "gradient"         g
        "adam"             g / (sqrt(v_hat) + e), v_hat = exp_avg_sq / (1 - beta2^step) and e from the optimizer; a parameter that
                           it has not stepped counts as at its first step, v_hat = g^2; while it has stepped none, d = g
        a list of tensors  itself
    batches, loss_fn, forward: see CurvatureProducts.
    Costs about five gradients: g, then one double backward and one backward for both halves.
    Raises UserError for an unknown ascent, for "adam" without an Adam that holds the parameters, for a d that is zero or not
    finite, and whatever CurvatureProducts raises.
    Source: arXiv 2502.02407, for the split and for the preconditioned ascent, whose exact form there was not seen.
    """
    return decompose_many(model, batches, [ascent], optimizer, loss_fn, forward)[0]


def decompose_many(
    model: nn.Module,
    batches: Iterable[Batch],
    ascents: Sequence[Ascent],
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
) -> list[Decomposition]:
    """decompose for each of several ascents, with one gradient between them."""
    products = CurvatureProducts(model, batches, loss_fn, forward)
    loss, g = products.loss_and_gradient()
    return [_along(products, float(loss), g, _unit(_direction(ascent, g, products.parameters, optimizer))) for ascent in ascents]


def _along(products: CurvatureProducts, loss: float, g: list[Tensor], eps: list[Tensor]) -> Decomposition:
    logit, func = products.split(eps)
    norm_g, norm_logit, norm_func = _norm(g), _norm(logit), _norm(func)
    return Decomposition(
        loss=loss,
        gradient=g,
        delta_logit=logit,
        delta_func=func,
        norm_gradient=norm_g,
        norm_logit=norm_logit,
        norm_func=norm_func,
        share=_ratio(norm_func, norm_func + norm_logit),
        cosine=_ratio(_dot(logit, func), norm_logit * norm_func),
        cosine_logit_gradient=_ratio(_dot(logit, g), norm_logit * norm_g),
        cosine_func_gradient=_ratio(_dot(func, g), norm_func * norm_g),
        curvature_logit=_dot(eps, logit),
        curvature_func=_dot(eps, func),
    )


def _direction(
    ascent: Ascent, g: list[Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> Sequence[Tensor]:
    if not isinstance(ascent, str):
        return ascent
    if ascent == "gradient":
        return g
    if ascent == "adam":
        return _preconditioned(g, parameters, optimizer)
    raise UserError(f"ascent={ascent!r}: choose 'gradient', 'adam', or give a list of tensors shaped like the parameters")


def _preconditioned(g: list[Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """g / (sqrt(v_hat) + e) from the state of an Adam."""
    if optimizer is None:
        raise UserError("ascent='adam' needs optimizer=, the Adam or AdamW that trains the model")
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    if not all("betas" in groups.get(parameter, {}) for parameter in parameters):
        raise UserError("ascent='adam' needs an Adam or AdamW that holds every trainable parameter of the model")
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    if not any("exp_avg_sq" in state for state in states):
        return g
    direction = []
    for g_i, parameter, state in zip(g, parameters, states, strict=True):
        v_hat = g_i.square()
        if "exp_avg_sq" in state:
            v_hat = state["exp_avg_sq"] / (1 - groups[parameter]["betas"][1] ** float(state["step"]))
        direction.append(g_i / (v_hat.sqrt() + groups[parameter]["eps"]))
    return direction


def _unit(d: Sequence[Tensor]) -> list[Tensor]:
    norm = _norm(d)
    if not 0 < norm < math.inf:
        raise UserError(f"the ascent direction has norm {norm}: there is no unit vector along it")
    return [tensor / norm for tensor in d]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Summed in float64, for the parts differ in size by orders of magnitude."""
    return float(torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum())


def _norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(a, a))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
