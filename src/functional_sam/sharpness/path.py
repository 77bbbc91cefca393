"""Which derivative to take at theta' = theta + eps. With J = dz/dtheta, u = dL/dz:

    sam         J(theta')^T u(theta')     (g_sam - g) / rho         -> H eps
    functional  J(theta')^T u(theta)      (g_functional - g) / rho  -> H_F eps
    logit       J(theta)^T  u(theta')     (g_logit - g) / rho       -> H_G eps
    penalty     those limits themselves, added to g (penalty.py)

Each takes what pass 1 at theta kept (None where the ascent needed no pass 1) and returns what was kept of the unperturbed
weights; the gradient is in .grad. Source: Foret et al. 2020 (sam); Singh et al. 2025 (functional); the third is the other half.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from functional_sam.sharpness.passes import Kept
from functional_sam.sharpness.penalty import needs_u, penalty

if TYPE_CHECKING:
    from functional_sam.sharpness.backward import SharpnessAware, Step

Path = Callable[["SharpnessAware", "Step", list[Kept] | None], list[Kept]]


def sam(sharpness: "SharpnessAware", step: "Step", kept: list[Kept] | None) -> list[Kept]:
    """J(theta')^T u(theta'): the gradient at theta'."""
    passes = sharpness.passes
    with sharpness.perturbed(step), passes.buffers_kept(kept is not None):
        there = passes.gradient(step.batches, like=kept, sync=step.sync)
    return kept or there


def functional(sharpness: "SharpnessAware", step: "Step", kept: list[Kept] | None) -> list[Kept]:
    """J(theta')^T u(theta): the Jacobian moves, the cotangent stays. Without a pass 1, u(theta) costs one forward."""
    passes = sharpness.passes
    kept = kept or passes.cotangents(step.batches)
    with sharpness.perturbed(step) as originals, passes.buffers_kept():
        passes.pull(step.batches, kept, originals, sync=step.sync)
    return kept


def logit(sharpness: "SharpnessAware", step: "Step", kept: list[Kept] | None) -> list[Kept]:
    """J(theta)^T u(theta'): the cotangent moves, the Jacobian stays. A forward at theta', a backward at theta."""
    passes = sharpness.passes
    with sharpness.perturbed(step), passes.buffers_kept():
        there = passes.cotangents(step.batches, like=kept, copy_weight=True)
    with passes.buffers_kept(kept is not None):
        passes.pull(step.batches, there, {}, sync=step.sync)
    return kept or there


PATHS: dict[str, Path] = {"sam": sam, "functional": functional, "logit": logit, "penalty": penalty}


def needs_cotangent(path: str, options: dict[str, Any]) -> bool:
    """Whether pass 1 must keep u(theta)."""
    return path == "functional" or (path == "penalty" and needs_u(options))
