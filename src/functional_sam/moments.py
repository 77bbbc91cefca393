"""What optimizers keep: first and second moments, in the state or the group, inside wrappers, of one optimizer or of several."""

import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError

FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum")
ROTATED = ("Q", "GG", "projector")  # SOAP, Kron, GaLore: their moments are in a basis of their own
WITHOUT_SECOND = (torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop, torch.optim.LBFGS)


class States:
    """The states of several optimizers as one mapping by parameter."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = [optimizer.state for optimizer in optimizers]

    def get(self, p: Tensor, default: Any = None) -> Any:
        return next((part[p] for part in self.parts if p in part), default)

    def values(self) -> list[Any]:
        return [state for part in self.parts for state in part.values()]


class Several:
    """Several optimizers (Muon for the matrices, AdamW for the rest) read as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> States:
        return States(self.optimizers)

    def register_step_post_hook(self, hook: Callable[..., None]) -> None:
        for optimizer in self.optimizers:
            optimizer.register_step_post_hook(hook)

    def register_step_pre_hook(self, hook: Callable[..., None]) -> None:
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(hook)


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The torch.optim.Optimizer inside wrappers (Accelerate, Lightning, Lookahead), or Several for a sequence of them."""
    if isinstance(optimizer, list | tuple):
        if not optimizer:
            raise UserError("optimizer=[]: give the optimizer that will step, or the list of them")
        return Several([unwrapped_optimizer(part) for part in optimizer])
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not hasattr(optimizer, "param_groups"):
        raise UserError(
            f"optimizer is a {type(optimizer).__name__}: give the torch.optim.Optimizer that will step, or a list of them"
        )
    return optimizer


def parts_of(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers that an unwrapped one consists of: itself, or those of Several."""
    return optimizer.optimizers if isinstance(optimizer, Several) else [optimizer]


def owners(optimizer: Any) -> dict[Tensor, dict[str, Any]]:
    """Map each parameter of the optimizer to its group."""
    return {p: group for group in optimizer.param_groups for p in group["params"]}


def has_rho_of_its_own(optimizer: Any) -> bool:
    """Whether "rho" names a hyperparameter of this optimizer (Adadelta's decay), which in its groups is no radius then."""
    return "rho" in getattr(optimizer, "defaults", {})


def first_moment(optimizer: Any, p: Tensor) -> Tensor | None:
    """Return m of a parameter, up to a factor that all share; None before the first step."""
    state = _state(optimizer, p)
    return next((state[name] for name in FIRST if isinstance(state.get(name), Tensor)), None)


def second_moment(optimizer: Any, group: dict[str, Any], p: Tensor) -> tuple[Tensor, float] | None:
    """Return (v, c), v_hat = v / c the bias-corrected second moment of p BEFORE the coming step; None before the first step.

    Adam's family keeps exp_avg_sq (AMSGrad's running maximum takes its place) and a step count, of the parameter or the group, and
    c = 1 - beta2^t; RMSprop square_avg, Adagrad sum (both uncorrected).
    """
    state = _state(optimizer, p)
    name = next((name for name in SECOND if isinstance(state.get(name), Tensor)), None)
    if name is None:
        return None
    steps, beta = _steps(state, group), _beta(state, group)
    if name == "sum" and steps == 0 and not group.get("initial_accumulator_value"):
        return None  # zeros, which Adagrad makes when it is built
    if name in ("square_avg", "sum"):
        return state[name], 1.0
    return (state[name], 1.0 - beta**steps) if steps and beta is not None else None


def denominator(optimizer: Any, group: dict[str, Any], p: Tensor) -> Tensor | None:
    """Return 1 / P = sqrt(v_hat) + e of a parameter, e the optimizer's own eps; None while it has no second moment.

    inf, that is P = 0, at elements that no gradient has reached so far (v = 0, a word that was not met): their P is unknown, and
    1 / e would give them nearly all of a step of length rho.
    """
    moment = second_moment(optimizer, group, p)
    if moment is None:
        return None
    v, correction = moment
    eps = group.get("eps", 1e-8)
    scale = v.sqrt().div_(math.sqrt(correction)).add_(eps if isinstance(eps, int | float) else 1e-8)
    return scale.masked_fill_(v == 0, math.inf)


def _state(optimizer: Any, p: Tensor) -> dict[str, Any]:
    state = optimizer.state.get(p)
    return state if isinstance(state, dict) else {}


def _steps(state: dict[str, Any], group: dict[str, Any]) -> float | None:
    count = next((where[key] for where, key in ((state, "step"), (group, "step"), (group, "k")) if key in where), None)
    return None if count is None else float(count)


def _beta(state: dict[str, Any], group: dict[str, Any]) -> float | None:
    betas = group.get("betas", ())
    place = 2 if "exp_avg_diff" in state else 1  # Adan's third
    return float(betas[place]) if len(betas) > place else None


def require_state(
    ascent: str | None,
    optimizer: Any,
    preconditioned: bool = False,
    *,
    params: Container[Tensor] | None = None,
    stepped: bool = False,
) -> None:
    """Raise UserError for an ascent that reads moments which this optimizer does not keep, naming what it keeps.

    params: those to perturb, None for all. stepped: a step has been taken, so that what is not there now never will be.
    """
    second = ascent == "adam" or (ascent == "momentum" and preconditioned)
    for part in parts_of(optimizer):
        if ascent == "momentum":
            _require(part, "first", params, stepped)
        if second:
            _require(part, "second", params, stepped)


def _require(optimizer: torch.optim.Optimizer, which: str, params: Container[Tensor] | None, stepped: bool) -> None:
    """require_state for one optimizer and its "first" or "second" moment: by its class, then by the states that are there."""
    kind, reads = type(optimizer).__name__, f"the ascent reads the optimizer's {which} moment"
    way_out = "use AdamW, another ascent (ascent='gradient'), or subset= to perturb other parameters"
    if which == "second":
        never = isinstance(optimizer, WITHOUT_SECOND)
    else:
        never = not any("betas" in g or g.get("momentum", "beta" in g) for g in optimizer.param_groups)
    seen = concerned = False
    for p, group in owners(optimizer).items():
        if params is not None and p not in params:
            continue
        concerned = True
        state = _state(optimizer, p)
        if not state or (never and which == "first"):
            continue
        found = first_moment(optimizer, p) if which == "first" else next((state[n] for n in SECOND if n in state), None)
        if found is None and which == "first" and state.get("momentum_buffer", p) is None:
            continue  # SGD before its first step
        if any(key in state for key in ROTATED) or (isinstance(found, Tensor) and found.shape != p.shape):
            raise UserError(f"{kind} keeps its moments in a basis or shape of its own, which no ascent can read: {way_out}")
        if found is None:
            raise UserError(f"{reads}, which {kind} does not keep (its state: {', '.join(map(str, state))}): {way_out}")
        corrected = which == "second" and "square_avg" not in state and "sum" not in state
        if corrected and (_steps(state, group) is None or _beta(state, group) is None):
            raise UserError(f"{kind} keeps a second moment, but no step count and betas in its state or group: {way_out}")
        seen = True
    for i, group in enumerate(optimizer.param_groups if stepped and which == "first" else []):
        without = "betas" not in group and not group.get("momentum", True) and group.get("rho", 1.0) != 0
        those = [p for p in group["params"] if p.requires_grad and (params is None or p in params)]
        if seen and without and those and all(first_moment(optimizer, p) is None for p in those):
            raise UserError(
                f"{reads}, and parameter group {i} of {kind} has momentum={group['momentum']!r}: it would never be perturbed. "
                'Give it momentum, or say that it is meant with "rho": 0.0 in the group, or subset='
            )
    if concerned and not seen and (never or stepped):
        raise UserError(f"{reads}, which {kind} does not keep as set up: {way_out}")
