"""Curvature products as central differences of gradients, for models that autograd cannot differentiate twice: sharded ones.

theta the parameters, z the logits, u = dL/dz, J = dz/dtheta, v a direction, h a step.

    H v    (g(theta + h v) - g(theta - h v)) / 2h
    H_F v  (J(theta + h v)^T u - J(theta - h v)^T u) / 2h, u that of theta
    H_G v  J(theta)^T (u(theta + h v) - u(theta - h v)) / 2h

Each with h and with h/2, and extrapolated: (4 D(h/2) - D(h)) / 3 lacks the error of order h^2 (Richardson).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from functional_sam.curvature.batches import Batch
from functional_sam.curvature.context import drawing_nothing, second_order
from functional_sam.curvature.outer import LossFn
from functional_sam.curvature.vectors import length, norm
from functional_sam.errors import UserError

Forward = Callable[..., Any]
Pass = Callable[[Any, Any], None]  # one batch's (inputs, targets); it leaves a gradient in .grad


class Differences:
    """The products of CurvatureProducts for method="difference".

    A model sharded by FSDP2 is called on all ranks alike, each with as many batches of its own; the loss is the mean over the valid
    targets of all. v and the results are sharded as the parameters are. Costs in gradients: H v 4, H_F v 4 and a forward, H_G v 1
    and 4 forwards. It holds the weights a second time and, for the halves, the logits of a batch. The weights are moved and put
    back by copy, bit for bit; .grad is left alone.

    error: of the last product, |D(h/2) - D(h)| / 3 as a part of the result's size (of H_G v: in u, before J^T). That is the error
    of D(h/2), truncation and rounding together; what is returned, extrapolated, is better unless rounding is the larger.
    step: |h v| / |theta|, the fourth root of the machine epsilon, 2e-2 in float32 and 1e-4 in float64.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn, forward: Forward, parameters: list[nn.Parameter]
    ) -> None:
        self.model, self.batches, self.loss_fn, self.forward, self.parameters = model, batches, loss_fn, forward, parameters
        self.step = float(torch.finfo(parameters[0].dtype).eps) ** 0.25
        self.error = 0.0
        self.meshes = list(dict.fromkeys(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")))
        if len(self.meshes) > 1:
            raise UserError("parameters on several device meshes: shard the whole model over one")

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L and g."""
        total, count = [torch.zeros_like(p) for p in self.parameters], 0.0
        loss = 0.0
        with self._passes():
            for inputs, targets in self.batches:
                summed, valid = self.loss_fn(self._logits(inputs), targets)
                torch.autograd.backward(summed)
                torch._foreach_add_(total, self._take())
                loss, count = loss + float(summed.detach()), count + float(valid)
        loss, count = self._over_ranks(loss, count)
        return torch.tensor(loss / self._some(count), dtype=total[0].dtype, device=total[0].device), self._mean(total, count)

    def hessian(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H v."""

        def pull(inputs: Any, targets: Any) -> tuple[float, Callable[[], None]]:
            def at_moved_weights() -> None:
                torch.autograd.backward(self.loss_fn(self._logits(inputs), targets)[0])

            return self._count(inputs, targets), at_moved_weights

        return self._extrapolated(v, pull)

    def functional(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H_F v."""

        def pull(inputs: Any, targets: Any) -> tuple[float, Callable[[], None]]:
            u, valid = self._cotangent(inputs, targets)

            def at_moved_weights() -> None:
                torch.autograd.backward(self._logits(inputs), u)

            return valid, at_moved_weights

        return self._extrapolated(v, pull)

    def gauss_newton(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H_G v."""
        total, count, size, gap = [torch.zeros_like(p) for p in self.parameters], 0.0, 0.0, 0.0
        with self._passes():
            h, start = self._settle(v)
            for inputs, targets in self.batches:
                coarse, fine = (
                    (self._cotangent_at(start, v, step, inputs, targets)[0])
                    .sub_(self._cotangent_at(start, v, -step, inputs, targets)[0])
                    .div_(2 * step)
                    for step in (h, h / 2)
                )
                self._move(start, v, 0.0)
                gap += float((fine - coarse).norm(dtype=torch.float64)) ** 2
                du = fine.mul_(4 / 3).sub_(coarse, alpha=1 / 3)
                size += float(du.norm(dtype=torch.float64)) ** 2
                z = self._logits(inputs)
                valid = self.loss_fn(z.detach(), targets)[1]
                torch.autograd.backward(z, du)
                torch._foreach_add_(total, self._take())
                count += float(valid)
        count, size, gap = self._over_ranks(count, size, gap)
        self.error = (gap / size) ** 0.5 / 3 if size else 0.0
        return self._mean(total, count)

    def _extrapolated(self, v: Sequence[Tensor], pull: Callable[[Any, Any], tuple[float, Callable[[], None]]]) -> list[Tensor]:
        coarse, fine = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        count = 0.0
        with self._passes():
            h, start = self._settle(v)
            for inputs, targets in self.batches:
                self._move(start, v, 0.0)
                valid, at_moved_weights = pull(inputs, targets)
                for total, step in ((coarse, h), (fine, h / 2)):
                    for signed in (step, -step):
                        self._move(start, v, signed)
                        at_moved_weights()
                        torch._foreach_add_(total, self._take(), alpha=1 / (2 * signed))
                count += valid
            self._move(start, v, 0.0)
        (count,) = self._over_ranks(count)
        gap = [a - b for a, b in zip(fine, coarse, strict=True)]
        torch._foreach_add_(fine, gap, alpha=1 / 3)
        size = norm(fine)
        self.error = norm(gap) / size / 3 if size else 0.0
        return self._mean(fine, count)

    def _settle(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """h, and a copy of the weights."""
        start = [p.detach().clone() for p in self.parameters]
        return self.step * (norm(start) or 1.0) / length(v, "v"), start

    def _move(self, start: list[Tensor], v: Sequence[Tensor], step: float) -> None:
        """theta = start + step v; at 0 the very bits of start."""
        self._reshard()
        with torch.no_grad():
            for p, p_0, v_i in zip(self.parameters, start, v, strict=True):
                p.copy_(p_0 if step == 0 else p_0 + v_i * step)

    def _reshard(self) -> None:
        """Drop the whole parameters that FSDP2 has gathered: they are of weights that change now."""
        if self.meshes:
            for module in self.model.modules():
                reshard: Any = getattr(module, "reshard", None)
                if reshard is not None:
                    reshard()

    @contextmanager
    def _passes(self) -> Iterator[None]:
        """Second-order surroundings; weights and .grad at the end are what they were."""
        everything = list(self.model.parameters())
        before, start = [p.grad for p in everything], [p.detach().clone() for p in self.parameters]
        for p in everything:
            p.grad = None
        try:
            with second_order(self.model, self.parameters[0].device.type):
                yield
        finally:
            self._reshard()
            with torch.no_grad():
                for p, p_0 in zip(self.parameters, start, strict=True):
                    p.copy_(p_0)
            for p, g in zip(everything, before, strict=True):
                p.grad = g

    def _logits(self, inputs: Any) -> Tensor:
        with drawing_nothing(self.parameters[0].device):
            z: Tensor = self.forward(self.model, inputs)
        return z

    def _count(self, inputs: Any, targets: Any) -> float:
        with torch.no_grad():
            return float(self.loss_fn(self._logits(inputs), targets)[1])

    def _cotangent(self, inputs: Any, targets: Any) -> tuple[Tensor, float]:
        """u and the number of valid targets, at the weights as they are."""
        with torch.no_grad():
            z = self._logits(inputs)
        leaf = z.detach().requires_grad_()
        total, valid = self.loss_fn(leaf, targets)
        (u,) = torch.autograd.grad(total, leaf)
        return u, float(valid)

    def _cotangent_at(
        self, start: list[Tensor], v: Sequence[Tensor], step: float, inputs: Any, targets: Any
    ) -> tuple[Tensor, float]:
        self._move(start, v, step)
        return self._cotangent(inputs, targets)

    def _take(self) -> list[Tensor]:
        """The gradients in .grad, which is empty then."""
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for p in self.model.parameters():
            p.grad = None
        return taken

    def _mean(self, total: list[Tensor], count: float) -> list[Tensor]:
        # FSDP2 has averaged over the ranks what is a sum.
        world = self.meshes[0].size() if self.meshes else 1
        torch._foreach_mul_(total, world / self._some(count))
        return total

    def _over_ranks(self, *numbers: float) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.parameters[0].device)
        for mesh in self.meshes:
            for i in range(mesh.ndim):
                dist.all_reduce(summed, group=mesh.get_group(i))
        return [float(number) for number in summed]

    @staticmethod
    def _some(count: float) -> float:
        if not count:
            raise UserError("curvature over no valid target: every target of every batch is ignored")
        return count
