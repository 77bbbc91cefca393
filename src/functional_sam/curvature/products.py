"""Products of the Hessian, and of its two parts, with a vector.

theta the parameters, z = F(theta) the logits, L the loss on them, u = dL/dz, J = dz/dtheta, v a direction in the space of the
parameters. A batch has any number of leading dimensions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from functional_sam.curvature.batches import Batch, Batches
from functional_sam.curvature.buffers import parts, version
from functional_sam.curvature.context import (
    moved_along,
    one_at_a_time,
    repeatable,
    require_gradients_possible,
    require_no_hooks,
    second_order,
    without_graph,
)
from functional_sam.curvature.difference import Differences, required
from functional_sam.curvature.functions import FastSecondDerivatives
from functional_sam.curvature.geometry import AdamGeometry, adam_scales
from functional_sam.curvature.groups import Selection, select
from functional_sam.curvature.linearization import ChangedInPlace, Forward, Linearization
from functional_sam.curvature.operators import Names, Operator, Vector
from functional_sam.curvature.outer import LossFn, OnHead, by_classes, summed, sums
from functional_sam.derivatives import Derivatives, DifferentiatesItself
from functional_sam.errors import UserError
from functional_sam.head import reads_out
from functional_sam.losses import cross_entropy
from functional_sam.vectors import by_place
from functional_sam.weights import is_sharded, modules_of

BatchProduct = Callable[[Linearization, bool], list[Tensor]]

MEMORY_BUDGET = 2 * 2**30


class CurvatureProducts:
    """Gradient and curvature of the mean loss over `batches` at the present weights, in the dtype of the parameters.

    L = sum over batches of loss_fn(z, targets)[0] / sum over batches of loss_fn(z, targets)[1],  z = forward(model, inputs)

        hessian @ v       H v   = d/dtheta (g . v)
        gauss_newton @ v  H_G v = J^T (d2L/dz2) J v
        functional @ v    H_F v = d/dtheta (J^T u . v), u held fixed;  H = H_G + H_F
        split(v)          (H_G v, H_F v) for less than the price of both

    batches: a list of (inputs, targets), or something that gives the same ones at every pass. loss_fn(logits, targets) -> (sum over
    valid targets, their number). forward: `model(inputs)` unless given. parameters: those to differentiate by, the trainable ones
    unless given: a kind ("embedding", "attention", "mlp", "norm", "head"), a pattern of names ("blocks.0.*"), parameters, or a list
    of any of these; the products are then of that block of the matrix. v is a list of tensors shaped like them or a dictionary
    by their names, and the result is what v is; hessian(v) is hessian @ v. The weights, their .grad and v are left alone.

    retain: the graph of a batch serves many products. "auto" keeps the graphs of as many batches as fit memory_budget (bytes,
    2 GiB unless given), True those of all, False none, and the batch at hand has one in any case. Amortized over many products and
    in units of one gradient, H_G v costs about 1.2, H_F v 1.5, H v 1.9, split 2.3, and 1.3 more without a graph kept (as measured:
    README.md). Graphs of weights that have changed since are made anew. `release()` frees them; they go with this object anyway.

    A model with has_readout (functional_sam.models) under the default loss_fn, class indices as targets and a forward that takes
    readout=, if one is given, never makes logits beyond a chunk of rows, but for their softmax where that fits the budget. Any
    other holds them three times, as its plain gradient does.

    method="difference" takes central differences of gradients instead; that is the way for a model sharded by FSDP2. Its costs,
    its parallel meaning and its error estimate (`error`) are those of functional_sam.curvature.difference.Differences.

    The code runs eagerly, without autocast and with an attention of its own, for the fused one has no second derivative. A model
    inside DDP is given without its wrapper. Threads take turns: their products are right, and one at a time.
    Targets of the default loss are one class index a row of logits [..., V], or probabilities [..., V].
    Raises UserError for no batch or no valid target; for logits that are not the targets'; for a loss_fn that returns a mean, alone
    or beside a count, or one that depends on more than the logits; for parameters that are frozen, in half precision or not found;
    for a v of other shapes; where there are no gradients (inference_mode, a forward that detaches); for sharded parameters,
    reentrant checkpointing or hooks on gradients with method="exact"; and, at each product, for a model or batches that are not the
    same at every pass: active dropout, batch normalization in training mode, random numbers drawn in forward, a buffer that forward
    changes (it is put back), a shuffled loader, inputs or targets that are changed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss_fn: LossFn = cross_entropy,
        forward: Forward | None = None,
        parameters: Selection = None,
        *,
        method: str = "exact",
        retain: bool | str = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        self.model, self.loss_fn = model, sums(loss_fn)
        self.batches = Batches(batches)
        self.readout = reads_out(model, forward, loss_fn)
        self.forward: Forward = forward or (lambda module, inputs, **readout: module(inputs, **readout))
        self._outside = [module for module in modules_of(forward) if module not in set(model.modules())]
        self.parameters = select(model, parameters)
        self._names = Names(model, self.parameters)
        self.retain, self.memory_budget = retain, memory_budget
        if retain not in ("auto", True, False):
            raise UserError(f"retain={retain!r}: choose 'auto', True or False")
        narrow = {str(p.dtype) for p in self.parameters if p.dtype not in (torch.float32, torch.float64)}
        if narrow:
            raise UserError(f"curvature of parameters in {', '.join(sorted(narrow))}: use model.float() or model.double()")
        if method not in ("exact", "difference"):
            raise UserError(f"method={method!r}: choose 'exact' or 'difference'")
        if is_sharded(model) and method == "exact":
            raise UserError("exact products of a sharded model do not exist: use method='difference'")
        self._differences: Differences | None = None
        if method == "difference":
            self._differences = Differences(model, self.batches, self.loss_fn, self.forward, self.parameters)
        self._kept: dict[int, Linearization] = {}
        self._trained = set(model.parameters())
        self._stamp: list[Any] = []
        self._held: list[Tensor] = []  # those of the batches when it was made
        self._full = False
        self._num_targets = math.nan
        self._third = False  # whether the forward takes derivatives itself, as far as is known

    @property
    def error(self) -> float:
        """Estimated relative error of the last product of method="difference"; 0 for exact products, whose error is rounding."""
        return self._differences.error if self._differences else 0.0

    @property
    def num_targets(self) -> float:
        """Valid targets of all batches, as loss_fn counts them; nan before the first product or gradient."""
        return self._differences.num_targets if self._differences else self._num_targets

    def release(self) -> None:
        """Free the kept graphs."""
        self._kept.clear()
        self._held = []
        self._full = False

    def loss(self) -> Tensor:
        """Return L, a scalar tensor, by one forward without a graph."""
        if self._differences:
            return self._differences.loss()
        total, count = 0.0, 0.0
        with second_order(self.model, self._device.type), torch.no_grad():
            for inputs, targets in self.batches:
                with repeatable(self.model, inputs, self._device, self._outside):
                    call = partial(self.forward, self.model, inputs)
                    if self.readout and by_classes(self.loss_fn, targets):
                        h, weight = without_graph(partial(call, readout=lambda h, weight: (h, weight)))
                        head = OnHead(h, weight, targets, by_h=False, by_weight=False, keep_bytes=0)
                        part, valid = head.loss, head.count
                    else:
                        part, valid = summed(self.loss_fn, without_graph(call), targets)
                total, count = total + float(part), count + float(valid)
        return self.parameters[0].new_tensor(total / required(count))

    def loss_along(self, v: Vector, rho: float) -> Tensor:
        """Return L(theta + rho v). The weights are moved and put back by copy, bit for bit."""
        with one_at_a_time, moved_along(self.model, self.parameters, self._names.listed(v), rho):
            return self.loss()

    def gradient(self) -> list[Tensor]:
        """Return g = J^T u, a list shaped like the parameters."""
        return self.loss_and_gradient()[1]

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """Return L, a scalar tensor, and g; from the graphs where they are kept."""
        if self._differences:
            return self._differences.loss_and_gradient()
        loss, *gradient = self._mean(
            lambda batch, _: [batch.loss, *batch.gradient()],
            [torch.zeros((), dtype=torch.float64, device=self._device), *map(torch.zeros_like, self.parameters)],
        )
        return loss.to(self.parameters[0].dtype), [g_i.detach() for g_i in gradient]

    @property
    def hessian(self) -> Operator:
        """H: hessian(v) or hessian @ v is H v."""
        return Operator(self._hessian, self._names)

    @property
    def gauss_newton(self) -> Operator:
        """H_G: gauss_newton(v) or gauss_newton @ v is J^T (d2L/dz2) J v."""
        return Operator(self._gauss_newton, self._names)

    @property
    def functional(self) -> Operator:
        """H_F: functional(v) or functional @ v is the Hessian of (z . u) with u = dL/dz held fixed, times v."""
        return Operator(self._functional, self._names)

    @overload
    def split(self, v: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    @overload
    def split(self, v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]: ...

    def split(self, v: Any) -> Any:
        """Return (H_G v, H_F v), for less than both: the backward that gives H_F v gives J v on its way."""
        listed, number = self._names.listed(v), len(self.parameters)
        if self._differences:
            both = [*self._differences.gauss_newton(listed), *self._differences.functional(listed)]
        else:
            zeros = [torch.zeros_like(p) for p in self.parameters * 2]
            both = self._mean(lambda batch, keep: batch.split(listed, keep), zeros)
        return self._names.as_given(both[:number], v), self._names.as_given(both[number:], v)

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Key a list shaped like the parameters, such as `gradient()`, by their names."""
        return dict(zip(self._names.names, tensors, strict=True))

    def _hessian(self, v: list[Tensor]) -> list[Tensor]:
        if self._differences:
            return self._differences.hessian(v)
        return self._mean(lambda batch, keep: batch.hessian(v, keep))

    def _gauss_newton(self, v: list[Tensor]) -> list[Tensor]:
        if self._differences:
            return self._differences.gauss_newton(v)
        return self._mean(lambda batch, keep: batch.gauss_newton(v, keep))

    def _functional(self, v: list[Tensor]) -> list[Tensor]:
        if self._differences:
            return self._differences.functional(v)
        return self._mean(lambda batch, keep: batch.functional(v, keep))

    def in_adam_geometry(
        self, optimizer: torch.optim.Optimizer | None = None, second_moments: Sequence[Tensor] | None = None, eps: float = 1e-8
    ) -> AdamGeometry:
        """The same products of P^1/2 A P^1/2, P = 1 / (sqrt(v_hat) + eps): the curvature in the geometry of Adam.

        v_hat and eps from the state of an optimizer (Adam's family, RMSprop, Adagrad), or v_hat given as second_moments,
        bias-corrected, shaped like the parameters. See AdamGeometry. Raises UserError for both or neither, and for an optimizer
        without second moments or that lacks a parameter.
        """
        return AdamGeometry(self, self._names, adam_scales(self.parameters, optimizer, second_moments, eps))

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].device

    def _mean(self, product: BatchProduct, total: list[Tensor] | None = None) -> list[Tensor]:
        """Sum product(batch, whether its graph is to be used again) over all batches, and divide by their valid targets.

        total: zeros to sum into, shaped like the product; by default like the parameters.
        """
        # Into zeros and not into the first result, which autograd may have made a view of v itself.
        total = [torch.zeros_like(parameter) for parameter in self.parameters] if total is None else total
        count = 0.0
        require_gradients_possible(self.model, self.parameters, self._trained)
        require_no_hooks(self._names.names, self.parameters)
        with second_order(self.model, self._device.type):
            self._drop_stale()
            # With all graphs at hand the batches themselves are not read again.
            stream = ((None, None) for _ in self._kept) if len(self._kept) == len(self.batches) else self.batches
            for i, (inputs, targets) in enumerate(stream):
                batch = self._kept.get(i) or self._linearized(i, inputs, targets)
                torch._foreach_add_(total, product(batch, i in self._kept))
                count += float(batch.count)
                del batch
        self._num_targets = required(count)
        torch._foreach_div_(total, self._num_targets)
        return total

    def _linearized(self, i: int, inputs: Any, targets: Any) -> Linearization:
        """Make the graph of batch i, and keep it as retain says."""
        room = self.memory_budget - sum(batch.num_bytes for batch in self._kept.values())
        measure = self.retain == "auto" and not self._full
        options = self.model, self.forward, self.readout, self.loss_fn, self.parameters, inputs, targets
        keep_bytes = float("inf") if self.retain is True else room
        with repeatable(self.model, inputs, self._device, self._outside):
            batch = self._differentiable(lambda functions: Linearization(*options, keep_bytes, functions))
        if measure and batch.num_bytes > room:
            batch.drop_cotangent()
            self._full = batch.num_bytes > room
        if self.retain is True or (measure and not self._full):
            self._kept[i] = batch
        return batch

    def _differentiable(self, make: Callable[[Derivatives], Linearization]) -> Linearization:
        """Make the graph with the quickest functions that are right for this forward; the right ones are found by trying."""
        try:
            if not self._third:
                try:
                    return make(FastSecondDerivatives())
                except ChangedInPlace:  # which PyTorch's own functions, that save less, may allow
                    with suppress(DifferentiatesItself):
                        return make(Derivatives())
                except DifferentiatesItself:
                    pass
                self._third = True
            return make(Derivatives(third=True))
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise UserError(
                "forward takes derivatives by torch.func (grad, vjp, jacrev), around which PyTorch has no hooks on saved tensors: "
                "torch.autograd.grad(create_graph=True) in its place, or method='difference'"
            ) from error

    def _drop_stale(self) -> None:
        """Forget the graphs of weights, buffers and batches that have changed, in whatever way, since they were made."""
        buffers = [part for buffer in self.model.buffers() for part in parts(buffer)]
        floating = (buffer for buffer in buffers if buffer.is_floating_point())
        tensors = list(dict.fromkeys([*self.parameters, *self.model.parameters(), *floating]))
        with torch.no_grad():
            norms = torch.stack([n.double() for n in torch._foreach_norm(tensors)]).tolist()
            places = torch.stack([by_place(t) for t in tensors]).tolist()  # writing by .data leaves no other trace
        everything = [*tensors, *buffers]  # of integers and booleans this alone tells
        versions = [version(t) for t in [*everything, *self.model.buffers()]]
        batches, held = self.batches.written()
        modes = [module.training for module in self.model.modules()]
        stamp = [norms, places, [t.data_ptr() for t in everything], versions, modes, batches]
        if stamp != self._stamp:
            self.release()
            self._stamp = stamp
        self._held = held
