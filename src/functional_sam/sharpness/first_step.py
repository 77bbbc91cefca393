"""What is looked at in the first step, mostly: whether forward and loss_fn are what later steps take them for."""

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sam.derivatives import nodes
from functional_sam.errors import UserError
from functional_sam.losses import require_no_mean
from functional_sam.sharpness.randomness import random_state, set_random_state
from functional_sam.vectors import by_place, local


def tensors_of(inputs: Any, place: str = "inputs") -> Iterator[tuple[str, Tensor]]:
    """Yield (place, tensor) for every tensor in nested dictionaries, lists, tuples and dataclasses."""
    if isinstance(inputs, Tensor):
        yield place, inputs
    elif isinstance(inputs, Mapping):
        for key in inputs:
            yield from tensors_of(inputs[key], f"{place}[{key!r}]")
    elif isinstance(inputs, list | tuple):
        for i, part in enumerate(inputs):
            yield from tensors_of(part, f"{place}[{i}]")
    elif dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        for field in dataclasses.fields(inputs):
            yield from tensors_of(getattr(inputs, field.name, None), f"{place}.{field.name}")


def require_repeatable(batches: Sequence[tuple[Any, Any]]) -> None:
    """Raise UserError for inputs that are there for one pass only; warn of those whose own gradients would add up over passes."""
    for inputs, _ in batches:
        if isinstance(inputs, Iterator):
            raise UserError(f"inputs are a {type(inputs).__name__}, which the first pass uses up: give list(inputs)")
        for place, x in tensors_of(inputs):
            if x.grad_fn is not None:
                raise UserError(
                    f"{place} has a graph of its own (an encoder outside the model?), which each pass of the step would go "
                    "through: detach() it, or let forward compute it from parameters of the model"
                )
            if x.requires_grad:
                _warn_of_sum(f"{place} requires a gradient, and its .grad")


Others = list["weakref.ref[Tensor]"]


def others(model: torch.nn.Module, z: Tensor, inputs: Any) -> Others:
    """Return what a backward from z gives a gradient besides the model's parameters and the inputs."""
    known = {id(x) for x in (*model.parameters(), *(x for _, x in tensors_of(inputs)))}
    return [weakref.ref(leaf) for leaf in _leaves(z) if id(leaf) not in known]


def warn_of_others(found: Others) -> None:
    """Warn of those that outlive the step: what forward makes for itself (points to differentiate by) is gone by now."""
    alive = {id(there): there for seen in found if (there := seen()) is not None}
    for leaf in list(alive.values())[:1]:
        _warn_of_sum(
            f"forward reads tensors that require a gradient and are no parameters of the model ({len(alive)}, the first of shape "
            f"{list(leaf.shape)}), whose .grad"
        )


def _warn_of_sum(what: str) -> None:
    warnings.warn(
        f"{what} adds up over all passes of a step, at different weights: do not train by it. Make it a parameter of the model and "
        "the optimizer, or a constant (detach(), requires_grad_(False), torch.no_grad())",
        stacklevel=4,
    )


def versions(inputs: Any, targets: Any) -> dict[str, tuple[int, int]]:
    """Return place -> (which tensor is there, how often it has been written to)."""
    each = (*tensors_of(inputs), *tensors_of(targets, "targets"))
    return {place: (id(t), 0 if t.is_inference() else t._version) for place, t in each}


def require_same_batch(before: dict[str, tuple[int, int]], inputs: Any, targets: Any) -> None:
    """Raise UserError when forward has changed its inputs, or loss_fn its targets: the second pass would be another function."""
    after = versions(inputs, targets)
    changed = [place for place in before if after.get(place) != before[place]] + sorted(after.keys() - before)
    if changed:
        who = "loss_fn" if changed[0].startswith("targets") else "forward"
        raise UserError(f"{who} changed {changed[0]}, which every pass of the step is given: let it work on a copy")


def require_same_weights(before: list[int], params: Iterable[Tensor]) -> None:
    """Raise UserError when a backward has written to the weights."""
    if before != [p._version for p in params]:
        raise UserError(
            "the weights changed during a backward: an optimizer that steps inside of it (by hooks on gradients) leaves nothing to "
            "perturb. Let the optimizer step after SharpnessAware.backward"
        )


Fingerprint = tuple[float, ...]
Fingerprints = list[tuple[str, Tensor, Fingerprint]]


def fingerprints(model: torch.nn.Module, trained: Container[Tensor]) -> Fingerprints:
    """Return numbers that change when a parameter that is not trained has other values, or the same at other places.

    They are of the values, so that a table that forward writes its own values to (max_norm) has not moved; where there is no norm
    (integers), how often it was written to.
    """
    return [(name, p, _fingerprint(p)) for name, p in model.named_parameters() if p not in trained]


def _fingerprint(p: Tensor) -> Fingerprint:
    part = local(p.detach())
    if part.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) and part.layout == torch.strided:
        size = torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
        return float(size), float(by_place(part))
    return (0.0 if p.is_inference() else float(p._version),)


def require_unmoved(before: Fingerprints) -> None:
    """Raise UserError when a forward has moved parameters that nobody trains: every pass would move them once more."""
    for name, p, then in before:
        now = _fingerprint(p)
        if any(not (a == b or (math.isnan(a) and math.isnan(b))) for a, b in zip(now, then, strict=True)):
            raise UserError(
                f"{name}, which the optimizer does not train, moved during backward: forward writes to it (a momentum encoder of "
                "MoCo, BYOL, DINO), and does so in every pass. Move it outside, once a step, after optimizer.step()"
            )


def require_graph(z: Tensor) -> None:
    """Raise UserError for what forward has returned without a way back to the parameters. Asked in every step, at no cost."""
    if not z.requires_grad:
        raise UserError("forward returned logits that depend on no parameter: it runs under no_grad, or detaches them")


def require_gradients(params: Iterable[Tensor]) -> None:
    """Raise UserError when a pass left no gradient at all, or a sparse one."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        raise UserError(
            "no parameter has a gradient after a pass: forward detaches its output from the parameters, or a hook clears .grad "
            "(an optimizer that steps inside of backward)"
        )
    if any(g.layout != torch.strided for g in grads):
        raise UserError("sparse gradients are not supported: build the embedding with sparse=False")


def require_of_logits(model: torch.nn.Module, z: Tensor, total: Tensor, count: Any) -> None:
    """Raise UserError for a gradient that no path would follow, of the loss past the logits or of the count by them.

    Asked in every step, at no cost.
    """
    if isinstance(count, Tensor) and count.requires_grad:
        raise UserError(
            "loss_fn returned a count that depends on the logits (focal weights): the gradient of a quotient by it is none that a "
            "path takes. Let the count depend on the targets alone (their number)"
        )
    if total.grad_fn is None:
        raise UserError("loss_fn returned a sum that does not depend on the logits: it detaches them, or runs under no_grad")
    own = next((leaf for leaf in _leaves(total) if leaf is not z), None)
    if own is None:
        return
    name = next((name for name, p in model.named_parameters() if p is own), None)
    if name is not None:
        raise UserError(
            f"loss_fn has a term that depends on the model's {name} other than by its logits, which no path gives a gradient: let "
            "forward append the term to its logits (torch.cat, a column more), and loss_fn take it off again"
        )
    raise UserError(
        f"loss_fn has parameters of its own (shape {list(own.shape)}), which no path gives a gradient: move them into the "
        "model, so that its logits depend on them (inputs may carry the targets along)"
    )


def require_sum(loss_fn: Callable[..., Any], z: Tensor, targets: Any, total: Tensor, count: Any) -> None:
    """Raise UserError for a loss_fn that returns a mean beside a count, or no number as its count."""
    if isinstance(count, Tensor) and count.numel() != 1:
        raise UserError(f"loss_fn returned a count of shape {list(count.shape)}: it is one number, of valid targets")
    state = random_state(z.device)
    require_no_mean(loss_fn, z, targets, total, count)
    set_random_state(state, z.device)


def _leaves(total: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a backward from `total` would give a gradient."""
    return (node.variable for node in nodes([total]) if hasattr(node, "variable"))
