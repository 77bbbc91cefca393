"""The outer function L(y): the loss of one batch by the outputs of the model, with its first and second derivative by hand.

N targets, D width, V classes; y the outputs, c = dL/dy, dy a tangent of y. Two kinds of outputs:

OnLogits   y = z, the logits. c = u, and dc = (d2L/dz2) dz = q, which is the logit half of the Hessian; there is no other.
           CrossEntropyOnLogits is the same for cross-entropy.
OnHead     y = (h, W), z = h W^T, for cross-entropy. With p = softmax(z) and u = p - onehot(target), both zero for an ignored
           target, c = (u W, u^T h). Along (dh, dW), dz = dh W^T + h dW^T, q = p * dz - p (p . dz), and

               dc = (q W, q^T h) + (u dW, u^T dh)

           where the terms with q are the logit half and those with u, there because z is bilinear in (h, W), the functional half.
           Of the size [N, V] there is p, and that only where it is allowed; the rest of that width exists for one chunk of rows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from functional_sam.losses import IGNORE

LossFn = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
Tangents = Sequence[Tensor | None]  # None is zero

CHUNK_BYTES = 4 * 2**20  # of logits held at once
LEAST_ROWS = 64  # in a chunk, for fewer make slow matrix products


class Outer(Protocol):
    """L at one point. Nothing in it holds the graph of the model."""

    loss: Tensor  # sum over the valid targets
    count: Tensor  # their number

    def cotangents(self) -> list[Tensor]:
        """c, one tensor for each output; given away at the first call."""

    def second(self, dy: Tangents, logit: bool, functional: bool) -> list[Tensor | None]:
        """dc: its logit half, its functional half, or their sum."""

    @property
    def num_bytes(self) -> int:
        """Memory held for `second`."""


class OnLogits:
    """Any loss_fn of the logits, by autograd."""

    def __init__(self, z: Tensor, targets: Any, loss_fn: LossFn) -> None:
        self.z = z.detach().requires_grad_()
        total, self.count = loss_fn(self.z, targets)
        self.loss = total.detach()
        (self.u,) = pull_back([total], [self.z], create_graph=True)

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
        z, V = z.detach(), z.shape[-1]
        self.valid_N1 = targets.reshape(-1, 1) != IGNORE
        self.y_N1 = targets.reshape(-1, 1).where(self.valid_N1, 0)
        self.count, self.loss = self.valid_N1.sum(), torch.zeros((), dtype=torch.float64, device=z.device)
        self.u = torch.empty_like(z, memory_format=torch.contiguous_format)
        z_NV, u_NV = z.reshape(-1, V), self.u.view(-1, V)
        for rows in chunks(len(z_NV), z_NV.element_size() * V):
            z_CV, valid_C1, y_C1 = z_NV[rows].to(torch.promote_types(z.dtype, torch.float32)), self.valid_N1[rows], self.y_N1[rows]
            lse_C1 = z_CV.logsumexp(1, keepdim=True)
            self.loss += ((lse_C1 - z_CV.gather(1, y_C1)) * valid_C1).sum(dtype=torch.float64)
            u_CV = (z_CV - lse_C1.masked_fill(~valid_C1, torch.inf)).exp_()  # an ignored row is exp(-inf) = 0
            u_NV[rows] = u_CV.scatter_add_(1, y_C1, -valid_C1.to(u_CV.dtype))

    @property
    def num_bytes(self) -> int:
        return self.u.nbytes

    def cotangents(self) -> list[Tensor]:
        return [self.u.detach()]

    def second(self, dy: Tangents, logit: bool, functional: bool) -> list[Tensor | None]:
        """By u = p - onehot: with s = p . dz = u . dz + dz_y, q is u (dz - s) and, at the target y, dz_y - s more."""
        (dz,) = dy
        if dz is None or not logit:
            return [None]
        q, V = torch.empty_like(self.u), self.u.shape[-1]
        u_NV, dz_NV, q_NV = self.u.view(-1, V), dz.reshape(-1, V), q.view(-1, V)
        for rows in chunks(len(u_NV), u_NV.element_size() * V):
            u_CV, dz_CV, y_C1 = u_NV[rows], dz_NV[rows], self.y_N1[rows]
            own_C1 = dz_CV.gather(1, y_C1) * self.valid_N1[rows]  # u is zero for an ignored target, and so is q then
            s_C1 = (u_CV * dz_CV).sum(1, keepdim=True) + own_C1
            torch.sub(dz_CV, s_C1, out=q_NV[rows]).mul_(u_CV).scatter_add_(1, y_C1, (own_C1 - s_C1) * self.valid_N1[rows])
        return [q]


class OnHead:
    """Cross-entropy of h W^T, [N, D] by [V, D]. p is kept if it takes no more than keep_bytes, and made again otherwise."""

    def __init__(self, h: Tensor, weight: Tensor, targets: Tensor, by_h: bool, by_weight: bool, keep_bytes: float) -> None:
        self.by_h, self.by_weight, self.shape = by_h, by_weight, h.shape
        self.h_ND, self.W_VD = h.detach().reshape(-1, h.shape[-1]), weight.detach().to(h.dtype)
        self.valid_N = targets.reshape(-1) != IGNORE
        self.y_N = targets.reshape(-1).where(self.valid_N, 0)
        N, V = len(self.h_ND), len(self.W_VD)
        self.row_bytes = V * h.element_size()
        self.p_NV = self.h_ND.new_empty(N, V) if N * self.row_bytes <= keep_bytes else None
        self.count, self.loss = self.valid_N.sum(), self.h_ND.new_zeros((), dtype=torch.float64)
        by_h_ND, by_W_VD = self._zeros()
        for rows in chunks(N, self.row_bytes):
            z_CV = self.h_ND[rows] @ self.W_VD.T
            lse_C1 = z_CV.logsumexp(1, keepdim=True)
            own_C1 = z_CV.gather(1, self.y_N[rows].unsqueeze(1))
            self.loss += ((lse_C1 - own_C1).squeeze(1) * self.valid_N[rows]).sum(dtype=torch.float64)
            p_CV = self._softmax(z_CV, lse_C1, rows)
            if self.p_NV is not None:
                self.p_NV[rows] = p_CV
            _add(by_h_ND, rows, p_CV, self.W_VD)
            _add_transposed(by_W_VD, p_CV, self.h_ND[rows])
        self._minus_onehot(by_h_ND, by_W_VD, self.h_ND, self.W_VD)
        self.c = self._outputs(by_h_ND, by_W_VD)

    @property
    def num_bytes(self) -> int:
        return self.p_NV.nbytes if self.p_NV is not None else 0

    def cotangents(self) -> list[Tensor]:
        c, self.c = self.c, []
        return c

    def second(self, dy: Tangents, logit: bool, functional: bool) -> list[Tensor | None]:
        dh, dW = self._tangents(dy)
        by_h_ND, by_W_VD = self._zeros()
        for rows in chunks(len(self.h_ND), self.row_bytes) if dh is not None or dW is not None else ():
            if self.p_NV is not None:
                p_CV = self.p_NV[rows]
            else:
                z_CV = self.h_ND[rows] @ self.W_VD.T
                p_CV = self._softmax(z_CV, z_CV.logsumexp(1, keepdim=True), rows)
            if logit:
                dz_CV = torch.zeros_like(p_CV) if dh is None else dh[rows] @ self.W_VD.T
                if dW is not None:
                    dz_CV.addmm_(self.h_ND[rows], dW.T)
                q_CV = dz_CV.sub_((p_CV * dz_CV).sum(1, keepdim=True)).mul_(p_CV)
                _add(by_h_ND, rows, q_CV, self.W_VD)
                _add_transposed(by_W_VD, q_CV, self.h_ND[rows])
            if functional:
                _add(by_h_ND, rows, p_CV, dW)
                _add_transposed(by_W_VD, p_CV, None if dh is None else dh[rows])
        if functional:
            self._minus_onehot(by_h_ND, by_W_VD, dh, dW)
        return list(self._outputs(by_h_ND, by_W_VD))

    def _softmax(self, z_CV: Tensor, lse_C1: Tensor, rows: slice) -> Tensor:
        """p in place of z; an ignored row is exp(-inf) = 0."""
        return z_CV.sub_(lse_C1.masked_fill(~self.valid_N[rows].unsqueeze(1), torch.inf)).exp_()

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

    def _minus_onehot(self, by_h_ND: Tensor | None, by_W_VD: Tensor | None, h_ND: Tensor | None, W_VD: Tensor | None) -> None:
        """by_h -= onehot W and by_W -= onehot^T h: what was made with p is then as made with u."""
        if by_h_ND is not None and W_VD is not None:
            by_h_ND.sub_(W_VD[self.y_N] * self.valid_N.unsqueeze(1))
        if by_W_VD is not None and h_ND is not None:
            by_W_VD.index_add_(0, self.y_N, h_ND * self.valid_N.unsqueeze(1), alpha=-1)


def chunks(num_rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of rows that fit CHUNK_BYTES, of LEAST_ROWS at least."""
    size = max(LEAST_ROWS, CHUNK_BYTES // row_bytes)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


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
