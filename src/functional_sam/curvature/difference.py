"""Curvature products as central differences of gradients, for models that autograd cannot differentiate twice: sharded ones.

theta the parameters, z the logits, u = dL/dz, J = dz/dtheta, v a direction, h a step.

    H v    (g(theta + h v) - g(theta - h v)) / 2h
    H_F v  (J(theta + h v)^T u - J(theta - h v)^T u) / 2h, u that of theta
    H_G v  J(theta)^T (u(theta + h v) - u(theta - h v)) / 2h

Each with h and with h/2, and extrapolated: (4 D(h/2) - D(h)) / 3 lacks the error of order h^2 (Richardson).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from functional_sam.curvature.batches import Batch
from functional_sam.curvature.context import moved_along, repeatable, require_gradients_possible, second_order, without_graph
from functional_sam.curvature.linearization import require_dense, require_graph
from functional_sam.curvature.outer import LossFn, of_logits_alone, summed
from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy, require_logits
from functional_sam.vectors import length, norm
from functional_sam.weights import modules_of

Forward = Callable[..., Any]


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
        self.step = math.sqrt(math.sqrt(torch.finfo(parameters[0].dtype).eps))
        self.error, self.num_targets = 0.0, math.nan
        self._is_checked = False
        self._trained = set(model.parameters())
        self._outside = [module for module in modules_of(forward) if module not in set(model.modules())]
        self.meshes = list(dict.fromkeys(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")))
        if len(self.meshes) > 1:
            raise UserError("parameters on several device meshes: shard the whole model over one")

    def loss(self) -> Tensor:
        """L, without a gradient."""
        loss, count = 0.0, 0.0
        with second_order(self.model, self._device.type), torch.no_grad():
            for inputs, targets in self.batches:
                part, valid = summed(self.loss_fn, self._logits(inputs, graph=False), targets)
                loss, count = loss + float(part), count + float(valid)
        loss, count = self._over_ranks(loss, count)
        return self._scalar(loss / required(count))

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L and g."""
        total, loss, count = self._zeros(), 0.0, 0.0
        with self._gradients_apart():
            for inputs, targets in self.batches:
                part, valid = self._backward(inputs, targets)
                torch._foreach_add_(total, self._take())
                loss, count = loss + float(part), count + float(valid)
        loss, count = self._over_ranks(loss, count)
        return self._scalar(loss / required(count)), self._mean(total, count)

    def hessian(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H v."""

        def prepared(inputs: Any, targets: Any) -> tuple[Callable[[], Any], float]:
            with torch.no_grad():
                valid = float(summed(self.loss_fn, self._logits(inputs, graph=False), targets)[1])
            return lambda: self._backward(inputs, targets), valid

        return self._difference(v, prepared)

    def functional(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H_F v."""

        def prepared(inputs: Any, targets: Any) -> tuple[Callable[[], Any], float]:
            u, valid = self._cotangent(inputs, targets)
            return lambda: torch.autograd.backward(self._checked(inputs, targets), u), valid

        return self._difference(v, prepared)

    def gauss_newton(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H_G v."""
        h, total, count, size, gap = self._step(v), self._zeros(), 0.0, 0.0, 0.0
        with self._gradients_apart():
            for inputs, targets in self.batches:
                coarse, fine = (self._change_of_u(v, step, inputs, targets) for step in (h, h / 2))
                gap += float((fine - coarse).norm(dtype=torch.float64)) ** 2
                du = fine.mul_(4 / 3).sub_(coarse, alpha=1 / 3)
                size += float(du.norm(dtype=torch.float64)) ** 2
                z = self._checked(inputs, targets)
                count += float(summed(self.loss_fn, z.detach(), targets)[1])
                torch.autograd.backward(z, du)
                torch._foreach_add_(total, self._take())
        count, size, gap = self._over_ranks(count, size, gap)
        self.error = math.sqrt(gap / size) / 3 if size else 0.0
        return self._mean(total, count)

    def _difference(self, v: Sequence[Tensor], prepared: Callable[[Any, Any], tuple[Callable[[], Any], float]]) -> list[Tensor]:
        """The derivative along v of the gradient that `prepared` of a batch leaves in .grad, wherever the weights are then."""
        h, coarse, fine, count = self._step(v), self._zeros(), self._zeros(), 0.0
        with self._gradients_apart():
            for inputs, targets in self.batches:
                run, valid = prepared(inputs, targets)
                for total, step in ((coarse, h), (fine, h / 2)):
                    for signed in (step, -step):
                        with moved_along(self.model, self.parameters, v, signed):
                            run()
                        torch._foreach_add_(total, self._take(), alpha=1 / (2 * signed))
                count += valid
        (count,) = self._over_ranks(count)
        gap = [a - b for a, b in zip(fine, coarse, strict=True)]
        torch._foreach_add_(fine, gap, alpha=1 / 3)
        size = norm(fine)
        self.error = norm(gap) / size / 3 if size else 0.0
        return self._mean(fine, count)

    def _step(self, v: Sequence[Tensor]) -> float:
        return self.step * (norm([p.detach() for p in self.parameters]) or 1.0) / length(v, "v")

    @contextmanager
    def _gradients_apart(self) -> Iterator[None]:
        """Second-order surroundings, .grad empty inside and at the end what it was."""
        require_gradients_possible(self.model, self.parameters, self._trained)
        everything = list(self.model.parameters())
        before = [p.grad for p in everything]
        for p in everything:
            p.grad = None
        try:
            with second_order(self.model, self._device.type):
                yield
        finally:
            for p, g in zip(everything, before, strict=True):
                p.grad = g

    def _logits(self, inputs: Any, graph: bool = True) -> Tensor:
        call = partial(self.forward, self.model, inputs)
        with repeatable(self.model, inputs, self._device, self._outside):
            z: Any = call() if graph else without_graph(call)
        require_dense(z)
        if graph and isinstance(z, Tensor):
            require_graph(z.requires_grad)
        return z  # type: ignore[no-any-return]

    def _checked(self, inputs: Any, targets: Any) -> Tensor:
        """The logits with their graph, of which the first ones show whether the loss is one of them alone."""
        z = self._logits(inputs)
        if not self._is_checked and self.loss_fn is not cross_entropy:
            of_logits_alone(self.loss_fn, z, targets, self._trained)
            self._is_checked = True
        return z

    def _backward(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """The loss and its number of targets; leaves the gradient in .grad."""
        z = self._logits(inputs)
        require_logits(z, targets, self.loss_fn)
        leaf = z.detach().requires_grad_()  # so that nothing but the model's parameters gets a gradient
        total, valid = of_logits_alone(self.loss_fn, leaf, targets, self._trained)
        if total.requires_grad:
            (u,) = torch.autograd.grad(total, leaf)
            torch.autograd.backward(z, u)
        return total.detach(), valid

    def _cotangent(self, inputs: Any, targets: Any) -> tuple[Tensor, float]:
        """u and the number of valid targets, at the weights as they are."""
        z = self._logits(inputs, graph=False)
        require_logits(z, targets, self.loss_fn)
        leaf = z.detach().requires_grad_()
        total, valid = of_logits_alone(self.loss_fn, leaf, targets, self._trained)
        (u,) = torch.autograd.grad(total, leaf) if total.requires_grad else (torch.zeros_like(leaf),)
        return u.contiguous(), float(valid)  # of a sum it is one number, expanded

    def _change_of_u(self, v: Sequence[Tensor], step: float, inputs: Any, targets: Any) -> Tensor:
        """(u(theta + step v) - u(theta - step v)) / 2 step."""
        with moved_along(self.model, self.parameters, v, step):
            ahead, _ = self._cotangent(inputs, targets)
        with moved_along(self.model, self.parameters, v, -step):
            return ahead.sub_(self._cotangent(inputs, targets)[0]).div_(2 * step)

    def _take(self) -> list[Tensor]:
        """The gradients in .grad, which is empty then."""
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for p in self.model.parameters():
            p.grad = None
        return taken

    def _mean(self, total: list[Tensor], count: float) -> list[Tensor]:
        # FSDP2 has averaged over the ranks what is a sum.
        world = self.meshes[0].size() if self.meshes else 1
        self.num_targets = required(count)
        torch._foreach_mul_(total, world / self.num_targets)
        return total

    def _over_ranks(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        for mesh in self.meshes:
            for i in range(mesh.ndim):
                dist.all_reduce(sums, group=mesh.get_group(i))
        return [float(number) for number in sums]

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.parameters]

    def _scalar(self, number: float) -> Tensor:
        return torch.tensor(number, dtype=self.parameters[0].dtype, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].device


def required(count: float) -> float:
    """The number of valid targets, which cannot be zero."""
    if not count:
        raise UserError("curvature over no valid target: every target of every batch is ignored")
    return count
