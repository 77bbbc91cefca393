"""What flatness may buy that the loss does not show: the final weights rounded, jittered, and trained on other data."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from functional_sam.data.order import seed_of
from functional_sam.tasks import Task
from functional_sam.tasks.batches import placed

BITS = (8, 6, 5, 4, 3)
NOISE = (0.02, 0.05, 0.1, 0.2)  # of a tensor's root mean square
DRAWS = 2
STEPS = (25, 50, 100, 200)  # of training on the other data, after which both losses are measured
LR = 1e-3  # there, constant: the same for every method, whatever it was tuned to


def robustness(model: torch.nn.Module, task: Task, device: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Losses on the validation split of weights near the final ones, which are left as they were: the content of robustness.json.

    "rounding": bits -> loss; "noise": size -> mean loss over DRAWS; "elsewhere", where there is other data: steps of AdamW on it
    -> the loss here and there. A loss that is not finite is null.
    """

    def loss(of: Task = task) -> float | None:
        model.eval()
        value = of.evaluate(model, "validation")["loss"]
        model.train()
        return value if math.isfinite(value) else None

    result: dict[str, Any] = {"loss": loss(), "rounding": {}, "noise": {}}
    for bits in BITS:
        with changed(model, functools.partial(rounded, bits=bits)):
            result["rounding"][str(bits)] = loss()
    for size in NOISE:
        losses = []
        for draw in range(DRAWS):
            with changed(model, functools.partial(jittered, size=size, draw=draw)):
                losses.append(loss())
        result["noise"][f"{size:g}"] = None if None in losses else sum(value for value in losses if value is not None) / DRAWS
    other = task.elsewhere()
    if other is not None:
        with changed(model, lambda p, index: p):
            result["elsewhere"] = {"0": {"here": result["loss"], "there": loss(other)}}
            for step in _trained(model, other, device, dtype):
                if step in STEPS:
                    result["elsewhere"][str(step)] = {"here": loss(), "there": loss(other)}
    return result


def rounded(p: Tensor, index: int, bits: int) -> Tensor:
    """The nearest of 2^(bits - 1) - 1 levels on each side of zero, evenly spaced up to each row's largest weight; vectors stay.

    Round to nearest with a scale for each output, the usual baseline of weight quantization.
    """
    if p.ndim < 2:
        return p
    rows = p.flatten(1)
    levels = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny) / levels
    found: Tensor = (rows / scale).round() * scale
    return found.view_as(p)


def jittered(p: Tensor, index: int, size: float, draw: int) -> Tensor:
    """p plus Gaussian noise of `size` times its root mean square, the same draw for every method."""
    generator = torch.Generator().manual_seed(seed_of("noise", draw, index))
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return p + size * p.square().mean().sqrt() * noise.to(p)


@contextmanager
def changed(model: torch.nn.Module, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Every trainable parameter replaced by change(parameter, index); put back at the end, as are the buffers."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.no_grad():
            for index, p in enumerate(parameters):
                p.copy_(change(p, index))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
                p.grad = None
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)


def _trained(model: torch.nn.Module, task: Task, device: Any, dtype: torch.dtype) -> Iterator[int]:
    """The number of steps done, after each: plain AdamW at a constant rate."""
    settings = task.config.optimizer
    optimizer = torch.optim.AdamW(
        task.groups(model), lr=LR, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.0
    )
    for step in range(max(STEPS)):
        torch.manual_seed(seed_of("elsewhere", task.config.training.data_seed, step))
        sums, counts = zip(
            *(task.loss_fn(task.forward(model, inputs), targets) for inputs, targets in placed(task.batch(step), device, dtype)),
            strict=True,
        )
        (sum(sums) / sum(counts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1
