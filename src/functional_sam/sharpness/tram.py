"""TRAM: the radius is how far the predictions have moved, a divergence between the logits now and at earlier weights."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_sam.losses import IGNORE
from functional_sam.sharpness.head import chunk_rows
from functional_sam.sharpness.mix import Mix, named, unnamed

if TYPE_CHECKING:
    from functional_sam.sharpness.backward import SharpnessAware, Step
    from functional_sam.sharpness.passes import Kept


class TrustRegion(Mix):
    """Radius rho * D, D = mean over valid targets of KL(softmax(z_old) || softmax(z)) in nats, z the logits at theta.

    z_old are those at theta_{t-1}, the weights of the previous step (divergence="previous"), or at theta_0, those of the first
    one ("initial"); both forwards see the same dropout mask. In the first step D = 0: the plain gradient.
    Keeps a copy of the parameters and, through a step, the logits (with a readout: h, twice). One forward more than SAM.
    Rows without a target are left out where targets are class indices; for another loss_fn every row counts.
    Source: Sherborne et al. 2023, TRAM-theta_{t-1} and TRAM-theta_0; rho = 1 is their radius, its factor and the order of the
    two arguments of KL are ours to state.
    """

    compares_logits = True

    def __init__(self, sharpness: "SharpnessAware"):
        super().__init__(sharpness)
        self.old: dict[Tensor, Tensor] = {}
        self._there: list[Kept] = []

    def prepare(self, step: "Step", due: bool) -> bool:
        if not due or not self.old:
            return False
        passes = self.sharpness.passes
        with self.sharpness.moved(self.old, self._go_back), passes.buffers_kept():
            self._there = passes.cotangents(step.batches, logits=True)
        step.like = self._there
        return True

    def _go_back(self) -> None:
        for p, value in self.old.items():
            p.copy_(value)

    def measure(self, step: "Step", kept: "Sequence[Kept]") -> None:
        total, count = zip(
            *(
                _divergence(there, here, self.old, targets)
                for there, here, (_, targets) in zip(self._there, kept, step.batches, strict=True)
            ),
            strict=True,
        )
        divergence, valid = self.sharpness.passes.sum_over_ranks(torch.stack(total).sum(), torch.stack(count).sum())
        # Rounding may leave a divergence of about -1e-8 between logits that are the same.
        factor = max(divergence / max(valid, 1.0), 0.0)
        step.radii = {p: radius * factor for p, radius in step.radii.items()}
        self._there = []
        for memory in kept:
            memory.logits = None

    def done(self) -> None:
        if self.options["divergence"] == "previous" or not self.old:
            for p in self.sharpness.model.parameters():
                if p.requires_grad:
                    if p in self.old:
                        self.old[p].copy_(p.detach())
                    else:
                        self.old[p] = p.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"old": named(self.sharpness.model, self.old)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old = unnamed(self.sharpness.model, state["old"])


@torch.no_grad()
def _divergence(there: "Kept", here: "Kept", old: dict[Tensor, Tensor], targets: Any) -> tuple[Tensor, Tensor]:
    """Sum over rows with a target of KL(old || now), and their number; chunk by chunk, with a readout never N x V."""
    before, num_rows, num_classes = _rows(there, old)
    now, _, _ = _rows(here, {})
    total = torch.zeros((), dtype=torch.float64)
    classes = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == num_rows
    valid = (targets != IGNORE).reshape(-1) if classes else torch.ones(num_rows, dtype=torch.bool)
    for start in range(0, num_rows, chunk_rows(num_classes)):
        rows = slice(start, start + chunk_rows(num_classes))
        log_p, log_q = before(rows).log_softmax(-1), now(rows).log_softmax(-1)
        divergence = (log_p.exp() * log_p.sub(log_q)).sum(-1)
        total = total.to(divergence.device) + divergence.where(valid[rows].to(divergence.device), 0.0).double().sum()
    return total, valid.sum().to(total.device)


def _rows(memory: "Kept", values: dict[Tensor, Tensor]) -> tuple[Callable[[slice], Tensor], int, int]:
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
