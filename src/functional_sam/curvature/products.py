"""Products of the Hessian, and of its two halves, with a vector.

theta the parameters, z = F(theta) the logits, L the loss on them, u = dL/dz, J = dz/dtheta, v and w directions in the space of the
parameters and of the logits. V classes; a batch has any number of leading dimensions.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy

Batch = tuple[Any, Any]
LossFn = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
Forward = Callable[[nn.Module, Any], Tensor]
OfBatch = Callable[[Tensor, Any], tuple[list[Tensor], Tensor]]


class CurvatureProducts:
    """Gradient and curvature of the mean loss over `batches` at the present weights, in the dtype of the parameters.

    L = sum over batches of loss_fn(z, targets)[0] / sum over batches of loss_fn(z, targets)[1],  z = forward(model, inputs)

        hessian(v)       H v   = d/dtheta (g . v)
        gauss_newton(v)  H_G v = J^T (d2L/dz2) J v
        functional(v)    H_F v = d/dtheta (J^T u . v), u held fixed;  H = H_G + H_F

    batches: list of (inputs, targets). loss_fn(logits, targets) -> (sum over valid targets, their number). forward: `model(inputs)`
    unless given. parameters: those to differentiate by, the trainable ones unless given; v and every result are lists of tensors
    shaped like them. The weights, their .grad and the list v are left alone. Nothing is kept between two products. A model inside
    DDP is given without its wrapper; one sharded by FSDP2 cannot be given.

    The code runs eagerly, without autocast and with the plain attention, for the fused one has no second derivative.
    Raises UserError for no batch or no valid target, for parameters that are frozen or in half precision, for a v of other shapes,
    and, at each product, for active dropout or batch normalization in training mode, which would give each product another loss.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss_fn: LossFn = cross_entropy,
        forward: Forward | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.batches = list(batches)
        self.forward: Forward = forward or (lambda module, inputs: module(inputs))
        trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
        self.parameters = list(trainable if parameters is None else parameters)
        if not self.batches:
            raise UserError("curvature over no batch: give a list with at least one (inputs, targets)")
        if not self.parameters or not all(parameter.requires_grad for parameter in self.parameters):
            raise UserError("curvature by frozen parameters, or by none: set requires_grad on those that are meant")
        narrow = {str(p.dtype) for p in self.parameters if p.dtype not in (torch.float32, torch.float64)}
        if narrow:
            raise UserError(f"curvature of parameters in {', '.join(sorted(narrow))}: use model.float() or model.double()")

    def gradient(self) -> list[Tensor]:
        """g = J^T u."""
        return self.loss_and_gradient()[1]

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L, a scalar tensor, and g."""

        def of_batch(z: Tensor, targets: Any) -> tuple[list[Tensor], Tensor]:
            total, count = self.loss_fn(z, targets)
            return [total.detach(), *_pull_back([total], self.parameters)], count

        loss, *gradient = self._mean(of_batch, [self.parameters[0].new_zeros(()), *map(torch.zeros_like, self.parameters)])
        return loss, gradient

    def hessian(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H v, by double backward through the loss; it shares nothing with the two halves."""
        v = self._checked(v)

        def of_batch(z: Tensor, targets: Any) -> tuple[list[Tensor], Tensor]:
            total, count = self.loss_fn(z, targets)
            g = _pull_back([total], self.parameters, create_graph=True)
            return _pull_back(g, self.parameters, v), count

        return self._mean(of_batch)

    def gauss_newton(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H_G v = J^T (d2L/dz2) J v."""
        v = self._checked(v)

        def of_batch(z: Tensor, targets: Any) -> tuple[list[Tensor], Tensor]:
            u, g, count = self._linearize(z, targets)
            (Jv,) = _pull_back(g, [u], v, retain_graph=True)
            return _pull_back([z], self.parameters, [self._loss_curvature(z, targets, Jv)]), count

        return self._mean(of_batch)

    def functional(self, v: Sequence[Tensor]) -> list[Tensor]:
        """H_F v, the Hessian of (z . u) with u = dL/dz held fixed, times v."""
        v = self._checked(v)

        def of_batch(z: Tensor, targets: Any) -> tuple[list[Tensor], Tensor]:
            _, g, count = self._linearize(z, targets)
            return _pull_back(g, self.parameters, v), count

        return self._mean(of_batch)

    def split(self, v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(H_G v, H_F v) for little more than the price of H_F v: the same double backward gives H_F v and J v."""
        v = self._checked(v)

        def of_batch(z: Tensor, targets: Any) -> tuple[list[Tensor], Tensor]:
            u, g, count = self._linearize(z, targets)
            *functional, Jv = _pull_back(g, [*self.parameters, u], v, retain_graph=True)
            logit = _pull_back([z], self.parameters, [self._loss_curvature(z, targets, Jv)])
            return logit + functional, count

        both = self._mean(of_batch, [torch.zeros_like(parameter) for parameter in self.parameters * 2])
        return both[: len(self.parameters)], both[len(self.parameters) :]

    def _linearize(self, z: Tensor, targets: Any) -> tuple[Tensor, list[Tensor], Tensor]:
        """u as a leaf, J^T u as a graph over theta and u, and the number of valid targets.

        (J^T u) . v is bilinear in u and v: its derivative by u is J v, by theta it is H_F v. Forward mode would make H_G v alone
        about a tenth cheaper (measured on the decoder), but not every operation has it, and this graph serves both halves.
        """
        leaf = z.detach().requires_grad_()
        total, count = self.loss_fn(leaf, targets)
        u = _pull_back([total], [leaf])[0].requires_grad_()
        return u, _pull_back([z], self.parameters, [u], create_graph=True), count

    def _loss_curvature(self, z: Tensor, targets: Any, w: Tensor) -> Tensor:
        """(d2L/dz2) w; for cross-entropy in closed form, p * w - p (p . w), which keeps a tenth of what double backward does."""
        z = z.detach()
        if self.loss_fn is cross_entropy:
            p = z.softmax(-1)
            pw = p * w
            product = torch.addcmul(pw, p, pw.sum(-1, keepdim=True), value=-1)
            return product.masked_fill_((targets == IGNORE).unsqueeze(-1), 0)
        z.requires_grad_()
        u = _pull_back([self.loss_fn(z, targets)[0]], [z], create_graph=True)
        return _pull_back(u, [z], [w])[0]

    def _mean(self, of_batch: OfBatch, total: list[Tensor] | None = None) -> list[Tensor]:
        """Sum of of_batch(logits, targets) over all batches, divided by the number of valid targets in all of them."""
        # Into zeros and not into the first result, which autograd may have made a view of v itself.
        total = [torch.zeros_like(parameter) for parameter in self.parameters] if total is None else total
        count: Tensor | int = 0
        with _second_order(self.model, self.parameters[0].device.type):
            for inputs, targets in self.batches:
                part, valid = of_batch(self.forward(self.model, inputs), targets)
                torch._foreach_add_(total, part)
                count = count + valid
        if not count:
            raise UserError("curvature over no valid target: every target of every batch is ignored")
        torch._foreach_div_(total, float(count))
        return total

    def _checked(self, v: Sequence[Tensor]) -> list[Tensor]:
        given, wanted = [tuple(t.shape) for t in v], [tuple(p.shape) for p in self.parameters]
        if given != wanted:
            raise UserError(f"v has shapes {given}, the parameters {wanted}: give one tensor for each parameter")
        return [tensor.detach() for tensor in v]


def _pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """torch.autograd.grad with zeros where an output does not depend on an input (a model linear in theta has such)."""
    weights = [None] * len(outputs) if cotangents is None else cotangents
    live = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    if not live:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            [output for output, _ in live],
            list(inputs),
            [weight for _, weight in live],
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


@contextlib.contextmanager
def _second_order(model: nn.Module, device: str) -> Iterator[None]:
    """Eager, gradients on, autocast off, plain attention: where second derivatives exist. Refuses a model that is no function."""
    for name, module in model.named_modules():
        random = any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
        random = random or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        if module.training and (random or isinstance(module, _BatchNorm)):
            kind = type(module).__name__
            raise UserError(f"curvature of a model in training mode with an active {kind} ({name!r}): call model.eval() first")
    # Only compiled code needs telling, and torch._dynamo, slow to import, is there if any was.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with eager, torch.enable_grad(), torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield
