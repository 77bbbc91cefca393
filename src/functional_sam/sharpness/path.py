"""Which derivative to take at theta' = theta + eps. With J = dz/dtheta, u = dL/dz:

    sam         J(theta')^T u(theta')  = g + H eps    + O(|eps|^2)
    functional  J(theta')^T u(theta)   = g + H_F eps  + O(|eps|^2)
    logit       J(theta)^T  u(theta')  = g + H_G eps  + O(|eps|^2)
    penalty     g plus those first-order terms themselves (penalty.py)

Each takes what pass 1 at theta kept (None where the ascent needed no pass 1), leaves the gradient in .grad, and returns what was
kept at theta, or at theta' where theta was not visited.
Source: Foret et al. 2020 (sam); Singh et al. 2025 (functional); the third is the other part.
"""

from collections.abc import Callable

from functional_sam.sharpness.passes import Kept, Passes
from functional_sam.sharpness.penalty import penalty
from functional_sam.sharpness.perturbation import Perturbation, Step

Path = Callable[[Passes, Perturbation, Step, list[Kept] | None], list[Kept]]


def sam(passes: Passes, perturbation: Perturbation, step: Step, kept: list[Kept] | None) -> list[Kept]:
    """J(theta')^T u(theta'): the gradient at theta'."""
    with perturbation.applied(step), passes.buffers.later(kept is not None, kept is not None):
        there = passes.gradient(step.batches, repeated=kept, sync=step.sync)
    return kept or there


def functional(passes: Passes, perturbation: Perturbation, step: Step, kept: list[Kept] | None) -> list[Kept]:
    """J(theta')^T u(theta): the Jacobian moves, the cotangent stays. Without a pass 1, u(theta) costs one forward."""
    kept = kept or passes.cotangents(step.batches)
    with perturbation.applied(step) as theta, passes.buffers.later():
        passes.pull(step.batches, kept, theta, sync=step.sync)
    return kept


def logit(passes: Passes, perturbation: Perturbation, step: Step, kept: list[Kept] | None) -> list[Kept]:
    """J(theta)^T u(theta'): the cotangent moves, the Jacobian stays. A forward at theta', a backward at theta."""
    with perturbation.applied(step), passes.buffers.later(loss=kept is not None):
        there = passes.cotangents(step.batches, repeated=kept, copy_weight=True)
    with passes.buffers.later(kept is not None):
        passes.pull(step.batches, there, {}, sync=step.sync)
    return kept or there


PATHS: dict[str, Path] = {"sam": sam, "functional": functional, "logit": logit, "penalty": penalty}
