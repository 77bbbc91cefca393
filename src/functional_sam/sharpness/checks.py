"""Whether a method, its radius and its options fit the model and the optimizer: refused here, before any step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sam.ascents import require_state
from functional_sam.errors import UserError
from functional_sam.sharpness.methods import Method
from functional_sam.weights import is_sharded, replicas


def check(method: Method, options: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for what cannot work, and fill in lr_max, the highest learning rate, from the optimizer."""
    for group in optimizer.param_groups:
        radius(group.get("rho", 0.0), "in a parameter group")
    if options["lr_max"] is None:
        options["lr_max"] = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    if options["rho_schedule"] == "lr" and options["lr_max"] <= options["lr_min"]:
        raise UserError(
            f'rho_schedule="lr": lr_max={options["lr_max"]:g} is not above lr_min={options["lr_min"]:g}; give lr_max=, the highest '
            "learning rate of the run (by default the optimizer's when SharpnessAware is made)"
        )
    require_state(method.ascent, optimizer, options.get("preconditioned", False))
    if options["scope"] != "step" and is_sharded(model):
        raise UserError(f'scope={options["scope"]!r} needs whole parameters on each rank (DDP); with sharded ones use scope="step"')
    many = is_sharded(model) or bool(replicas(model))
    if method.path == "penalty" and options["derivative"] == "exact" and many:
        raise UserError('exact second derivatives need the model in one process: use derivative="difference"')


def radius(rho: object, where: str = "") -> float:
    """The radius as a float. Raises UserError unless it is a finite number >= 0."""
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not math.isfinite(rho) or rho < 0:
        place = f" {where}" if where else ""
        raise UserError(f"rho={rho!r}{place}: the radius is a finite number >= 0 (0 is the plain gradient)")
    return float(rho)


def chosen(model: torch.nn.Module, subset: str | Callable[[str, Tensor], bool] | None) -> set[Tensor] | None:
    """Parameters to perturb: None for all; "norm" for those of normalization layers (SAM-ON); or a predicate (name, parameter).

    A normalization layer is one whose class name says so (LayerNorm, RMSNorm, BatchNorm2d, Norm ...).
    Raises UserError when nothing is selected. Source: Mueller et al. 2023.
    """
    if subset is None:
        return None
    found: set[Tensor]
    if callable(subset):
        found = {p for name, p in model.named_parameters() if subset(name, p)}
    else:
        layers = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
        found = {p for module in layers for p in module.parameters(recurse=False)}
    if not found:
        raise UserError(f"subset={subset!r} selects no parameter of {type(model).__name__}")
    return found
