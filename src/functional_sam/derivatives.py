"""Derivatives that PyTorch has silently wrong, made right: while a forward runs, its functions are composed of others.

Found by central differences in float64 over 128 functions of torch and torch.nn.functional, PyTorch 2.13.0:

    second order  torch._weight_norm, which both weight_norm of torch.nn.utils call: its double backward takes the norm for a
                  constant (30 to 60 % off, and not symmetric)
    third order   layer_norm, and batch_norm and instance_norm by the statistics of the batch (4 to 150 % off). A Hessian is of
                  third order in what the forward differentiates itself: physics-informed nets, force fields
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from functional_sam.errors import UserError

T = TypeVar("T")


_switch, _inside, _before = threading.Lock(), 0, True


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """No fast path of nn.TransformerEncoder, which without gradients zeroes what is padded, and so is another function.

    The switch is the process's: the first thread to come turns it, the last to leave turns it back.
    """
    global _inside, _before
    with _switch:
        if _inside == 0:
            _before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _inside += 1
    try:
        yield
    finally:
        with _switch:
            _inside -= 1
            if _inside == 0:
                torch.backends.mha.set_fastpath_enabled(_before)


class DifferentiatesItself(Exception):
    """The forward takes derivatives, and runs where it must not: it is to run again, inside Derivatives(third=True)."""


class Derivatives(TorchFunctionMode):
    """Inside it, what a forward calls has right second derivatives, and with `third` right third ones.

    Raises DifferentiatesItself, without `third`, for a forward that needs it; UserError for a composed function in a checkpointed
    block, which runs again outside.
    """

    def __init__(self, third: bool = False) -> None:
        super().__init__()
        self.table = _THIRD if third else _SECOND

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        other = self.table.get(func)
        return func(*args, **(kwargs or {})) if other is None else other(*args, **(kwargs or {}))


def twice_differentiable(forward: Callable[[], T]) -> T:
    """forward(), with right second derivatives. Called again, from its start, if it turns out to take derivatives itself."""
    try:
        with Derivatives():
            return forward()
    except DifferentiatesItself:
        with Derivatives(third=True):
            return forward()


@contextlib.contextmanager
def padding_watched(model: torch.nn.Module) -> Iterator[None]:
    """Run a forward whose second derivatives are wanted; its backward raises UserError where padding_idx would make them wrong.

    padding_idx keeps the gradient of a read of one row from a weight. Where another module reads that weight too (a tied head),
    what is left is no gradient of any function; where no padding reaches the loss nothing is kept, and all is right.
    """
    users: Counter[Tensor] = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    shared = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None and users[m.weight] > 1]
    handles = [module.register_forward_hook(_watch_padding) for module in shared]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_padding(module: Any, given: Any, output: Tensor) -> None:
    at = given[0] == module.padding_idx

    def require_nothing_kept(grad: Tensor) -> None:
        if grad[at].any():
            raise UserError(
                "a shared embedding's padding_idx keeps the gradient of a row that the loss depends on (a decoder that starts with "
                "the padding token): second derivatives would be off. Set embedding.padding_idx = None, or take differences of "
                "gradients (method='difference', derivative='difference')"
            )

    if output.requires_grad and bool(at.any()):
        output.register_hook(require_nothing_kept)  # type: ignore[no-untyped-call]


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graph of the outputs, once."""
    pending, seen = [output.grad_fn for output in outputs], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending += [following for following, _ in node.next_functions]


@contextlib.contextmanager
def missing_derivatives_named() -> Iterator[None]:
    """Raise UserError, with the way out, where PyTorch has no derivative of a backward (embedding_bag, cdist, ctc_loss)."""
    try:
        yield
    except RuntimeError as error:
        if "derivative for" not in str(error) or "not implemented" not in str(error):
            raise
        raise UserError(
            f"PyTorch: {str(error).rstrip('.')}. Second derivatives do not exist there: take differences of gradients "
            "(derivative='difference', method='difference'), or build it from operations that have them"
        ) from error


def watch_kernel(node: Any) -> None:
    """Let the node raise UserError if it is of a torch.autograd.Function whose backward is no function that autograd follows.

    Second derivatives of a kernel (numpy, Triton, CUDA) that is not marked once_differentiable are zeros, without a word; a
    constant added to the gradient of an auxiliary loss is added again. Nothing but a backward with create_graph is looked at.
    So does one where a module's full backward hook has changed a gradient: it would be met again in the second backward.
    """
    if type(node).__name__ == "BackwardHookFunctionBackward":
        node.register_hook(_require_identity)
    elif isinstance(node, BackwardCFunction):
        node.register_hook(partial(_require_differentiable, type(node).__name__.removesuffix("Backward")))


def differentiable_gradient(total: Tensor, z: Tensor, watch: bool = True) -> Tensor:
    """dtotal/dz as a function of z. watch: raise UserError where a kernel of the loss makes it a constant."""
    for node in nodes([total] if watch else []):
        watch_kernel(node)
    one = torch.ones_like(total).requires_grad_()  # or a backward that does not follow z could not be told from a linear loss
    (u,) = torch.autograd.grad(total, z, one, create_graph=True, allow_unused=True, materialize_grads=True)
    return u


def _require_differentiable(name: str, given: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
    """given: what backward returned for `incoming`, of which autograd must know it to be a function, unless it is zero."""
    if not (torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in incoming)):
        return
    if any(g is not None and not g.requires_grad and bool(g.any()) for g in given):
        raise UserError(
            f"{name}, a torch.autograd.Function, computes its backward outside of autograd (a fused kernel), or adds a constant "
            "there (an injected auxiliary loss): second derivatives would be wrong. Take differences of gradients "
            "(derivative='difference', method='difference'), or give the model the plain operations"
        )


def _require_identity(given: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
    """given: what the hooks of a module have left of `incoming`; the node itself does nothing."""
    if torch.is_grad_enabled() and any(
        a is not b and (a is None or b is None or not torch.equal(a, b)) for a, b in zip(given, incoming, strict=True)
    ):
        raise UserError(
            "a module's full backward hook changes a gradient, which second derivatives would go through twice: remove() it, or "
            "take differences of gradients (derivative='difference', method='difference')"
        )


def checkpointed() -> bool | None:
    """Whether this runs in a block of (non-reentrant) activation checkpointing; None before torch 2.8, where nothing tells."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return None
    hooks = top(True)
    return hooks is not None and "checkpoint" in getattr(hooks[0], "__module__", "")


def transformed() -> bool:
    """Whether this runs inside torch.func (grad, jvp, vmap ...) or forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


# --- composed functions, with PyTorch's arguments ---------------------------------------------------------------------------


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, the norm over all dimensions but dim."""
    _require_no_checkpoint("weight_norm")
    return v * (g / torch.norm_except_dim(v, 2, dim))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """LayerNorm."""
    _require_no_checkpoint("layer_norm")
    n = _normal(input, list(range(-len(normalized_shape), 0)), eps)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm; by fixed statistics, and where it moves statistics, it is PyTorch's."""
    if not training or running_mean is not None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _by_channel(input, [0, *range(2, input.ndim)], weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """InstanceNorm; by fixed statistics, and where it moves statistics, it is PyTorch's."""
    if not use_input_stats or running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _by_channel(input, list(range(2, input.ndim)), weight, bias, eps)


def _by_channel(x: Tensor, dims: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _require_no_checkpoint("batch_norm or instance_norm")
    n, shape = _normal(x, dims, eps), [-1, *[1] * (x.ndim - 2)]
    n = n if weight is None else n * weight.view(shape)
    return n if bias is None else n + bias.view(shape)


def _normal(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _require_no_checkpoint(name: str) -> None:
    if checkpointed():  # where nothing tells, the block that runs again saves other tensors, and PyTorch raises
        raise UserError(
            f"{name} in a block under activation checkpointing, where its derivatives are PyTorch's and the one needed here wrong: "
            "take the block out of checkpointing, or differences of gradients (method='difference', derivative='difference')"
        )


# --- who calls what -----------------------------------------------------------------------------------------------------------


def _grad(*args: Any, create_graph: bool = False, **kwargs: Any) -> Any:
    if create_graph:
        raise DifferentiatesItself
    return torch.autograd.grad(*args, **kwargs)


def _untransformed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(*args: Any, **kwargs: Any) -> Tensor:
        if transformed():
            raise DifferentiatesItself
        return function(*args, **kwargs)

    return called


_COMPOSED: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
_ALWAYS: dict[Any, Callable[..., Any]] = {torch._weight_norm: weight_norm}
_THIRD = _ALWAYS | _COMPOSED
_SECOND = _ALWAYS | {torch.autograd.grad: _grad} | {function: _untransformed(function) for function in _COMPOSED}
