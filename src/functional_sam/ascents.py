"""Where to look: the ascent direction d and its size, so that eps = rho * d / size and theta' = theta + eps.

Training and measuring take their directions here. Every function takes the parameters to perturb and their gradients g (lists of
tensors) and returns (d, size), size a float. It may overwrite the gradients when `consume` is true.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sam.moments import denominator, first_moment, owners
from functional_sam.vectors import dot, gaussian_like, norm

Ascent = Callable[..., tuple[list[Tensor], float]]


def _preconditioned(optimizer: Any, params: Sequence[Tensor], vectors: Sequence[Tensor], consume: bool) -> list[Tensor] | None:
    """Return P x, P = 1 / (sqrt(v_hat) + e), for each parameter and its vector x; None when none has a second moment yet.

    A parameter, or an element of one, that has none yet (no gradient reached it so far) is left where it is: its P is unknown.
    """
    groups, found, result = owners(optimizer), False, []
    for p, x in zip(params, vectors, strict=True):
        scale = denominator(optimizer, groups[p], p)
        if scale is None:
            result.append(torch.zeros_like(x))
            continue
        found = True
        # One temporary the size of this parameter, not of the model.
        result.append(x.div_(scale) if consume else scale.reciprocal_().mul_(x))
    return result if found else None


def gradient(
    params: Sequence[Tensor], grads: list[Tensor], *, normalize_by: str = "direction", **_: Any
) -> tuple[list[Tensor], float]:
    """SAM: d = g, size = |g|; normalize_by="none": size = 1, eps = rho g.

    Source: Foret et al. 2020, eq. 2; without the normalization Andriushchenko & Flammarion 2022 (sam_no_grad_norm in their code).
    """
    return grads, _unless_none(normalize_by, norm(grads, fast=True))


def _unless_none(normalize_by: str, size: float) -> float:
    """The size, or 1 where none is asked for; 0 and what is not finite stay, for a step to see."""
    return 1.0 if normalize_by == "none" and size > 0.0 and math.isfinite(size) else size


def adam(
    params: Sequence[Tensor],
    grads: list[Tensor],
    *,
    optimizer: Any,
    normalize_by: str = "direction",
    consume: bool,
    **_: Any,
) -> tuple[list[Tensor], float]:
    """Preconditioned SAM: d = P g in the optimizer's own geometry, P = 1 / (sqrt(v_hat) + e).

    size, by normalize_by: "direction" |P g|, "gradient" |g|, "energy" sqrt(g^T P g), "none" 1. rho is not comparable between them.
    The paper's is not known to us; the first is our default. In the first step, with no second moment yet, d = g (size |g| or 1).
    Source: Singh et al. 2025 (Functional-SAM), the idea; sizes: the candidates in the preconditioned-SAM literature, "none" the
    ascent of bSAM (Moellenhoff & Khan 2023), whose noise and second moment are its own optimizer's.
    """
    size = norm(grads, fast=True) if normalize_by == "gradient" else 0.0
    preconditioned = _preconditioned(optimizer, params, grads, consume and normalize_by != "energy")
    if preconditioned is None:
        return gradient(params, grads, normalize_by=normalize_by)
    if normalize_by in ("direction", "none"):
        size = _unless_none(normalize_by, norm(preconditioned, fast=True))
    elif normalize_by == "energy":
        size = math.sqrt(max(dot(grads, preconditioned, fast=True), 0.0))
    return preconditioned, size


def adaptive(
    params: Sequence[Tensor], grads: list[Tensor], *, eta: float = 0.01, per: str = "element", consume: bool, **_: Any
) -> tuple[list[Tensor], float]:
    """ASAM: d = T^2 g, size = |T g|, T = |w| + eta for weights (two or more dimensions), 1 otherwise.

    per="layer": T = (1 + eta) |w|_2, one number a tensor, for weights.
    Where T may be zero g is not overwritten: a size of zero leaves it, the plain gradient.
    Source: Kwon et al. 2021, eq. 7 and section 5 (eta 0.01): T = 1 for biases. Their code goes by names, and has T = |w| + eta for
    scales of normalizations ("weight") too, which are near 1. By layer Mueller et al. 2023, as in their code.
    """
    scaled, result = [], []
    for p, g in zip(params, grads, strict=True):
        if p.ndim < 2:
            scaled.append(g)
            result.append(g)
        elif per == "layer":
            length = (1.0 + eta) * norm([p.detach()], fast=True)
            scaled.append(g.mul_(length) if consume and length else g * length)
            result.append(scaled[-1] * length)
        else:
            scale = p.detach().abs().add_(eta)
            scaled.append(g.mul_(scale) if consume and eta else g * scale)
            result.append(scale.mul_(scaled[-1]))
    return result, norm(scaled, fast=True)


def fisher(
    params: Sequence[Tensor], grads: list[Tensor], *, eta: float = 1.0, consume: bool, **_: Any
) -> tuple[list[Tensor], float]:
    """Fisher-SAM: d = F^-1 g, size = sqrt(g^T F^-1 g), F = 1 + eta * g^2 the damped diagonal of the batch's empirical Fisher.

    Source: Kim et al. 2022, for the geometry; the estimate and damping of F are ours to state: the squared gradient of the
    step's batch, eta weighs it against the identity.
    """
    result = [g / (g * g).mul_(eta).add_(1.0) for g in grads]
    return result, math.sqrt(max(dot(grads, result, fast=True), 0.0))


def momentum(
    params: Sequence[Tensor],
    grads: list[Tensor],
    *,
    optimizer: Any,
    direction: str = "ascent",
    preconditioned: bool = False,
    **_: Any,
) -> tuple[list[Tensor], float]:
    """The optimizer's first moment m: d = m (or P m), or with direction="descent" its negative; size = |d|.

    It needs no gradient of the coming batch. Size 0 when there is no moment yet (the first step). Bias correction is a common
    factor and cancels in d / size.
    Source: Momentum-SAM (Becker et al. 2024) with "descent"; "ascent" is the direction in which the loss has been seen to grow.
    """
    up, m = direction == "ascent", []
    for p in params:
        moment = first_moment(optimizer, p)
        m.append(torch.zeros_like(p) if moment is None else moment if up else -moment)
    if preconditioned:
        m = _preconditioned(optimizer, params, m, consume=not up) or m  # the optimizer's own moments stay as they are
    return m, norm(m, fast=True)


def random(
    params: Sequence[Tensor], grads: list[Tensor], *, generator: torch.Generator | None = None, **_: Any
) -> tuple[list[Tensor], float]:
    """A control: d = z, z ~ N(0, I), size = |z|, so that eps is uniform on the sphere of radius rho. It needs no gradient.

    generator: where z comes from; None: torch's own.
    """
    z = [gaussian_like(p, generator) for p in params]
    return z, norm(z, fast=True)


ASCENTS: dict[str, Ascent] = {
    "gradient": gradient,
    "adam": adam,
    "adaptive": adaptive,
    "fisher": fisher,
    "momentum": momentum,
    "random": random,
}
