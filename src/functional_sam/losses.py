"""Losses that say how many targets they summed over, loss_fn(logits, targets) -> (sum over valid targets, number of them), and
whether logits and targets are what they take them for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from functional_sam.errors import UserError
from functional_sam.weights import buffers_saved, modules_of

IGNORE = -100
FEW = 2**22  # logits that a loss is tried on in the first step, to see whether it sums


def num_valid(targets: Tensor) -> Tensor:
    """Targets that cross_entropy counts: class indices that are not IGNORE, or rows of probabilities."""
    if targets.is_floating_point():
        return torch.tensor(targets.numel() // max(targets.shape[-1], 1), device=targets.device)
    return (targets != IGNORE).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over the targets that are not IGNORE, and their number.

    logits [..., V], targets [...] of class indices, or [..., V] of probabilities (soft labels), of which every row counts. The
    softmax runs in float32 at least.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if targets.is_floating_point():
        soft = targets.flatten(0, -2).to(logits.dtype)
        return F.cross_entropy(logits.flatten(0, -2), soft, reduction="sum"), num_valid(targets)
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, num_valid(targets)


def smoothed(smoothing: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """cross_entropy against (1 - smoothing) onehot + smoothing / V; cross_entropy itself, which has passes of its own, for 0."""
    if not smoothing:
        return cross_entropy

    def loss_fn(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        flat, wanted = logits.flatten(0, -2), targets.flatten()
        total = F.cross_entropy(flat, wanted, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
        return total, (targets != IGNORE).sum()

    return loss_fn


def require_logits(z: Any, targets: Any, loss_fn: Callable[..., Any]) -> None:
    """Raise UserError unless forward returned a tensor, and for the default loss one whose rows are the targets'."""
    if not isinstance(z, Tensor):
        hint = "forward=lambda model, inputs: model(inputs).logits" if hasattr(z, "logits") else "let forward return logits alone"
        raise UserError(f"forward returned a {type(z).__name__}, not a tensor of logits: {hint}")
    if loss_fn is cross_entropy:
        require_rows(z.shape[:-1], z.shape, targets)


def require_rows(rows: torch.Size, logits: torch.Size, targets: Any) -> None:
    """Raise UserError unless targets are one class a row of logits [..., V], or probabilities [..., V].

    A flat tensor of as many rows, and dimensions of size 1, are understood.
    """
    if not isinstance(targets, Tensor):
        raise UserError(f"targets is a {type(targets).__name__}, cross-entropy needs a tensor: for another loss give loss_fn=")
    given = f"logits {list(logits)} and targets {list(targets.shape)}"
    if len(logits) < 2 or logits[-1] == 1:
        raise UserError(f"{given}: cross-entropy needs logits [..., V] of two classes or more; for another loss give loss_fn=")
    if targets.is_floating_point():
        if targets.shape != logits:
            raise UserError(
                f"{given} of {targets.dtype}: targets are class indices [...], or probabilities of the logits' own shape [..., V]; "
                "for another loss give loss_fn="
            )
        return
    if targets.dtype == torch.uint8:  # -100 in uint8 is 156, a class
        raise UserError(f"targets are {targets.dtype}: class indices are int64, targets.long()")
    one, other = ([n for n in shape if n != 1] for shape in (rows, targets.shape))
    if math.prod(one) == math.prod(other) and (one == other or len(one) <= 1 or len(other) <= 1):
        return
    if len(logits) > 2 and targets.shape == logits[:1] + logits[2:]:
        raise UserError(f"{given}: classes are the LAST dimension here; forward=lambda model, inputs: model(inputs).movedim(1, -1)")
    raise UserError(f"{given}: logits [..., V] need targets [...], one class index a row (-100 is ignored)")


def require_no_mean(loss_fn: Callable[..., Any], z: Tensor, targets: Any, total: Tensor, count: Any) -> None:
    """Raise UserError for a loss_fn that returned a mean beside a count. It is called again, with some rows twice, and may draw.

    With every row twice a sum is twice as large and a mean, of whatever weights, the same, while the count doubles. What is no
    loss of rows (its targets do not go along with them) is left alone, and so is a count of 1, beside which a mean is a sum.
    """
    if loss_fn is cross_entropy or z.ndim == 0 or not z.numel():
        return
    z, along = z.detach(), 0
    if isinstance(targets, Tensor):  # of one row of a text, its positions
        both = list(zip(z.shape, targets.shape, strict=False))
        along = next((place for place, (a, b) in enumerate(both) if a != 1 or b != 1), 0)
    alike = _Rows(along, z.shape[along], min(z.shape[along], max(2, FEW * z.shape[along] // z.numel())))
    once, twice = alike.taken(targets), alike.taken(targets, twice=True)
    if along == z.ndim - 1 > 0 or (targets is not None and not alike.found):
        return
    restore = buffers_saved(modules_of(loss_fn), always=True)  # it may count its calls
    try:
        with torch.no_grad():
            a, m = map(float, loss_fn(alike.taken(z), once))
            b, n = map(float, loss_fn(alike.taken(z, twice=True), twice))
    except Exception:
        return  # not a loss of rows
    finally:
        restore()
    if 0 < m != 1 and math.isclose(n, 2 * m, rel_tol=1e-6) and a and math.isfinite(a) and math.isclose(a, b, rel_tol=1e-4):
        raise UserError(
            f"loss_fn returned a mean ({float(total.detach()):.4g}) and the count {float(count):g}: return the SUM over valid "
            'targets and their number (reduction="sum"), or gradients are that much too small'
        )


@dataclass
class _Rows:
    """The first `few` of so many rows, of what has them, in nested dictionaries, lists and tuples."""

    dimension: int
    rows: int
    few: int
    found: bool = False

    def taken(self, tree: Any, twice: bool = False) -> Any:
        """A copy, which loss_fn may write to."""
        if isinstance(tree, Tensor):
            if tree.ndim <= self.dimension or tree.shape[self.dimension] != self.rows:
                return tree.clone()
            self.found = True
            return torch.cat([tree.narrow(self.dimension, 0, self.few)] * (1 + twice), self.dimension)
        if isinstance(tree, Mapping):
            return {key: self.taken(part, twice) for key, part in tree.items()}
        if isinstance(tree, list | tuple):
            parts = [self.taken(part, twice) for part in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
        return tree
