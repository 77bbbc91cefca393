"""The penalty path: the two parts of the sharpness gradient themselves, in the limit of a small radius, at an angle phi.

    gradient = g + c (cos(phi) delta_func + sin(phi) delta_logit),  delta_func = H_F eps,  delta_logit = H_G eps,  c = sqrt(2)

with eps the ascent's perturbation (radius included, as in the other paths). phi in degrees: 45 is g + H eps, the gradient of
L + rho |g| for the gradient ascent (penalty-SAM); 0 the functional part alone, 90 the logit part alone.
With a radius per parameter group, eps is scaled group by group (eps_p = rho_p d_p / size) and H acts on all of it: the limit of
what the sam path does with the same groups. A group of rho = 0 is not perturbed, and still gets its share of H eps.
With dose the correction, c (cos(phi) delta_func + sin(phi) delta_logit), is scaled to |correction| = dose |g|, whatever phi and rho
are; of rho only ratios between groups are left, and that it is not zero.
Source: Singh et al. 2025 for the sweep between the halves; c and the convention of phi are ours, theirs was not seen.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from functional_sam.derivatives import (
    differentiable_gradient,
    missing_derivatives_named,
    nodes,
    padding_watched,
    twice_differentiable,
    watch_kernel,
)
from functional_sam.errors import UserError
from functional_sam.head import differentiable_cotangent
from functional_sam.losses import cross_entropy
from functional_sam.sharpness.checks import require_no_hooks
from functional_sam.sharpness.methods import coefficients
from functional_sam.sharpness.passes import Kept, Passes
from functional_sam.sharpness.perturbation import AT_PERTURBED, Perturbation, Step, complete
from functional_sam.sharpness.trial import TOLERANCE
from functional_sam.vectors import norm
from functional_sam.weights import unwrapped


def penalty(passes: Passes, perturbation: Perturbation, step: Step, kept: list[Kept] | None) -> list[Kept]:
    """g + c (cos(phi) H_F eps + sin(phi) H_G eps), the correction at its dose; derivative "exact" or "difference"."""
    assert kept is not None
    if perturbation.options["derivative"] == "exact":
        exact(passes, perturbation, step, kept)
    else:
        difference(passes, perturbation, step, kept)
    return kept


def to_dose(correction: list[Tensor], g: Iterable[Tensor], dose: float | None) -> None:
    """Scale the correction to dose |g|, in place; without a dose, and where it is zero, it stays."""
    if dose is not None and (size := norm(correction, fast=True)):
        torch._foreach_mul_(correction, dose * norm(list(g), fast=True) / size)


# ---------------------------------------------------------------------- by finite difference


def difference(passes: Passes, perturbation: Perturbation, step: Step, kept: list[Kept]) -> None:
    """One more pass, at theta_h = theta + h eps/|eps|, h = `step`: both parts are differences of pulled-back cotangents.

        H_F eps ~ (J(theta_h)^T u(theta)   - J(theta)^T u(theta))   |eps| / h
        H eps   ~ (J(theta_h)^T u(theta_h) - J(theta)^T u(theta))   |eps| / h,  and H_G = H - H_F,

    so every phi is J(theta_h)^T (a u(theta) + b u(theta_h)) with b = c sin(phi), a = c cos(phi) - b: one forward and backward.
    The error is of order h, plus rounding of order (precision of a gradient) |g| |eps| / h. In float32 the default h = 1e-3 is
    about right; under bf16 autocast take h of the order of rho.
    """
    functional, logit = coefficients(perturbation.options["phi"])
    g = step.base
    if functional != logit and passes.watched is not None:
        _require_homogeneous(passes, perturbation, step, kept)
    factor = perturbation.length(step) / perturbation.options["step"]
    with perturbation.applied(step, 1.0 / factor) as theta, passes.buffers.later():
        if functional == logit:
            passes.gradient(step.batches, repeated=kept, sync=step.sync)
        else:
            passes.pull(step.batches, kept, theta, weight_kept=functional - logit, weight_here=logit, sync=step.sync)
    complete(passes.model, g)
    there = [p.grad for p in g if p.grad is not None]
    here = list(g.values())
    # The difference first: factor is large, and its terms nearly cancel.
    if functional == logit:
        torch._foreach_mul_(there, logit)
    torch._foreach_add_(there, here, alpha=-functional)
    torch._foreach_mul_(there, factor)
    to_dose(there, g.values(), perturbation.options["dose"])
    torch._foreach_add_(there, here)


def _require_homogeneous(passes: Passes, perturbation: Perturbation, step: Step, kept: list[Kept]) -> None:
    """Raise UserError unless a pull of -2 u at theta gives -2 g: the parts above are sums of multiples of u pulled back."""
    perturbation.start_gradients({})
    with passes.buffers.later():
        passes.pull(step.batches, kept, {}, weight_kept=-2.0, sync=step.sync)
    complete(passes.model, step.base)
    off = norm([p.grad + 2.0 * g for p, g in step.base.items() if p.grad is not None], fast=True)
    if off > 2.0 * TOLERANCE * norm(list(step.base.values()), fast=True):
        raise UserError(
            'derivative="difference" at phi other than 45 needs a backward that is linear in u, and here J^T (-2 u) is not -2 J^T '
            "u: a hook on a gradient that adds, clamps or normalises, an injected auxiliary loss, or a coarse keep_dtype. Take it "
            'out, or phi=45, which is the difference of two gradients as they are (or derivative="exact", without hooks)'
        )


# ---------------------------------------------------------------------- by second derivatives


def exact(passes: Passes, perturbation: Perturbation, step: Step, kept: list[Kept]) -> None:
    """By double backward, micro-batch by micro-batch; only the halves whose coefficient is not zero are computed.

    (J^T u) . eps is bilinear in u and eps: its derivative by theta with u held is H_F eps, by u it is J eps, and then
    H_G eps = J^T (d2L/dz2) J eps, with d2L/dz2 in closed form for cross-entropy. At 45 degrees u is not held, and one double
    backward gives H eps. Logits are whole here, and the graph of the gradient is kept: a few times the memory of a pass.
    """
    require_no_hooks(passes.model)  # again: there may be new ones
    _require_still(passes.model)
    perturbation.where = AT_PERTURBED
    functional, logit = coefficients(perturbation.options["phi"])
    params = list(step.base)
    total = [torch.zeros_like(p) for p in params]
    with torch.no_grad():
        eps = torch._foreach_mul(step.directions, [step.radii[p] / step.size for p in step.params])
    eps_of = dict(zip(step.params, eps, strict=True))
    step.directions = []
    reached: set[Tensor] = set()
    with _second_order(), passes.buffers.later():
        for i, (inputs, targets) in enumerate(step.batches):
            z = twice_differentiable(partial(_forward, passes, i, kept, inputs))
            if passes.watched is not None:
                for node in nodes([z]):
                    watch_kernel(node)
            if functional == logit:
                torch._foreach_add_(total, _hessian_eps(passes, z, targets, params, eps_of, reached), alpha=functional)
                continue
            for coefficient, part in _two_parts(passes, z, targets, params, eps_of, reached, functional, logit):
                torch._foreach_add_(total, part, alpha=coefficient)
    _require_reached(passes.model, step.base, reached)
    with torch.no_grad():
        to_dose(total, step.base.values(), perturbation.options["dose"])
        torch._foreach_add_(total, list(step.base.values()))
    for p, value in zip(params, total, strict=True):
        p.grad = value


def _require_still(model: torch.nn.Module) -> None:
    """Raise UserError for spectral_norm in training: its vectors follow the weights, and autograd takes them for constants."""
    for name, module in model.named_modules():
        parts = (module, *module._forward_pre_hooks.values())
        if module.training and any(type(part).__name__ in ("SpectralNorm", "_SpectralNorm") for part in parts):
            raise UserError(
                f"spectral_norm at {name} in training mode moves its singular vectors with the weights, which second derivatives "
                "take for constants: use derivative='difference', or eval() for this module"
            )


def _hessian_eps(
    passes: Passes, z: Tensor, targets: Tensor, params: Sequence[Tensor], eps_of: dict[Tensor, Tensor], reached: set[Tensor]
) -> list[Tensor]:
    """H eps of one micro-batch: u moves with theta."""
    u = _cotangent(passes, z, targets)
    (part,) = _derivative_along(_pull(z, params, u, reached), params, eps_of, [params])
    return part


def _two_parts(
    passes: Passes,
    z: Tensor,
    targets: Tensor,
    params: Sequence[Tensor],
    eps_of: dict[Tensor, Tensor],
    reached: set[Tensor],
    functional: float,
    logit: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield (functional, H_F eps) and (logit, H_G eps) of one micro-batch, each where its coefficient is not zero."""
    # u and its derivative are of one draw, and of one state of loss_fn.
    before, rewind = passes.random_state(), passes.buffers.loss_saved()
    u = _cotangent(passes, z.detach(), targets).detach().requires_grad_()
    by = [params if functional else [], [u] if logit else []]
    part, (*Jeps,) = _derivative_along(_pull(z, params, u, reached), params, eps_of, by, keep=bool(logit))
    if functional:
        yield functional, part
    if logit:
        leaf = z.detach().requires_grad_()
        passes.set_random_state(before)
        rewind()
        there = _cotangent(passes, leaf, targets)
        (BJeps,) = torch.autograd.grad(there, leaf, Jeps[0], allow_unused=True, materialize_grads=True)
        yield logit, list(torch.autograd.grad(z, params, BJeps, allow_unused=True, materialize_grads=True))


def _forward(passes: Passes, i: int, kept: Sequence[Kept], inputs: Any) -> Tensor:
    """The logits of micro-batch i with the random numbers of pass 1, however often it is called."""
    passes.rewind(i, kept)
    with padding_watched(passes.model):
        z: Tensor = passes.forward(passes.model, inputs)
    return z


def _pull(z: Tensor, params: Sequence[Tensor], u: Tensor, reached: set[Tensor]) -> list[Tensor]:
    """J^T u as a graph over theta and u; zeros for parameters that z does not see. Adds those that it does to `reached`."""
    grads = torch.autograd.grad(z, params, u, create_graph=True, allow_unused=True)
    reached.update(p for p, g in zip(params, grads, strict=True) if g is not None)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def _require_reached(model: torch.nn.Module, g: dict[Tensor, Tensor], reached: set[Tensor]) -> None:
    """Raise UserError where .backward() has found a gradient and autograd.grad nothing: its correction would be zero."""
    for name, p in unwrapped(model).named_parameters():
        if p in g and p not in reached and g[p].any():
            raise UserError(
                f"{name} has a gradient and no second derivative: it is in a block of activation checkpointing with "
                "use_reentrant=True, which autograd.grad does not enter. Use use_reentrant=False, or derivative='difference'"
            )


def _derivative_along(
    g: Sequence[Tensor],
    params: Sequence[Tensor],
    eps_of: dict[Tensor, Tensor],
    by: Sequence[Sequence[Tensor]],
    keep: bool = False,
) -> list[list[Tensor]]:
    """The derivative of g . eps by each list of tensors in `by`; g is a list as params is, and eps zero where it has no entry."""
    live = [(x, eps_of[p]) for x, p in zip(g, params, strict=True) if p in eps_of and x.requires_grad]
    leaves = [leaf for leaves in by for leaf in leaves]
    flat = list(
        torch.autograd.grad(
            [x for x, _ in live],
            leaves,
            [v for _, v in live],
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )
        if live
        else map(torch.zeros_like, leaves)
    )
    return [[flat.pop(0) for _ in leaves] for leaves in by]


def _cotangent(passes: Passes, z: Tensor, targets: Tensor) -> Tensor:
    """dL/dz as a differentiable function of z."""
    assert passes.divisor is not None
    if passes.loss_fn is cross_entropy and not targets.is_floating_point():
        return differentiable_cotangent(z, targets, passes.divisor)
    if not z.requires_grad:
        z = z.detach().requires_grad_()
    return differentiable_gradient(passes.loss_fn(z, targets)[0] / passes.divisor, z, watch=passes.watched is not None)


@contextlib.contextmanager
def _second_order() -> Iterator[None]:
    """Where a second derivative exists: eager, gradients on, plain attention."""
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with eager, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), missing_derivatives_named():
        yield
