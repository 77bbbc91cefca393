"""The divisor of a step: every loss and gradient of it is divided by the number of valid targets of all micro-batches and ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy, num_valid
from functional_sam.sharpness.randomness import Randomness
from functional_sam.vectors import whole
from functional_sam.weights import process_group

Batch = tuple[Any, Any]  # (inputs, targets), inputs any pytree
LossFn = Callable[[Tensor, Tensor], tuple[Tensor, Any]]


@dataclass
class Kept:
    """What a pass keeps of one micro-batch. u = dL/dz is kept whole, or as (h, weight), from which it is built again."""

    rng: Randomness  # before its forward
    loss: Tensor | None = None  # summed, over the divisor of the step
    count: Tensor | None = None  # of valid targets
    u: Tensor | None = None  # [..., V], over the divisor too; of a readout [targets, V] and not divided
    logits: Tensor | None = None
    h: Tensor | None = None  # the last hidden states [..., D]
    weight: Tensor | None = None  # of the head [V, D]
    returned: Tensor | None = None  # by a model whose readout returned `loss`


class Counting:
    """Turns the sums that loss_fn returns into means over a whole step, for one model and loss."""

    def __init__(self, model: torch.nn.Module, loss_fn: LossFn):
        self.model, self.loss_fn = model, loss_fn
        self.group = process_group(model)
        self.world = dist.get_world_size(self.group) if self.group is not None else 1
        self.fused = False  # whether a readout in the model returns the loss, in the step at work

    def start(self, batches: Sequence[Batch]) -> None:
        """Start a step: settle the divisor of its losses.

        Ranks are averaged, so the divisor is (valid targets of the step) / (number of ranks). The default loss_fn counts the
        targets beforehand; for another one the first micro-batch's count stands in and `finish` returns the correction.
        """
        self.num_batches = len(batches)
        default = self.loss_fn is cross_entropy
        if default:
            for _, targets in batches:
                if not isinstance(targets, Tensor):
                    raise UserError(
                        f"targets are a {type(targets).__name__}: the default loss takes a tensor of class indices; for one "
                        "without targets give loss_fn=, which gets them as they are"
                    )
                if not targets.is_floating_point() and targets.dtype != torch.int64:  # -100 in uint8 is 156, a class
                    raise UserError(f"targets are {targets.dtype}: class indices are int64, targets.long()")
        self.divisor: float | None = None
        self.recounted: Tensor | None = None  # by how much later passes have counted otherwise than the first
        if default:
            counts = torch.stack([num_valid(targets) for _, targets in batches])
            (total,) = self.sum_over_ranks(counts.sum())
            if total == 0:
                raise UserError(f"no valid target in this step's {len(batches)} micro-batches: all are {IGNORE} (ignored)")
            self.divisor = total / self.world

    def divisor_after(self, count: Tensor, earlier: Kept | None) -> float:
        """Return the divisor of the step. count: valid targets of the micro-batch at hand; earlier: it in an earlier pass."""
        if earlier is not None and earlier.count is not None and self.loss_fn is not cross_entropy:
            changed = (count.float() - earlier.count.float()).abs()
            self.recounted = changed if self.recounted is None else self.recounted + changed
        if self.divisor is None:
            # The same on all ranks, whose numbers of micro-batches may differ: their gradients are averaged with it in them.
            first, batches = self.sum_over_ranks(count, torch.tensor(self.num_batches, device=count.device))
            self.divisor = max(first / self.world, 1.0) * (batches / self.world)
        return self.divisor

    def finish(self, kept: Sequence[Kept]) -> tuple[Tensor, float]:
        """Return the mean loss over all valid targets of the step (all ranks), and the factor that makes .grad an exact mean."""
        assert self.divisor is not None
        losses = torch.stack([memory.loss for memory in kept if memory.loss is not None])
        recounted = [] if self.recounted is None else [self.recounted]
        loss, count, *changed = self.sum_over_ranks(losses.double().sum(), self._count(kept), *recounted)
        if changed and changed[0] > 1e-6 * count:
            raise UserError(
                "loss_fn counted other targets in a later pass, at other weights: its count depends on the logits (hard examples, "
                "focal weights), and a mean by it has derivatives that no path takes. Let the count depend on the targets alone"
            )
        if self.fused:
            returned = torch.stack([memory.returned for memory in kept if memory.returned is not None]).sum()
            self._require_untouched(float(losses.sum()), float(returned))
        correction = 1.0 if self.loss_fn is cross_entropy else self._correction(count)
        return losses.new_tensor(loss / self.world * correction), correction

    @staticmethod
    def _require_untouched(loss: float, returned: float) -> None:
        """Raise UserError where the model changed its readout's loss: the head's backward counts on a cotangent of 1.

        2 % are left to a model that casts its outputs to bf16.
        """
        if math.isfinite(loss) and not math.isclose(loss, returned, rel_tol=0.02):
            raise UserError(
                f"readout(h, weight) returned {loss:g} and the model {returned:g}: a model with has_readout returns what readout "
                'returned, and scales h or weight where it would scale logits (keep="cotangent" does without readout)'
            )

    def settle(self, kept: Sequence[Kept]) -> float:
        """Put the true divisor in the place of the one that stood in, after a pass over the whole step.

        What the pass kept is corrected here, its gradients by the caller, with the factor returned.
        """
        if self.loss_fn is cross_entropy:
            return 1.0
        (count,) = self.sum_over_ranks(self._count(kept))
        correction = self._correction(count)
        if correction != 1.0:
            self.divisor = count / self.world
            for memory in kept:
                for tensor in (memory.loss, memory.u):
                    if tensor is not None:
                        tensor.mul_(correction)
        return correction

    def _count(self, kept: Sequence[Kept]) -> Tensor:
        counts = [memory.count for memory in kept if memory.count is not None]
        return torch.stack(counts).sum() if counts else torch.tensor(0.0)

    def _correction(self, count: float) -> float:
        assert self.divisor is not None
        if not count > 0:
            raise UserError(f"loss_fn counted no valid target in this step (it says {count:g}): the number is > 0")
        correction = self.world * self.divisor / count
        return 1.0 if math.isclose(correction, 1.0, rel_tol=1e-12) else correction

    def sum_over_ranks(self, *values: Tensor) -> tuple[float, ...]:
        """Sum each value over the ranks, as floats; values of logits in shards (loss_parallel) are made whole first."""
        stacked = torch.stack([whole(value).double() for value in values])
        if self.group is not None:
            stacked = stacked.to(next(self.model.parameters()).device)
            dist.all_reduce(stacked, group=self.group)
        return tuple(stacked.tolist())
