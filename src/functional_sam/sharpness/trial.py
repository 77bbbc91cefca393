"""One trial of a set-up: what a training run would never say is wrong, asked of one step and then undone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.sharpness.dose import dose_of_step, plain_gradient
from functional_sam.sharpness.passes import Batch
from functional_sam.sharpness.perturbation import gradients_of
from functional_sam.vectors import local
from functional_sam.weights import reshard

TOLERANCE = 1e-3  # of the gradient's norm: far above rounding (also of bf16, which repeats itself), far below another dropout mask
TINY = 1e-300  # a radius that moves no weight


def trial(sharpness: Any, batches: Sequence[Batch]) -> None:
    """Raise UserError unless passes repeat themselves, rho -> 0 gives g, and a step leaves the weights; changes nothing.

    sharpness: a SharpnessAware.
    """
    passes, perturbation, model = sharpness._passes, sharpness._perturbation, sharpness.model
    sharpness._seen.require_a_step(model)
    if sharpness._mix is not None:
        sharpness._mix.drop()
    reshard(model)  # after a forward of the caller's own the parameters of FSDP2 are not the ones that it trains
    before = _Before(sharpness)
    try:
        before.rewind()
        g, again = (plain_gradient(passes, batches) for _ in range(2))
        before.require_untouched()
        off = _distance(model, again, g, {})
        if off > TOLERANCE:
            raise UserError(
                f"two plain gradients at the same weights differ by {off:.1%}: forward or loss_fn is no function of its inputs and "
                "of the global generators (torch, numpy.random, random). A generator of its own, or a state that it changes, "
                "makes pass 2 another function than pass 1"
            )
        before.rewind()
        perturbation.steps, perturbation.fixed = 0, TINY
        sharpness.backward(batches)
        before.require_untouched()
        beside = sharpness._mix.beside() if sharpness._mix is not None else {}
        off = _distance(model, gradients_of(model), g, beside)
        if off > TOLERANCE:
            raise UserError(
                f"with rho -> 0 the method's gradient is {off:.1%} off the plain one: pass 2 sees another function than pass 1 "
                "at equal weights, for a state that forward both reads and changes and that is no buffer (an attribute)"
            )
        before.rewind()
        perturbation.steps, perturbation.fixed = 0, None
        sharpness.backward(batches)
        before.require_untouched()
    finally:
        before.restore()


class _Before:
    """What a trial changes, as it was before: weights, buffers, .grad, random numbers, and what `sharpness` carries."""

    def __init__(self, sharpness: Any) -> None:
        self.sharpness, self.model = sharpness, sharpness.model
        passes, seen = sharpness._passes, sharpness._seen
        self.theta = [(name, p, local(p.detach()).clone()) for name, p in self.model.named_parameters()]
        self.restore_buffers = passes.buffers.saved(always=True)
        self.state, self.rng = _copied(sharpness.state_dict()), passes.random_state()
        self.stepped, self.due, self.keep_u, self.dose = seen.steps, seen._due, passes.keep_u, sharpness.dose
        self.grads = {p: p.grad for p in self.model.parameters()}

    def rewind(self) -> None:
        """Put back weights, buffers and random numbers, and empty .grad."""
        for _, p, value in self.theta:
            if not torch.equal(local(p.detach()), value):
                local(p.detach()).copy_(value)
        self.restore_buffers()
        self.sharpness._passes.set_random_state(self.rng)
        for p in self.model.parameters():
            p.grad = None

    def require_untouched(self) -> None:
        """Raise UserError where a step of the optimizer was taken, or a weight has changed."""
        if self.sharpness._seen.steps != self.stepped:
            raise UserError("the optimizer stepped inside of backward: let it step once after each")
        moved = [name for name, p, value in self.theta if not torch.equal(local(p.detach()), value)]
        if moved:
            raise UserError(f"backward left {moved[0]} changed: something else writes to the weights during a step")

    def restore(self) -> None:
        """Put everything back."""
        sharpness = self.sharpness
        sharpness._perturbation.fixed, sharpness._passes.keep_u = None, self.keep_u
        sharpness._seen._due, sharpness.dose = self.due, self.dose
        self.rewind()
        for p, grad in self.grads.items():
            p.grad = grad
        sharpness.load_state_dict(self.state)


def _distance(model: torch.nn.Module, there: dict[Tensor, Tensor], g: dict[Tensor, Tensor], beside: dict[Tensor, Tensor]) -> float:
    """|there + beside - g| / |g|."""
    for p in model.parameters():
        p.grad = there.get(p)
    return dose_of_step(model, {p: value.clone() for p, value in g.items()}, beside)


def _copied(state: Any) -> Any:
    """A deep copy; copy.deepcopy fails on sharded tensors."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state
