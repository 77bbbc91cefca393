"""Where to look: the ascent direction d and its size, so that eps = rho * d / size and theta' = theta + eps.

Every function takes the parameters to perturb and their gradients g (lists of tensors) and returns (d, size), size a float.
It may overwrite the gradients when `consume` is true.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError

Ascent = Callable[..., tuple[list[Tensor], float]]


NARROW = (torch.bfloat16, torch.float16)


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of a list of tensors taken as one vector, in float32 at least; sharded tensors count whole."""
    parts: list[Any] = []
    wide = [x for x in tensors if x.dtype not in NARROW]
    narrow = [x for x in tensors if x.dtype in NARROW]
    if wide:
        parts.append(torch.nn.utils.get_total_norm(wide))
    if narrow:
        parts.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(narrow, 2, dtype=torch.float32))))
    return math.hypot(*(float(part.full_tensor() if hasattr(part, "full_tensor") else part) for part in parts))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product of two lists of tensors taken as vectors, in float32 at least."""
    parts = []
    for x, y in zip(a, b, strict=True):
        if x.dtype in NARROW:
            x, y = x.float(), y.float()
        product: Any = (x * y).sum() if hasattr(x, "full_tensor") else torch.dot(x.reshape(-1), y.reshape(-1))
        parts.append((product.full_tensor() if hasattr(product, "full_tensor") else product).double())
    return float(torch.stack(parts).sum()) if parts else 0.0


def second_moment(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> tuple[Tensor, float] | None:
    """(v, c) with v_hat = v / c, the optimizer's bias-corrected second moment of p BEFORE the coming step; None before the first.

    Adam's family keeps exp_avg_sq and a step count (c = 1 - beta2^t; AMSGrad's running maximum takes its place there),
    RMSprop square_avg, Adagrad sum (both uncorrected).
    """
    state = optimizer.state.get(p)
    if not state:
        return None
    for name in ("max_exp_avg_sq", "exp_avg_sq"):
        if name in state:
            steps = float(state["step"])
            return (state[name], 1.0 - group["betas"][1] ** steps) if steps > 0 else None
    for name in ("square_avg", "sum"):
        if name in state:
            return state[name], 1.0
    return None


def has_second_moment(optimizer: torch.optim.Optimizer) -> bool:
    """True for optimizers whose state will hold a second moment (Adam's family, RMSprop, Adagrad)."""
    kinds = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adagrad)
    return isinstance(optimizer, kinds) or any(
        name in state for state in optimizer.state.values() for name in ("exp_avg_sq", "square_avg", "sum")
    )


def owners(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The parameter group of each parameter."""
    return {p: group for group in optimizer.param_groups for p in group["params"]}


def _preconditioned(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], vectors: Sequence[Tensor], consume: bool
) -> list[Tensor] | None:
    """P x with P = 1 / (sqrt(v_hat) + e), e the optimizer's own eps. None when no parameter has a second moment yet.

    A parameter that alone has none yet (it had no gradient so far) is left where it is: its P is unknown.
    """
    groups, found, result = owners(optimizer), False, []
    for p, x in zip(params, vectors, strict=True):
        moment = second_moment(optimizer, groups[p], p)
        if moment is None:
            result.append(torch.zeros_like(x))
            continue
        found = True
        v, correction = moment
        scale = v.sqrt().div_(math.sqrt(correction)).add_(groups[p].get("eps", 1e-8))
        # One temporary the size of this parameter, not of the model.
        result.append(x.div_(scale) if consume else scale.reciprocal_().mul_(x))
    return result if found else None


def gradient(params: Sequence[Tensor], grads: list[Tensor], **_: Any) -> tuple[list[Tensor], float]:
    """SAM: d = g, size = |g|. Source: Foret et al. 2020, eq. 2."""
    return grads, norm(grads)


def adam(
    params: Sequence[Tensor], grads: list[Tensor], *, optimizer: torch.optim.Optimizer, form: str = "a", consume: bool, **_: Any
) -> tuple[list[Tensor], float]:
    """Preconditioned SAM: d = P g in the optimizer's own geometry, P = 1 / (sqrt(v_hat) + e).

    size: form a |P g|, form b |g|, form c sqrt(g^T P g). rho is not comparable between the forms. The paper's form is not
    known to us; a is our default. In the first step, with no second moment yet, d = g (size |g|).
    Source: Singh et al. 2025 (Functional-SAM), the idea; forms: the candidates in the preconditioned-SAM literature.
    """
    size = norm(grads) if form == "b" else 0.0
    preconditioned = _preconditioned(optimizer, params, grads, consume and form != "c")
    if preconditioned is None:
        return gradient(params, grads)
    if form == "a":
        size = norm(preconditioned)
    elif form == "c":
        size = math.sqrt(max(dot(grads, preconditioned), 0.0))
    return preconditioned, size


def adaptive(
    params: Sequence[Tensor], grads: list[Tensor], *, eta: float = 0.01, consume: bool, **_: Any
) -> tuple[list[Tensor], float]:
    """ASAM: d = T^2 g, size = |T g|, T = |w| + eta for weights (two or more dimensions), 1 otherwise.

    Source: Kwon et al. 2021, eq. 7 and section 5 (eta 0.01).
    """
    scaled, result = [], []
    for p, g in zip(params, grads, strict=True):
        if p.ndim < 2:
            scaled.append(g)
            result.append(g)
        else:
            scale = p.detach().abs().add_(eta)
            scaled.append(g.mul_(scale) if consume else g * scale)
            result.append(scale.mul_(scaled[-1]))
    return result, norm(scaled)


def fisher(
    params: Sequence[Tensor], grads: list[Tensor], *, eta: float = 1.0, consume: bool, **_: Any
) -> tuple[list[Tensor], float]:
    """Fisher-SAM: d = F^-1 g, size = sqrt(g^T F^-1 g), F = 1 + eta * g^2 the damped diagonal of the batch's empirical Fisher.

    Source: Kim et al. 2022, for the geometry; the estimate and damping of F are ours to state: the squared gradient of the
    step's batch, eta weighs it against the identity.
    """
    result = [g / (g * g).mul_(eta).add_(1.0) for g in grads]
    return result, math.sqrt(max(dot(grads, result), 0.0))


def momentum(
    params: Sequence[Tensor],
    grads: list[Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    sign: float = 1.0,
    preconditioned: bool = False,
    **_: Any,
) -> tuple[list[Tensor], float]:
    """The optimizer's first moment: d = sign * m (or sign * P m), size = |d|; it needs no gradient of the coming batch.

    Size 0 when there is no moment yet (the first step). Bias correction is a common factor and cancels in d / size.
    Source: Momentum-SAM (Becker et al. 2024) with sign -1; sign +1 is the ascent direction.
    """
    m = []
    for p in params:
        state = optimizer.state.get(p, {})
        moment = state.get("exp_avg", state.get("momentum_buffer"))
        m.append(torch.zeros_like(p) if moment is None else moment if sign == 1.0 else -moment)
    if preconditioned:
        m = _preconditioned(optimizer, params, m, consume=sign != 1.0) or m  # the optimizer's own moments stay as they are
    return m, norm(m)


ASCENTS: dict[str, Ascent] = {
    "gradient": gradient,
    "adam": adam,
    "adaptive": adaptive,
    "fisher": fisher,
    "momentum": momentum,
}


def subset(model: torch.nn.Module, only: str | Callable[[str, Tensor], bool] | None) -> set[Tensor] | None:
    """Parameters to perturb: None for all; "norm" for those of normalization layers (SAM-ON); or a predicate (name, parameter).

    A normalization layer is one whose class name says so (LayerNorm, RMSNorm, BatchNorm2d, Norm ...).
    Raises UserError when nothing is selected. Source: Mueller et al. 2023.
    """
    if only is None:
        return None
    if only == "norm":
        chosen: set[Tensor] = {
            p for module in model.modules() if "norm" in type(module).__name__.lower() for p in module.parameters(recurse=False)
        }
    elif callable(only):
        chosen = {p for name, p in model.named_parameters() if only(name, p)}
    else:
        raise UserError(f'only={only!r}: expected None, "norm", or a function (name, parameter) -> bool')
    if not chosen:
        raise UserError(f"only={only!r} selects no parameter of {type(model).__name__}")
    return chosen
