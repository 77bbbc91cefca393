"""One trial of a set-up: what a training run would never say is wrong, asked of one step and then undone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.sharpness.dose import dose_of_step, plain_gradient
from functional_sam.sharpness.passes import Batch
from functional_sam.sharpness.perturbation import gradients_of
from functional_sam.weights import reshard

TOLERANCE = 1e-3  # of the gradient's norm: far above rounding (also of bf16, which repeats itself), far below another dropout mask
TINY = 1e-300  # a radius that moves no weight


def trial(sharpness: Any, batches: Sequence[Batch]) -> None:
    """Raise UserError unless passes repeat themselves, rho -> 0 gives g, and a step leaves the weights; changes nothing.

    sharpness: a SharpnessAware.
    """
    passes, perturbation, seen, model = sharpness._passes, sharpness._perturbation, sharpness._seen, sharpness.model
    seen.require_a_step(model)
    if sharpness._mix is not None:
        sharpness._mix.drop()
    reshard(model)  # after a forward of the caller's own the parameters of FSDP2 are not the ones that it trains
    theta = [(name, p, _local(p).clone()) for name, p in model.named_parameters()]
    restore_buffers = passes.buffers.saved(always=True)
    state, rng, stepped = _copied(sharpness.state_dict()), passes.random_state(), seen.steps
    keep_u, dose, due = passes.keep_u, sharpness.dose, seen._due
    grads = {p: p.grad for p in model.parameters()}

    def undo() -> None:
        for _, p, value in theta:
            if not torch.equal(_local(p), value):
                _local(p).copy_(value)
        restore_buffers()
        passes.set_random_state(rng)
        for p in model.parameters():
            p.grad = None

    def require_untouched() -> None:
        if seen.steps != stepped:
            raise UserError("the optimizer stepped inside of backward: let it step once after each")
        moved = [name for name, p, value in theta if not torch.equal(_local(p), value)]
        if moved:
            raise UserError(f"backward left {moved[0]} changed: something else writes to the weights during a step")

    try:
        undo()
        g, again = (plain_gradient(passes, batches) for _ in range(2))
        require_untouched()
        off = _distance(model, again, g, {})
        if off > TOLERANCE:
            raise UserError(
                f"two plain gradients at the same weights differ by {off:.1%}: forward or loss_fn is no function of its inputs and "
                "of the global generators (torch, numpy.random, random). A generator of its own, or a state that it changes, "
                "makes pass 2 another function than pass 1"
            )
        undo()
        perturbation.steps, perturbation.fixed = 0, TINY
        sharpness.backward(batches)
        require_untouched()
        beside = sharpness._mix.beside() if sharpness._mix is not None else {}
        off = _distance(model, gradients_of(model), g, beside)
        if off > TOLERANCE:
            raise UserError(
                f"with rho -> 0 the method's gradient is {off:.1%} off the plain one: pass 2 sees another function than pass 1 "
                "at equal weights, for a state that forward both reads and changes and that is no buffer (an attribute)"
            )
        undo()
        perturbation.steps, perturbation.fixed = 0, None
        sharpness.backward(batches)
        require_untouched()
    finally:
        perturbation.fixed, passes.keep_u, sharpness.dose, seen._due = None, keep_u, dose, due
        undo()
        for p, grad in grads.items():
            p.grad = grad
        sharpness.load_state_dict(state)


def _distance(model: torch.nn.Module, there: dict[Tensor, Tensor], g: dict[Tensor, Tensor], beside: dict[Tensor, Tensor]) -> float:
    """|there + beside - g| / |g|."""
    for p in model.parameters():
        p.grad = there.get(p)
    return dose_of_step(model, {p: value.clone() for p, value in g.items()}, beside)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of it, in the same memory."""
    held: Any = tensor.detach()
    local: Tensor = held.to_local() if hasattr(held, "to_local") else held
    return local


def _copied(state: Any) -> Any:
    """copy.deepcopy, which fails on sharded tensors."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state
