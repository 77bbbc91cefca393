"""The share of the sharpness gradient on batches of an exact number of targets, which is what makes two tasks comparable.

The rows are those that the steps after the last would have had: the training distribution as a step meets it, and, within the
first epoch, never trained on.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from functional_sam.curvature import CurvatureProducts, HalvesSplit, split_in_halves
from functional_sam.curvature.ascent import direction
from functional_sam.curvature.linearization import Forward
from functional_sam.losses import IGNORE
from functional_sam.tasks import Batches, Task
from functional_sam.tasks.batches import Batch, cut, rows, runs, split
from functional_sam.vectors import dot, unit
from functional_sam.weights import is_sharded

Place = Callable[[Any], Any]  # of batches, on the device and in the dtype of the parameters
HALF_BUDGET = 2**30  # bytes of graphs kept of each half


def fresh_batches(task: Task, sizes: list[int]) -> list[Batches]:
    """For each size a batch of exactly so many valid targets, in parts of at most measure.micro_batch rows; no row is in two.

    A row that holds more than is left to take has the rest of its targets ignored, and the next batch begins with the next row.
    """
    stream = _next_rows(task)
    found = []
    for size in sizes:
        taken, missing = [], size
        while missing > 0:
            inputs, targets = next(stream)
            valid = (targets.reshape(-1) != IGNORE).nonzero()[:, 0]
            if len(valid) > missing:
                targets = targets.clone()
                targets.view(-1)[valid[missing:]] = IGNORE
            taken.append((inputs, targets))
            missing -= min(missing, len(valid))
        found.append([part for alike in runs(taken) for part in split(alike, task.config.measure.micro_batch)])
    return found


def shares_by_targets(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, place: Place, step: int, numbers: list[int]
) -> Iterator[dict[str, Any]]:
    """For each number of targets n and each of measure.temperatures what `_measured` finds; without autocast."""
    model.eval()
    try:
        for n in numbers:
            halves_and_other = [place(batches) for batches in fresh_batches(task, [n // 2, n - n // 2, n])]
            for temperature in task.config.measure.temperatures:
                yield {
                    "targets": n,
                    "temperature": temperature,
                    **_measured(model, optimizer, task, halves_and_other, step, temperature),
                }
    finally:
        model.train()


def _measured(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, batches: list[Batches], step: int, temperature: float
) -> dict[str, Any]:
    """Of a batch of two halves, with eps of the batch itself ("same") and of another of as many targets ("independent").

    By ascent and by where eps is from: share, norm_logit, norm_func, cosine on the whole batch; of "independent" the squares that
    leave sampling noise out too (functional_sam.curvature.halves). The gradient itself: "norm_gradient" of the whole batch,
    "square_gradient" the inner product of the halves', which is |E g|^2 without bias. "entropy", "norm": those of `logits_of`.
    The adam ascent from measure.adam_from on. temperature divides the logits, of the loss too.
    """
    sharded, measure = is_sharded(model), task.config.measure
    method = "difference" if sharded else "exact"
    forward = tempered(task.forward, temperature)
    first, second, other = (
        CurvatureProducts(
            model, part, task.loss_fn, forward, method=method, retain="auto" if kept else False, memory_budget=HALF_BUDGET
        )
        for part, kept in zip(batches, (True, True, False), strict=True)
    )
    (loss_1, g_1), (loss_2, g_2) = first.loss_and_gradient(), second.loss_and_gradient()
    own = [(a + b) / 2 for a, b in zip(g_1, g_2, strict=True)]
    gradients = {"same": own, "independent": other.gradient()}
    found: dict[str, Any] = {"loss": float(loss_1 + loss_2) / 2, **logits_of(model, task, batches[0] + batches[1], temperature)}
    found |= {"norm_gradient": math.sqrt(dot(own, own)), "square_gradient": dot(g_1, g_2)}
    if sharded:
        found["derivative"] = "difference"
    for ascent in measure.ascents:
        if ascent == "adam" and step < measure.adam_from:
            continue
        found[ascent] = {}
        for origin, g in gradients.items():
            eps = unit(direction(ascent, g, first.parameters, optimizer))
            found[ascent][origin] = _numbers(split_in_halves(first, second, eps), origin)
    return found


def _numbers(parts: HalvesSplit, origin: str) -> dict[str, float]:
    names = ["share", "norm_logit", "norm_func", "cosine"]
    names += ["square_logit", "square_func"] if origin == "independent" else []
    return {name: getattr(parts, name) for name in names}


def tempered(forward: Forward, temperature: float) -> Forward:
    """forward with all logits divided by `temperature`."""
    if temperature == 1.0:
        return forward

    def cooler(model: torch.nn.Module, inputs: Any, readout: Any = None) -> Any:
        if readout is None:
            return forward(model, inputs) / temperature
        return forward(model, inputs, readout=lambda h, weight: readout(h / temperature, weight))

    return cooler


def logits_of(model: torch.nn.Module, task: Task, batches: Batches, temperature: float = 1.0) -> dict[str, float]:
    """Means over targets: "norm" of the logits about their mean (a shift changes nothing), "entropy" of the softmax in nats."""
    norms, entropy, count = 0.0, 0.0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = task.forward(model, inputs).flatten(0, -2).float()[targets.flatten() != IGNORE] / temperature
            log_p = logits.log_softmax(-1)
            norms += float((logits - logits.mean(-1, keepdim=True)).norm(dim=-1).sum())
            entropy -= float((log_p.exp() * log_p).sum())
            count += len(logits)
    return {"norm": norms / count, "entropy": entropy / count}


def _next_rows(task: Task) -> Iterator[Batch]:
    """One by one the rows of the steps after the last."""
    for step in itertools.count(task.config.training.steps):
        batch = task.rows(step)
        yield from (cut(batch, i, i + 1) for i in range(rows(batch)))
