"""Softmax cross-entropy and its derivatives at the head, chunk by chunk: logits are never whole, in either pass.

Dimensions: N targets, D width, V classes, C rows of a chunk.
With logits z = h W^T, p = softmax(z) and the loss in nats,

    u = dL/dz = p - onehot(target),   (d2L/dz2) dz = p * dz - p (p . dz),   both zero on rows whose target is ignored.

The cotangent u is built at one point (h_u, W_u) and pulled back at another (h, W): the same point for an ordinary gradient, theta
and theta' for the functional path, theta' and theta for the logit path.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from functional_sam.losses import IGNORE, cross_entropy

CHUNK_BYTES = 64 * 2**20  # of float32 logits held at once in training
SWEEP_BYTES = 4 * 2**20  # of float32 logits that the softmax sweeps over at a time on a CPU: they stay in its cache
LEAST_ROWS = 64  # in a chunk, for fewer make slow matrix products


def chunks(num_rows: int, row_bytes: int, budget: int) -> Iterator[slice]:
    """Slices of rows that fit `budget` bytes, of LEAST_ROWS at least."""
    size = max(LEAST_ROWS, budget // row_bytes)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def logit_chunks(num_rows: int, num_classes: int) -> Iterator[slice]:
    """Slices of rows whose float32 logits fit CHUNK_BYTES."""
    return chunks(num_rows, 4 * num_classes, CHUNK_BYTES)


def to_cotangent(z_CV: Tensor, targets_C: Tensor, dtype: torch.dtype, loss_dtype: torch.dtype | None = None) -> Tensor:
    """Overwrite the logits z by u, computed in `dtype`; return the summed loss in loss_dtype (`dtype` unless given)."""
    num_rows, num_classes = z_CV.shape
    sweep = max(1, SWEEP_BYTES // (4 * num_classes)) if z_CV.device.type == "cpu" else num_rows
    buffer = None if z_CV.dtype == dtype else torch.empty(min(sweep, num_rows), num_classes, dtype=dtype, device=z_CV.device)
    loss = torch.zeros((), dtype=loss_dtype or dtype, device=z_CV.device)
    for start in range(0, num_rows, sweep):
        part_CV, targets = z_CV[start : start + sweep], targets_C[start : start + sweep]
        u_CV = part_CV if buffer is None else buffer[: len(part_CV)].copy_(part_CV)
        valid_C1, index_C1 = _places(targets)
        # Five passes over the rows and one exponential: max, subtract, exp, sum, scale (which also zeroes the ignored rows).
        u_CV.sub_(u_CV.amax(1, keepdim=True))
        target_C1 = u_CV.gather(1, index_C1)
        sum_C1 = u_CV.exp_().sum(1, keepdim=True)
        loss += ((sum_C1.log() - target_C1) * valid_C1).sum(dtype=loss.dtype)
        u_CV.mul_(valid_C1 / sum_C1)
        u_CV.scatter_add_(1, index_C1, -valid_C1.to(dtype))
        if buffer is not None:
            part_CV.copy_(u_CV)
    return loss


def softmax_of(u_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return p = u + onehot(target); rows of ignored targets stay zero."""
    valid_C1, index_C1 = _places(targets_C)
    return u_CV.scatter_add(1, index_C1, valid_C1.to(u_CV.dtype))


def hessian_product(p: Tensor, dz: Tensor) -> Tensor:
    """Return (d2L/dz2) dz = p * dz - p (p . dz), row by row; p, dz [..., V]."""
    weighted = p * dz
    return torch.addcmul(weighted, p, weighted.sum(-1, keepdim=True), value=-1)


def _places(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks of the valid targets and their class indices (0 where not valid), with a last dimension of 1 added."""
    valid = (targets != IGNORE).unsqueeze(-1)
    return valid, targets.unsqueeze(-1).where(valid, 0)


class _Cotangent(torch.autograd.Function):
    """u / divisor of whole logits, whose backward is the closed form: it keeps p, where F.cross_entropy keeps several logits."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, targets: Tensor, divisor: float) -> Tensor:
        valid, index = _places(targets)
        p = z.to(torch.promote_types(z.dtype, torch.float32)).softmax(-1) * valid
        ctx.save_for_backward(p)
        ctx.divisor = divisor
        u = p.clone()
        u.scatter_add_(-1, index, -valid.to(u.dtype))
        return u.div_(divisor).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (p,) = ctx.saved_tensors
        (w,) = cotangents
        return hessian_product(p, w).div_(ctx.divisor).to(w.dtype), None, None


def differentiable_cotangent(z: Tensor, targets: Tensor, divisor: float) -> Tensor:
    """Return u / divisor for logits z [..., V], differentiable once by z."""
    result: Tensor = _Cotangent.apply(z, targets, divisor)  # type: ignore[no-untyped-call]
    return result


def compute_dtype(h: Tensor) -> torch.dtype:
    """Return the dtype of the head's products: autocast's where it is on, that of h elsewhere. The softmax is in float32."""
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


def reads_out(model: torch.nn.Module, forward: Callable[..., Any] | None, loss_fn: Callable[..., Any]) -> bool:
    """Whether `model` can hand over (h, W) in the place of logits: has_readout, a forward that takes readout=, the default loss."""
    takes_readout = forward is None or "readout" in inspect.signature(forward).parameters
    return bool(getattr(model, "has_readout", False)) and takes_readout and loss_fn is cross_entropy


class _PullBack(torch.autograd.Function):
    """Returns scale * loss at (h_u, W_u); its backward gives scale * u^T h and scale * u W at (h, W).

    The gradients are computed in forward, while a chunk of u exists, so backward must be called with cotangent 1.
    u_NV: None, or memory for u, which is filled here, or with `known` read.
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
            for rows in logit_chunks(len(h_ND), len(weight_VD)):
                if u_NV is not None and known:
                    u_CV = u_NV[rows].to(dtype)
                else:
                    u_CV = h_u[rows] @ weight_u.T  # logits, soon to be u
                    loss += to_cotangent(u_CV, targets_N[rows], loss.dtype)
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
    """Return scale * (summed loss at (h_u, weight_u)), whose .backward() pulls that point's cotangent back through (h, weight).

    h, h_u [..., D]; weight, weight_u [V, D]; targets [...]. Logits are h @ weight.T in the dtype of h (of autocast where it is on),
    the softmax in float32 (float64 if h is). u [number of targets, V], if given, is filled with the unscaled cotangent for a later
    call; that one, with known=True, reads it, skips the product and the softmax that made it, and returns 0 for the loss.
    """
    width = h.shape[-1]
    result: Tensor = _PullBack.apply(
        h.reshape(-1, width), weight, h_u.detach().reshape(-1, width), weight_u, targets.reshape(-1), scale, u, known
    )  # type: ignore[no-untyped-call]
    return result
