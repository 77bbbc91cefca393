"""Softmax cross-entropy at the head, chunk by chunk: logits are never whole, in either pass.

Dimensions: N targets, D width, V classes, C rows of a chunk.
With logits z = h W^T and the loss in nats, u = dL/dz = softmax(z) - onehot(target). The cotangent u is built at one point
(h_u, W_u) and pulled back at another (h, W): the same point for an ordinary gradient, theta and theta' for the functional path,
theta' and theta for the logit path.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from functional_sam.losses import IGNORE

CHUNK_BYTES = 64 * 2**20  # of float32 logits held at once


def chunk_rows(num_classes: int) -> int:
    """Rows of logits that fit the chunk budget."""
    return max(64, CHUNK_BYTES // (4 * num_classes))


def _chunks(num_rows: int, num_classes: int) -> Iterator[slice]:
    rows = chunk_rows(num_classes)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def _loss_and_cotangent(z_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and softmax(z) - onehot, in place of z; rows of ignored targets are zero."""
    valid_C = targets_C != IGNORE
    index_C1 = targets_C.where(valid_C, 0).unsqueeze(1)
    logsumexp_C1 = z_CV.logsumexp(1, keepdim=True)
    loss = ((logsumexp_C1 - z_CV.gather(1, index_C1)).squeeze(1) * valid_C).sum()
    u_CV = z_CV.sub_(logsumexp_C1).exp_()
    u_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=u_CV.dtype))
    u_CV.mul_(valid_C.unsqueeze(1))
    return loss, u_CV


class _PullBack(torch.autograd.Function):
    """Returns scale * loss at (h_u, W_u); its backward gives scale * u^T h and scale * u W at (h, W).

    The gradients are computed in forward, while a chunk of u exists, so backward must be called with cotangent 1.
    """

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, h_u_ND: Tensor, weight_u_VD: Tensor, targets_N: Tensor, scale: float
    ) -> Tensor:
        with torch.autocast(h_ND.device.type, enabled=False):
            dtype = h_ND.dtype
            weight = weight_VD.to(dtype)
            weight_u = weight if weight_u_VD is weight_VD else weight_u_VD.to(dtype)
            loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=h_ND.device)
            # Scaling h costs N*D, scaling u would cost N*V.
            scaled_h_ND = h_ND * scale
            want_h, want_weight = ctx.needs_input_grad[:2]
            dh_ND = torch.empty_like(h_ND) if want_h else None
            dweight_VD = torch.zeros_like(weight_VD) if want_weight else None
            for rows in _chunks(len(h_ND), len(weight_VD)):
                z_CV = (h_u_ND[rows] @ weight_u.T).to(loss.dtype)
                part, u_CV = _loss_and_cotangent(z_CV, targets_N[rows])
                loss += part
                u_CV = u_CV.to(dtype)
                if dh_ND is not None:
                    torch.mm(u_CV, weight, out=dh_ND[rows])
                if dweight_VD is not None:
                    if dweight_VD.dtype == dtype:
                        dweight_VD.addmm_(u_CV.T, scaled_h_ND[rows])
                    else:
                        dweight_VD += u_CV.T @ scaled_h_ND[rows]
            if dh_ND is not None:
                dh_ND *= scale
        ctx.gradients = (dh_ND, dweight_VD)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        dh_ND, dweight_VD = ctx.gradients
        ctx.gradients = None
        return dh_ND, dweight_VD, None, None, None, None


def pull_back(h: Tensor, weight: Tensor, h_u: Tensor, weight_u: Tensor, targets: Tensor, scale: float) -> Tensor:
    """scale * (summed loss at (h_u, weight_u)), a scalar whose .backward() pulls that point's cotangent back through (h, weight).

    h, h_u [..., D]; weight, weight_u [V, D]; targets [...]. Logits are h @ weight.T in the dtype of h, the softmax in float32
    (float64 if h is).
    """
    width = h.shape[-1]
    result: Tensor = _PullBack.apply(
        h.reshape(-1, width), weight, h_u.detach().reshape(-1, width), weight_u.detach(), targets.reshape(-1), scale
    )  # type: ignore[no-untyped-call]
    return result
