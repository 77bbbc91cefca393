"""Directions d of ascent along which the curvature is asked for, as the methods of functional_sam.sharpness take them.

theta the parameters, g the gradient. Only eps = d / |d| matters here, so methods that differ in the length of the step alone, such
as the forms a, b and c of the preconditioned ascent, are one direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from functional_sam.curvature.geometry import adam_denominators
from functional_sam.errors import UserError

Ascent = str | Sequence[Tensor]

ASCENTS = ("gradient", "adam", "adaptive", "fisher", "momentum")


def direction(
    ascent: Ascent,
    g: list[Tensor],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
    eta: float | None = None,
) -> Sequence[Tensor]:
    """d for one ascent.

        "gradient"         g (SAM)
        "adam"             g / (sqrt(v_hat) + e), v_hat = exp_avg_sq / (1 - beta2^step) and e from the optimizer; a parameter that
                           it has not stepped counts as at its first step, v_hat = g^2; while it has stepped none, d = g
        "adaptive"         T^2 g, T = |theta| + eta for tensors of two or more dimensions, 1 for others (ASAM); eta 0.01
        "fisher"           g / (1 + eta g^2), by the damped diagonal of the batch's empirical Fisher (Fisher-SAM); eta 1
        "momentum"         the first moment of the optimizer; a parameter without one stays
        a list of tensors  itself

    Raises UserError for an unknown ascent, and for "adam" or "momentum" without an optimizer that holds all parameters.
    """
    if not isinstance(ascent, str):
        return ascent
    if ascent == "gradient":
        return g
    if ascent == "adam":
        denominators = adam_denominators(parameters, optimizer, lambda: g)
        return g if denominators is None else [g_i / d for g_i, d in zip(g, denominators, strict=True)]
    if ascent == "adaptive":
        shift = 0.01 if eta is None else eta
        return [g_i if p.ndim < 2 else g_i * (p.detach().abs() + shift).square() for g_i, p in zip(g, parameters, strict=True)]
    if ascent == "fisher":
        weight = 1.0 if eta is None else eta
        return [g_i / (1 + weight * g_i.square()) for g_i in g]
    if ascent == "momentum":
        return _momentum(parameters, optimizer)
    raise UserError(f"ascent={ascent!r}: choose one of {', '.join(ASCENTS)}, or give a list of tensors shaped like the parameters")


def _momentum(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    if optimizer is None:
        raise UserError("ascent='momentum' needs optimizer=, the one that trains the model")
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    found = [state.get("exp_avg", state.get("momentum_buffer")) for state in states]
    return [torch.zeros_like(p) if m is None else m.to(p.dtype) for p, m in zip(parameters, found, strict=True)]
