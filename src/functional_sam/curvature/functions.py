"""GELU, SiLU, LayerNorm and attention, with second derivatives that take fewer steps than PyTorch's.

PyTorch differentiates the backward of these op by op: about forty passes over memory for a GELU, where three suffice once the two
derivatives at x are at hand. In a Hessian product of a small transformer those passes take longer than the matrix products.
Arguments have PyTorch's names. More is saved than there, so that a model may change in place what is needed here, n for one: then
CurvatureProducts takes PyTorch's own.
g a cotangent of the output, r a cotangent of the gradient by the input; each Grad is differentiable once and no more, and raises
DifferentiatesItself where more is asked of it, in a forward that takes derivatives itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from functional_sam.derivatives import Derivatives, DifferentiatesItself, checkpointed, transformed


class FastSecondDerivatives(Derivatives):
    """Inside it, a model that calls these functions calls the ones below; not in a checkpointed block, which runs again outside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        faster = _FASTER.get(func)
        # Where nothing tells of checkpoints, PyTorch's own are right in any block.
        if faster is not None and checkpointed() is False and not transformed():
            return faster(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def tangents_only() -> Iterator[None]:
    """Inside it, a Grad differentiated gives the part by g alone, all that J v needs; autograd does not tell what is asked for."""
    global _by_inputs
    _by_inputs = False
    try:
        yield
    finally:
        _by_inputs = True


_by_inputs = True


def _last_derivative() -> None:
    """Raise DifferentiatesItself in the backward of a Grad that is to be differentiated in its turn."""
    if torch.is_grad_enabled():
        raise DifferentiatesItself


# --- y = f(x), element by element -----------------------------------------------------------------------------------------


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or its tanh form."""
    result: Tensor = _Pointwise.apply(input, _gelu_tanh if approximate == "tanh" else _gelu)  # type: ignore[no-untyped-call]
    return result


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x); what works in place is left to PyTorch."""
    if inplace:
        return F.silu(input, inplace=True)
    result: Tensor = _Pointwise.apply(input, _silu)  # type: ignore[no-untyped-call]
    return result


def _gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' at x, as the two below."""
    phi = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    first = 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * phi
    return F.gelu(x), first, phi * (2 - x * x)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, a = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    inner = k * (x + a * square * x)
    slope = k * (1 + 3 * a * square)  # of inner
    half, sech2 = 0.5 * (1 + inner.tanh()), inner.cosh().pow(-2)
    first = half + 0.5 * x * sech2 * slope
    second = sech2 * (slope + 3 * a * k * square - x * (2 * half - 1) * slope * slope)
    return F.gelu(x, approximate="tanh"), first, second


def _silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = x.sigmoid()
    return x * s, s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        y, first, second = function(x)
        ctx.save_for_backward(x, first, second)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, first, second = ctx.saved_tensors
        if not torch.is_grad_enabled():  # no graph is asked for, here as in the others below
            return g * first, None
        return _PointwiseGrad.apply(g, x, first, second), None  # type: ignore[no-untyped-call]


class _PointwiseGrad(torch.autograd.Function):
    """g f'(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, g * second)
        return g * first

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
        _last_derivative()
        first, g_second = ctx.saved_tensors
        return r * first, r * g_second if _by_inputs else None, None, None


# --- n = (x - mean) / sqrt(var + eps) over the last dimensions --------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """LayerNorm, its scale and shift outside."""
    rows = input.reshape(*input.shape[: input.ndim - len(normalized_shape)], math.prod(normalized_shape))
    n: Tensor = _Normal.apply(rows, eps)  # type: ignore[no-untyped-call]
    n = n.view(input.shape)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def _project(g: Tensor, n: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dn/dx g = rstd (g - mean(g) - n mean(g n)), by a symmetric matrix, and mean(g n)."""
    g_n = (g * n).mean(-1, keepdim=True)
    return torch.addcmul(g, n, g_n, value=-1).sub_(g.mean(-1, keepdim=True)).mul_(rstd), g_n


class _Normal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        n, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, n, rstd)
        return n

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, n, rstd = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _project(g, n, rstd)[0], None
        return _NormalGrad.apply(g, x, n, rstd), None  # type: ignore[no-untyped-call]


class _NormalGrad(torch.autograd.Function):
    """dn/dx g. Against r it is s = rstd (r . g - D mean(r) mean(g) - D mean(r n) mean(g n)), and both rstd and n move with x:
    drstd/dx = -rstd^2 n / D, so that the part by x through rstd is -rstd s n / D, and the part by n is left to n."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, n: Tensor, rstd: Tensor) -> Tensor:
        projected, g_n = _project(g, n, rstd)
        ctx.save_for_backward(g, n, rstd, g_n * -rstd)
        return projected

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
        _last_derivative()
        g, n, rstd, minus_g_n = ctx.saved_tensors
        by_g, r_n = _project(r, n, rstd)
        if not _by_inputs:
            return by_g, None, None, None
        by_x = n * ((by_g * g).mean(-1, keepdim=True) * -rstd)  # by_g . g = s
        by_n = torch.addcmul(r * minus_g_n, g, r_n * -rstd)
        return by_g, by_x, by_n, None


# --- attention ------------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T scale) v; what has a mask of its own, dropout or grouped heads is left to PyTorch."""
    if attn_mask is not None or dropout_p or enable_gqa:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)  # type: ignore[arg-type]
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
    p: Tensor = _Softmax.apply(scores, is_causal)  # type: ignore[no-untyped-call]
    return p @ value


class _Softmax(torch.autograd.Function):
    """p of a row of scores; where a causal mask makes it zero its derivatives are zero too, with no mask in them."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, causal: bool) -> Tensor:
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        p = scores.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch._softmax_backward_data(g, p, -1, p.dtype), None
        return _SoftmaxGrad.apply(g, p), None  # type: ignore[no-untyped-call]


class _SoftmaxGrad(torch.autograd.Function):
    """p G, G = g - p . g. Of the part by p, G r - g (p . r), what is constant along a row is left out, for softmax ignores it."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, p: Tensor) -> Tensor:
        centred = g - (g * p).sum(-1, keepdim=True)
        ctx.save_for_backward(centred, p)
        return centred * p

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
        _last_derivative()
        centred, p = ctx.saved_tensors
        r = r - (r * p).sum(-1, keepdim=True)
        return r * p, r.mul_(centred) if _by_inputs else None


_FASTER: dict[Any, Callable[..., Tensor]] = {
    F.gelu: gelu,
    F.silu: silu,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.scaled_dot_product_attention: attention,
}
