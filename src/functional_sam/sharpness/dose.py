"""The dose of a step, |g_method - g| / |g|: how much of the gradient the method changed, in units in which methods compare."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from functional_sam.sharpness.passes import Batch, Passes
from functional_sam.vectors import norm


def plain_gradient(passes: Passes, batches: Sequence[Batch]) -> dict[Tensor, Tensor]:
    """Return g at the weights as they are, with the random numbers that the step itself will draw; leave an empty .grad.

    Nothing else is changed. Replicas are averaged here and not by DDP, whose own passes then go as they would have gone.
    """
    parameters = list(passes.model.parameters())
    for p in parameters:
        p.grad = None
    restore_buffers = passes.buffers.saved()
    try:
        with _random_state_kept(passes), _replicas_untouched(passes):
            passes.begin(batches)
            _, correction = passes.finish(passes.gradient(batches, sync=False))
        g: dict[Tensor, Tensor] = {p: p.grad.mul_(correction) for p in parameters if p.grad is not None}
    finally:
        restore_buffers()
        for p in parameters:
            p.grad = None
    if passes.replicas:
        for p in parameters:  # in this order on all ranks, a parameter that one of them did not use included
            if p.requires_grad:
                mine = g.setdefault(p, torch.zeros_like(p))
                dist.all_reduce(mine, group=passes.group)
                mine.div_(passes.world)
    return g


def dose_of_step(model: torch.nn.Module, g: dict[Tensor, Tensor], beside: dict[Tensor, Tensor]) -> float:
    """Return |.grad + beside - g| / |g|; nan where both are zero, inf where g is. Uses up g.

    beside: what the coming optimizer.step() will apply beside .grad, in its units (Mix.beside).
    """
    size, changes = norm(list(g.values())), []
    for p in model.parameters():
        parts = [part for part in (p.grad, beside.get(p)) if part is not None]
        if p in g:
            parts.append(g[p].neg_())
        if parts:
            changes.append(sum(parts[1:], parts[0]))
    change = norm(changes)
    return change / size if size else math.inf if change else math.nan


@contextlib.contextmanager
def _random_state_kept(passes: Passes) -> Iterator[None]:
    before = passes.random_state()
    try:
        yield
    finally:
        passes.set_random_state(before)


@contextlib.contextmanager
def _replicas_untouched(passes: Passes) -> Iterator[None]:
    """A forward without synchronization would spare the next one the broadcast of buffers that DDP does before it."""
    flags = [replica.require_forward_param_sync for replica in passes.replicas]
    try:
        yield
    finally:
        for replica, flag in zip(passes.replicas, flags, strict=True):
            replica.require_forward_param_sync = flag
