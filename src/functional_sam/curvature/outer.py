"""The outer function L(y): the loss of one batch by the outputs of the model, with its first and second derivative by hand.

N targets, D width, V classes; y the outputs, c = dL/dy, dy a tangent of y. Two kinds of outputs:

OnLogits   y = z, the logits. c = u, and dc = (d2L/dz2) dz = q, which is the logit part of the Hessian; there is no other.
           CrossEntropyOnLogits is the same for cross-entropy with class indices.
OnHead     y = (h, W), z = h W^T, for the same. With p = softmax(z) and u = p - onehot(target), both zero for an ignored
           target, c = (u W, u^T h). Along (dh, dW), dz = dh W^T + h dW^T, q = p * dz - p (p . dz), and

               dc = (q W, q^T h) + (u dW, u^T dh)

           where the terms with q are the logit part and those with u, there because z is bilinear in (h, W), the functional part.
           Of the size [N, V] there is u, and that only where it is allowed; the rest of that width exists for one chunk of rows.
"""

from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from functional_sam.curvature.buffers import Buffers, written
from functional_sam.derivatives import differentiable_gradient
from functional_sam.errors import UserError
from functional_sam.head import chunks, hessian_product, softmax_of, to_cotangent
from functional_sam.losses import IGNORE, cross_entropy, require_logits, require_no_mean, require_rows
from functional_sam.weights import modules_of

LossFn = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
Tangents = Sequence[Tensor | None]  # None is zero

CHUNK_BYTES = 4 * 2**20  # of logits held at once


class Outer(Protocol):
    """L at one point. Nothing in it holds the graph of the model."""

    loss: Tensor  # sum over the valid targets
    count: Tensor  # their number

    def cotangents(self) -> list[Tensor]:
        """c, one tensor for each output; given away at the first call."""

    def second(self, dy: Tangents, logit: bool, functional: bool) -> list[Tensor | None]:
        """dc: its logit part, its functional part, or their sum."""

    @property
    def num_bytes(self) -> int:
        """Memory held for `second`."""


class OnLogits:
    """Any loss_fn of the logits, by autograd. functions: what loss_fn is called inside of; trained: the model's parameters."""

    def __init__(
        self,
        z: Tensor,
        targets: Any,
        loss_fn: LossFn,
        functions: AbstractContextManager[Any] | None = None,
        trained: Container[Tensor] = (),
    ) -> None:
        self.z = z.detach().requires_grad_()
        with functions or nullcontext():
            total, self.count = of_logits_alone(loss_fn, self.z, targets, trained)
        self.loss = total.detach()
        self.u = differentiable_gradient(total, self.z) if total.requires_grad else torch.zeros_like(self.z)

    @property
    def num_bytes(self) -> int:
        return 3 * self.z.nbytes  # z, u, and as much again for the graph between them

    def cotangents(self) -> list[Tensor]:
        return [self.u.detach()]

    def second(self, dy: Tangents, logit: bool, functional: bool) -> list[Tensor | None]:
        return list(pull_back([self.u], [self.z], dy, retain_graph=True)) if logit else [None]


class CrossEntropyOnLogits:
    """Cross-entropy of the logits in closed form: u is kept, where double backward would keep ten times as much."""

    def __init__(self, z: Tensor, targets: Tensor) -> None:
        V = z.shape[-1]
        self.targets_N = targets.reshape(-1)
        self.count, self.loss = (self.targets_N != IGNORE).sum(), torch.zeros((), dtype=torch.float64, device=z.device)
        self.u = z.detach().clone(memory_format=torch.contiguous_format)
        dtype, u_NV = torch.promote_types(z.dtype, torch.float32), self.u.view(-1, V)
        for rows in chunks(len(u_NV), z.element_size() * V, CHUNK_BYTES):
            self.loss += to_cotangent(u_NV[rows], self.targets_N[rows], dtype, torch.float64)

    @property
    def num_bytes(self) -> int:
        return self.u.nbytes

    def cotangents(self) -> list[Tensor]:
        return [self.u.detach()]

    def second(self, dy: Tangents, logit: bool, functional: bool) -> list[Tensor | None]:
        (dz,) = dy
        if dz is None or not logit:
            return [None]
        q, V = torch.empty_like(self.u), self.u.shape[-1]
        u_NV, dz_NV, q_NV = self.u.view(-1, V), dz.reshape(-1, V), q.view(-1, V)
        for rows in chunks(len(u_NV), u_NV.element_size() * V, CHUNK_BYTES):
            q_NV[rows] = hessian_product(softmax_of(u_NV[rows], self.targets_N[rows]), dz_NV[rows])
        return [q]


class OnHead:
    """Cross-entropy of h W^T, [N, D] by [V, D]. u is kept if it takes no more than keep_bytes, and made again otherwise."""

    def __init__(self, h: Tensor, weight: Tensor, targets: Tensor, by_h: bool, by_weight: bool, keep_bytes: float) -> None:
        require_rows(h.shape[:-1], h.shape[:-1] + weight.shape[:1], targets)
        self.by_h, self.by_weight, self.shape = by_h, by_weight, h.shape
        self.h_ND, self.W_VD = h.detach().reshape(-1, h.shape[-1]), weight.detach().to(h.dtype)
        self.targets_N = targets.reshape(-1)
        N, V = len(self.h_ND), len(self.W_VD)
        self.row_bytes = V * h.element_size()
        self.u_NV = self.h_ND.new_empty(N, V) if N * self.row_bytes <= keep_bytes else None
        self.count, self.loss = (self.targets_N != IGNORE).sum(), self.h_ND.new_zeros((), dtype=torch.float64)
        by_h_ND, by_W_VD = self._zeros()
        for rows in chunks(N, self.row_bytes, CHUNK_BYTES):
            u_CV, loss = self._cotangent(rows)
            self.loss += loss
            if self.u_NV is not None:
                self.u_NV[rows] = u_CV
            _add(by_h_ND, rows, u_CV, self.W_VD)
            _add_transposed(by_W_VD, u_CV, self.h_ND[rows])
        self.c = self._outputs(by_h_ND, by_W_VD)

    @property
    def num_bytes(self) -> int:
        return self.u_NV.nbytes if self.u_NV is not None else 0

    def cotangents(self) -> list[Tensor]:
        c, self.c = self.c, []
        return c

    def second(self, dy: Tangents, logit: bool, functional: bool) -> list[Tensor | None]:
        dh, dW = self._tangents(dy)
        by_h_ND, by_W_VD = self._zeros()
        for rows in chunks(len(self.h_ND), self.row_bytes, CHUNK_BYTES) if dh is not None or dW is not None else ():
            u_CV = self._cotangent(rows)[0] if self.u_NV is None else self.u_NV[rows]
            if logit:
                dz_CV = torch.zeros_like(u_CV) if dh is None else dh[rows] @ self.W_VD.T
                if dW is not None:
                    dz_CV.addmm_(self.h_ND[rows], dW.T)
                q_CV = hessian_product(softmax_of(u_CV, self.targets_N[rows]), dz_CV)
                _add(by_h_ND, rows, q_CV, self.W_VD)
                _add_transposed(by_W_VD, q_CV, self.h_ND[rows])
            if functional:
                _add(by_h_ND, rows, u_CV, dW)
                _add_transposed(by_W_VD, u_CV, None if dh is None else dh[rows])
        return list(self._outputs(by_h_ND, by_W_VD))

    def _cotangent(self, rows: slice) -> tuple[Tensor, Tensor]:
        """u of a chunk of rows, and their loss."""
        u_CV = self.h_ND[rows] @ self.W_VD.T
        return u_CV, to_cotangent(u_CV, self.targets_N[rows], u_CV.dtype, torch.float64)

    def _zeros(self) -> tuple[Tensor | None, Tensor | None]:
        return (
            torch.zeros_like(self.h_ND) if self.by_h else None,
            torch.zeros_like(self.W_VD) if self.by_weight else None,
        )

    def _tangents(self, dy: Tangents) -> tuple[Tensor | None, Tensor | None]:
        given = iter(dy)
        dh, dW = next(given) if self.by_h else None, next(given) if self.by_weight else None
        return None if dh is None else dh.reshape(self.h_ND.shape), None if dW is None else dW.to(self.h_ND.dtype)

    def _outputs(self, by_h_ND: Tensor | None, by_W_VD: Tensor | None) -> list[Tensor]:
        by_h = [] if by_h_ND is None else [by_h_ND.view(self.shape)]
        return by_h + ([] if by_W_VD is None else [by_W_VD])


def summed(loss_fn: LossFn, z: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """loss_fn(z, targets). Raises UserError for a z that is no tensor of logits or not the targets', and for a mean alone."""
    require_logits(z, targets, loss_fn)
    before = written(targets)
    result = loss_fn(z, targets)
    if written(targets) != before:
        raise UserError("loss_fn changed targets, which every product is of: let it work on a copy")
    if not (isinstance(result, tuple) and len(result) == 2):
        raise UserError(f"loss_fn returned a {type(result).__name__}: expected (SUM over valid targets, number of valid targets)")
    return result


def of_logits_alone(loss_fn: LossFn, z: Tensor, targets: Any, trained: Container[Tensor]) -> tuple[Tensor, Tensor]:
    """loss_fn(z, targets) to be differentiated by z: UserError if it reaches parameters of the model past z, or no z at all.

    Both halves are those of a function of the logits: what reaches the parameters past them would be in neither. Other tensors
    (task weights that the loss learns, targets with a graph of another model) are constants of these products.
    """
    at_z = get_gradient_edge(z).node
    total, count = summed(loss_fn, z, targets)
    start = getattr(total, "grad_fn", None)
    if start is None and float(count):
        raise UserError("loss_fn returned a sum that does not depend on the logits: it detaches them, or runs under no_grad")
    pending, seen = [start], {at_z}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "AccumulateGrad" and node.variable in trained:
            raise UserError(
                f"loss_fn depends on a parameter of the model (shape {list(node.variable.shape)}) past the logits: a term read "
                "from the model (load balancing, a penalty on the weights). It would be missing in gradient and curvature: let "
                "forward return what the term needs as a part of the logits"
            )
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
    return total, count


def sums(loss_fn: LossFn) -> LossFn:
    """loss_fn that raises UserError for a mean beside a count, when it is called first, by which all would be too small.

    Buffers that it moves (DINO's centre) are put back after each call, so that all products are those of one loss.
    """
    if loss_fn is cross_entropy:
        return loss_fn
    seen, modules = False, [module for module in modules_of(loss_fn) if module._buffers]

    def looked_at(z: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        nonlocal seen
        buffers = Buffers(*modules)
        try:
            result = loss_fn(z, targets)
        finally:
            buffers.put_back()
        if not seen and isinstance(result, tuple) and len(result) == 2:
            seen = True
            require_no_mean(loss_fn, z, targets, *result)
        return result

    return looked_at


def by_classes(loss_fn: LossFn, targets: Any) -> bool:
    """Whether the loss is cross-entropy with class indices, whose derivatives are known in closed form here."""
    return loss_fn is cross_entropy and not (isinstance(targets, Tensor) and targets.is_floating_point())


def pull_back(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor],
    cotangents: Tangents | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """torch.autograd.grad with zeros where an output does not depend on an input (a model linear in theta has such).

    outputs: tensors, or their edges in the graph. cotangents: of scalars need not be given; one that is None is zero.
    """
    weights = [torch.ones_like(output) for output in outputs] if cotangents is None else cotangents  # type: ignore[arg-type]
    pairs = zip(outputs, weights, strict=True)
    live = [(output, weight) for output, weight in pairs if getattr(output, "requires_grad", True) and weight is not None]
    if not live:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            [output for output, _ in live],  # type: ignore[arg-type]
            list(inputs),
            [weight for _, weight in live],
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _add(into_ND: Tensor | None, rows: slice, a_CV: Tensor, b_VD: Tensor | None) -> None:
    if into_ND is not None and b_VD is not None:
        into_ND[rows].addmm_(a_CV, b_VD)


def _add_transposed(into_VD: Tensor | None, a_CV: Tensor, b_CD: Tensor | None) -> None:
    if into_VD is not None and b_CD is not None:
        into_VD.addmm_(a_CV.T, b_CD)
