"""One number that makes a model as confident as held-out data allow: the scale s of its logits, whose inverse is the temperature.

z logits, y targets, L(s) the mean cross-entropy of s z over all targets, p = softmax(s z):

    dL/ds = mean(p . z - z_y),   d2L/ds2 = mean(var_p(z)) >= 0,   so that L is convex and its minimum found by Newton's method.

With s z in the place of z, H_G is multiplied by about s^2 and H_F by about s: curvature that only follows from a model's confidence
is undone by it. Source: Guo et al. 2017 for the temperature.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from functional_sam.curvature.batches import Batch, Batches
from functional_sam.curvature.context import repeatable, require_evaluation, without_graph
from functional_sam.curvature.difference import required
from functional_sam.curvature.linearization import Forward
from functional_sam.derivatives import slow_attention
from functional_sam.losses import cross_entropy, require_logits

BOUNDS = (
    1 / 64,
    64.0,
)  # of s: without a minimum between them (all targets right, or logits worse than none) the nearer one is taken
MAX_STEPS = 60


@dataclass(frozen=True)
class Scale:
    """s, and the mean loss in nats of the logits as they are and of s times them."""

    scale: float
    loss: float
    fitted_loss: float
    num_passes: int  # over the data


def fit_scale(model: nn.Module, batches: Iterable[Batch], forward: Forward | None = None, tolerance: float = 1e-8) -> Scale:
    """The s that minimizes the loss of s z on the batches, in float64: Newton's steps, halving a bracket where they leave it.

    batches: (inputs, targets) of class indices, those below zero not counted. A logit of -inf is a class that is never expected.
    tolerance: of s, relative. Raises FloatingPointError for other logits that are not finite, UserError for no batch or target, for
    logits that are not the targets', and for a model in training mode whose passes differ or move its statistics.
    """
    require_evaluation(model)
    call = forward or (lambda module, inputs: module(inputs))
    pairs, (low, high), s = Batches(batches), BOUNDS, 1.0
    first_loss, num_passes = math.nan, 0
    while True:
        loss, slope, curvature = _derivatives(model, pairs, call, s)
        if not all(map(math.isfinite, (loss, slope, curvature))):
            raise FloatingPointError(f"the loss of {s:g} times the logits is {loss}: no temperature can be fitted")
        num_passes += 1
        first_loss = loss if num_passes == 1 else first_loss
        low, high = (s, high) if slope < 0 else (low, s)
        there = s - slope / curvature if curvature > 0 else math.nan
        if not low < there < high:
            there = math.sqrt(low * high)
        if abs(there - s) <= tolerance * s or num_passes == MAX_STEPS:
            return Scale(s, first_loss, loss, num_passes)
        s = there


def scaled(forward: Callable[..., Any], s: float) -> Callable[..., Any]:
    """The forward whose logits are s times those of `forward`; with a readout it hands over s h, for s z = (s h) W^T."""

    def times(model: nn.Module, inputs: Any, readout: Callable[..., Any] | None = None) -> Any:
        if readout is None:
            return s * forward(model, inputs)
        return forward(model, inputs, readout=lambda h, weight: readout(s * h, weight))

    return times


def _derivatives(model: nn.Module, batches: Batches, forward: Forward, s: float) -> tuple[float, float, float]:
    """L(s), L'(s), L''(s)."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    with torch.no_grad():
        for inputs, targets in batches:
            with repeatable(model, inputs, targets.device), slow_attention():
                z: Tensor = without_graph(partial(forward, model, inputs))
            require_logits(z, targets, cross_entropy)
            kept = targets.flatten() >= 0
            z = z.flatten(0, -2)[kept].double()
            wanted = targets.flatten()[kept].unsqueeze(-1)
            log_p = (s * z).log_softmax(-1)
            p = log_p.exp()
            expected = z.where(p > 0, 0.0)  # for 0 * -inf is nan
            mean = (p * expected).sum(-1, keepdim=True)
            parts = (-log_p.gather(-1, wanted), mean - z.gather(-1, wanted), p * (expected - mean).square())
            sums += torch.stack([part.sum() for part in parts]).cpu()
            count += len(z)
    loss, slope, curvature = (sums / required(count)).tolist()
    return loss, slope, curvature
