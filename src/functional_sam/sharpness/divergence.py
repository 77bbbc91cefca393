"""How far predictions have moved: a divergence between the logits of two passes, chunk by chunk."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sam.head import logit_chunks
from functional_sam.losses import IGNORE
from functional_sam.sharpness.passes import Kept


@torch.no_grad()
def divergence(there: Kept, here: Kept, old: dict[Tensor, Tensor], targets: Any) -> tuple[Tensor, Tensor]:
    """Sum over rows with a target of KL(old || now), and their number; chunk by chunk, with a readout never N x V."""
    before, num_rows, num_classes = _rows(there, old)
    now, _, _ = _rows(here, {})
    total = torch.zeros((), dtype=torch.float64)
    classes = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == num_rows
    valid = (targets != IGNORE).reshape(-1) if classes else torch.ones(num_rows, dtype=torch.bool)
    for rows in logit_chunks(num_rows, num_classes):
        log_p, log_q = before(rows).log_softmax(-1), now(rows).log_softmax(-1)
        moved = (log_p.exp() * log_p.sub(log_q)).sum(-1)
        total = total.to(moved.device) + moved.where(valid[rows].to(moved.device), 0.0).double().sum()
    return total, valid.sum().to(total.device)


def _rows(memory: Kept, values: dict[Tensor, Tensor]) -> tuple[Callable[[slice], Tensor], int, int]:
    """(rows -> their logits in float32 at least, number of rows, of classes); `values` of the parameters at that point."""
    if memory.h is None:
        assert memory.logits is not None
        logits = memory.logits.flatten(0, -2)
        return lambda rows: _widened(logits[rows]), *logits.shape
    assert memory.weight is not None
    h = memory.h.flatten(0, -2)
    weight = values.get(memory.weight, memory.weight).detach().to(h.dtype)
    return lambda rows: _widened(h[rows] @ weight.T), len(h), len(weight)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
