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
SWEEP_BYTES = 4 * 2**20  # of float32 logits that the softmax sweeps over at a time on a CPU: they stay in its cache


def chunk_rows(num_classes: int) -> int:
    """Rows of logits that fit the chunk budget."""
    return max(64, CHUNK_BYTES // (4 * num_classes))


def _chunks(num_rows: int, num_classes: int) -> Iterator[slice]:
    rows = chunk_rows(num_classes)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def _to_cotangent(z_CV: Tensor, targets_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Put softmax(z) - onehot in the place of z, computed in `dtype`; the summed loss. Rows of ignored targets become zero."""
    num_rows, num_classes = z_CV.shape
    sweep = max(1, SWEEP_BYTES // (4 * num_classes)) if z_CV.device.type == "cpu" else num_rows
    buffer = None if z_CV.dtype == dtype else torch.empty(min(sweep, num_rows), num_classes, dtype=dtype, device=z_CV.device)
    loss = torch.zeros((), dtype=dtype, device=z_CV.device)
    for start in range(0, num_rows, sweep):
        part_CV, targets = z_CV[start : start + sweep], targets_C[start : start + sweep]
        u_CV = part_CV if buffer is None else buffer[: len(part_CV)].copy_(part_CV)
        valid_C1 = (targets != IGNORE).unsqueeze(1)
        index_C1 = targets.unsqueeze(1).where(valid_C1, 0)
        # Five passes over the rows and one exponential: max, subtract, exp, sum, scale (which also zeroes the ignored rows).
        u_CV.sub_(u_CV.amax(1, keepdim=True))
        target_C1 = u_CV.gather(1, index_C1)
        sum_C1 = u_CV.exp_().sum(1, keepdim=True)
        loss += ((sum_C1.log() - target_C1) * valid_C1).sum()
        u_CV.mul_(valid_C1 / sum_C1)
        u_CV.scatter_add_(1, index_C1, -valid_C1.to(dtype))
        if buffer is not None:
            part_CV.copy_(u_CV)
    return loss


def compute_dtype(h: Tensor) -> torch.dtype:
    """Of the head's products: autocast's where it is on (head_dtype "bfloat16"), that of h elsewhere; the softmax is in float32."""
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


class _PullBack(torch.autograd.Function):
    """Returns scale * loss at (h_u, W_u); its backward gives scale * u^T h and scale * u W at (h, W).

    The gradients are computed in forward, while a chunk of u exists, so backward must be called with cotangent 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        h_u_ND: Tensor,
        weight_u_VD: Tensor,
        targets_N: Tensor,
        scale: float,
        u_NV: Tensor | None,
        known: bool,
    ) -> Tensor:
        device, dtype = h_ND.device.type, compute_dtype(h_ND)
        with torch.autocast(device, enabled=False):
            weight = weight_VD.to(dtype)
            weight_u = weight if weight_u_VD is weight_VD else weight_u_VD.to(dtype)
            h_u = h_u_ND.to(dtype)
            # Scaling h costs N*D, scaling u would cost N*V.
            scaled_h = (h_ND * scale).to(dtype)
            loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=h_ND.device)
            want_h, want_weight = ctx.needs_input_grad[:2]
            dh_ND = torch.empty_like(h_ND) if want_h else None
            dweight_VD = torch.zeros_like(weight_VD) if want_weight else None
            for rows in _chunks(len(h_ND), len(weight_VD)):
                if u_NV is not None and known:
                    u_CV = u_NV[rows].to(dtype)
                else:
                    u_CV = h_u[rows] @ weight_u.T  # logits, soon to be u
                    loss += _to_cotangent(u_CV, targets_N[rows], loss.dtype)
                    if u_NV is not None:
                        u_NV[rows] = u_CV
                if dh_ND is not None:
                    torch.mul(u_CV @ weight, scale, out=dh_ND[rows])
                if dweight_VD is None:
                    pass
                elif dweight_VD.dtype == dtype:
                    dweight_VD.addmm_(u_CV.T, scaled_h[rows])
                else:
                    dweight_VD += u_CV.T @ scaled_h[rows]
        ctx.gradients = (dh_ND, dweight_VD)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        dh_ND, dweight_VD = ctx.gradients
        ctx.gradients = None
        return dh_ND, dweight_VD, None, None, None, None, None, None


def pull_back(
    h: Tensor,
    weight: Tensor,
    h_u: Tensor,
    weight_u: Tensor,
    targets: Tensor,
    scale: float,
    u: Tensor | None = None,
    known: bool = False,
) -> Tensor:
    """scale * (summed loss at (h_u, weight_u)), a scalar whose .backward() pulls that point's cotangent back through (h, weight).

    h, h_u [..., D]; weight, weight_u [V, D]; targets [...]. Logits are h @ weight.T in the dtype of h (of autocast where it is on),
    the softmax in float32 (float64 if h is). u [number of targets, V] takes the unscaled cotangent for a later call, which with
    `known` reads it, skips the product and the softmax that made it, and returns 0 for the loss.
    """
    width = h.shape[-1]
    result: Tensor = _PullBack.apply(
        h.reshape(-1, width), weight, h_u.detach().reshape(-1, width), weight_u, targets.reshape(-1), scale, u, known
    )  # type: ignore[no-untyped-call]
    return result
