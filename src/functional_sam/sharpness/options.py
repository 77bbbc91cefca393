"""From a name and options to a checked method: bad combinations are refused here, before any step."""

import dataclasses
import difflib
import math
from typing import Any

import torch

from functional_sam.errors import UserError
from functional_sam.sharpness.ascent import has_second_moment
from functional_sam.sharpness.methods import ASCENT_OPTIONS, GENERAL_OPTIONS, METHODS, MIX_OPTIONS, PATH_OPTIONS, Method
from functional_sam.sharpness.passes import is_sharded, replicas

CHOICES = {
    "form": ("a", "b", "c"),
    "m": ("global", "rank", "microbatch"),
    "rho_schedule": ("constant", "warmup", "lr"),
    "derivative": ("exact", "difference"),
    "divergence": ("previous", "initial"),
    "sign": (1.0, -1.0),
}


def unknown(kind: str, value: object, known: Any) -> UserError:
    """The error for a name that is not in `known`, with the nearest one."""
    near = difflib.get_close_matches(str(value), list(map(str, known)), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}{hint} (known: {', '.join(map(str, known))})")


def resolve(
    name: str, rho: float | None, given: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Method, float, dict[str, Any]]:
    """The method (with ascent and path as given), its radius and its complete options. Raises UserError for what cannot work."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    named = METHODS[name]
    given = dict(given)
    ascent, path = given.pop("ascent", named.ascent), given.pop("path", named.path)
    if ascent not in ASCENT_OPTIONS:
        raise unknown("ascent", ascent, [a for a in ASCENT_OPTIONS if a])
    if path not in PATH_OPTIONS:
        raise unknown("path", path, PATH_OPTIONS)
    if (ascent is None) != (path == "plain"):
        raise UserError(f"method {name!r} with ascent={ascent!r} and path={path!r}: give both, or start from another method")
    method = dataclasses.replace(named, ascent=ascent, path=path)

    options = {**GENERAL_OPTIONS, **ASCENT_OPTIONS[ascent], **PATH_OPTIONS[path], **MIX_OPTIONS[method.mix]}
    options |= {key: value for key, value in named.options.items() if key in options}
    for key in given:
        if key not in options:
            raise unknown(f"option of {name}", key, options)
    options |= given
    for key, choices in CHOICES.items():
        if key in options and options[key] not in choices:
            raise unknown(f"value of {key}", options[key], choices)

    rho = named.rho if rho is None else rho
    if not isinstance(rho, int | float) or not math.isfinite(rho) or rho < 0:
        raise UserError(f"rho={rho!r}: the radius is a finite number >= 0 (0 is the plain gradient)")
    for group in optimizer.param_groups:
        if not math.isfinite(group.get("rho", 0.0)) or group.get("rho", 0.0) < 0:
            raise UserError(f"rho={group['rho']!r} in a parameter group: the radius is a finite number >= 0")
    if not isinstance(options["interval"], int) or options["interval"] < 1:
        raise UserError(f"interval={options['interval']!r}: the perturbed pass comes every interval >= 1 steps")
    if options["rho_schedule"] == "warmup" and options["warmup_steps"] < 1:
        raise UserError('rho_schedule="warmup" needs warmup_steps >= 1')
    if options["lr_max"] is None:
        options["lr_max"] = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    if options["rho_schedule"] == "lr" and options["lr_max"] <= options["lr_min"]:
        raise UserError(
            f'rho_schedule="lr": lr_max={options["lr_max"]:g} is not above lr_min={options["lr_min"]:g}; give lr_max=, the highest '
            "learning rate of the run (by default the optimizer's when SharpnessAware is made)"
        )
    if options.get("step", 1.0) <= 0:
        raise UserError(f"step={options['step']!r}: the displacement of the finite difference is > 0")
    if not 0.0 <= options.get("gamma", 0.0) < 1.0:
        raise UserError(f"gamma={options['gamma']!r}: the weight of the sharpness is in [0, 1)")
    if options.get("k", 1) < 1:
        raise UserError(f"k={options['k']!r}: looksam takes its perturbed pass every k >= 1 steps")
    _check_combination(method, options, model, optimizer)
    return method, float(rho), options


def _check_combination(method: Method, options: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer).__name__
    if method.ascent == "adam" and not has_second_moment(optimizer):
        raise UserError(
            f"ascent 'adam' reads the optimizer's second moment, which {kind} does not keep: use AdamW, or ascent='gradient'"
        )
    if method.ascent == "momentum":
        has_momentum = "betas" in optimizer.defaults or optimizer.defaults.get("momentum", 0) > 0
        if not has_momentum:
            raise UserError(f"ascent 'momentum' reads the optimizer's first moment, which {kind} does not keep as set up")
        if options.get("preconditioned") and not has_second_moment(optimizer):
            raise UserError(f"preconditioned=True reads the optimizer's second moment, which {kind} does not keep")
    if options["m"] != "global":
        if method.mix is not None or method.path == "penalty":
            raise UserError(f"m={options['m']!r} does not combine with {method.mix or 'penalty'}, which mixes both gradients")
        if options["m"] == "microbatch" and method.ascent == "fisher":
            raise UserError('m="microbatch" does not combine with ascent "fisher", whose F is the step\'s gradient squared')
        if is_sharded(model):
            raise UserError(f'm={options["m"]!r} needs whole parameters on each rank (DDP); with sharded ones use m="global"')
    many = is_sharded(model) or bool(replicas(model))
    if method.path == "penalty" and options["derivative"] == "exact" and many:
        raise UserError('exact second derivatives need the model in one process: use derivative="difference"')
    if method.mix == "looksam" and options["interval"] != 1:
        raise UserError("looksam has its own interval: set k, not interval")
