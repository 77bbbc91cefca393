"""Where second derivatives exist, where weights are moved to, and models that are no function of their inputs and weights."""

import contextlib
import sys
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from functional_sam.curvature.buffers import Buffers, written
from functional_sam.derivatives import missing_derivatives_named, slow_attention
from functional_sam.errors import UserError
from functional_sam.weights import moved

# Of this process, and autograd's own threads run in what the one that holds it has set: PyTorch's switches, and functions.py's.
one_at_a_time = threading.RLock()


def require_evaluation(model: nn.Module) -> None:
    """Raise UserError for what makes each pass one of another loss: active dropout, batch normalization in training mode, and an
    embedding that writes to its own weights."""
    for name, module in model.named_modules():
        random = any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
        random = random or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        if module.training and (random or isinstance(module, _BatchNorm)):
            kind = type(module).__name__
            raise UserError(f"curvature of a model in training mode with an active {kind} ({name!r}): call model.eval() first")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None and module.weight.requires_grad:
            raise UserError(
                f"curvature of a model whose {name!r} has max_norm={module.max_norm:g}, by which forward writes to its weights: "
                "set max_norm = None while it is measured"
            )


def require_gradients_possible(model: nn.Module, parameters: Sequence[Tensor], before: Container[Tensor]) -> None:
    """Raise UserError inside torch.inference_mode(), where all derivatives are zero, for parameters that were made there, and for
    those that have been frozen, or replaced in the model, since they were selected; before: those of the model then."""
    if torch.is_inference_mode_enabled():
        raise UserError(
            "curvature under torch.inference_mode(), where there are no derivatives: take it outside, or use torch.no_grad()"
        )
    if any(p.is_inference() for p in parameters):
        raise UserError("parameters made under torch.inference_mode(), which have no derivatives: build or load the model outside")
    present = set(model.parameters())
    for p in parameters:
        gone = p in before and p not in present and not hasattr(p, "device_mesh")  # FSDP2 may have it gathered just now
        if gone or not p.requires_grad:
            what = "is no longer the model's" if gone else "is frozen now"
            raise UserError(
                f"a parameter of shape {list(p.shape)} {what}, and was one when CurvatureProducts was made: make it anew"
            )


def require_no_hooks(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raise UserError for a parameter whose gradient a hook may change: it would change a product too, twice and on both sides."""
    hooked = [name for name, p in zip(names, parameters, strict=True) if p._backward_hooks]
    if hooked:
        raise UserError(
            f"{hooked[0]} has a hook on its gradient (register_hook), which exact products would go through twice: remove() it "
            "while curvature is measured, or method='difference', for that of the gradient as the hook leaves it"
        )


@contextlib.contextmanager
def second_order(model: nn.Module, device: str) -> Iterator[None]:
    """Eager, gradients on, autocast off, plain attention; one thread at a time.

    Raises UserError as require_evaluation does.
    """
    require_evaluation(model)
    # Only compiled code needs telling, and torch._dynamo, slow to import, is there if any was.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    plain = torch.autocast(device, enabled=False)
    with (
        one_at_a_time,
        eager,
        torch.enable_grad(),
        plain,
        sdpa_kernel(SDPBackend.MATH),
        slow_attention(),
        missing_derivatives_named(),
    ):
        yield


def moved_along(
    model: nn.Module, parameters: Sequence[nn.Parameter], v: Sequence[Tensor], step: float
) -> contextlib.AbstractContextManager[Any]:
    """theta + step v inside the block; after it theta bit for bit, by copy."""
    return moved(model, parameters, lambda: torch._foreach_add_(list(parameters), [v_i.detach() for v_i in v], alpha=step))


def without_graph(forward: Callable[[], Any]) -> Any:
    """forward() under no_grad; one that takes derivatives itself, and so cannot do without, with gradients on and then detached."""
    try:
        with torch.no_grad():
            return forward()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        result = forward()
    if isinstance(result, Tensor):
        return result.detach()
    return tuple(t.detach() for t in result) if isinstance(result, tuple) and all(isinstance(t, Tensor) for t in result) else result


@contextlib.contextmanager
def repeatable(model: nn.Module, inputs: Any, device: torch.device, outside: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Raises UserError if the block drew from PyTorch's random generators, dropout or noise that no module announces, or changed
    the inputs or what a buffer of the model, or of a module outside, holds; the buffer is put back, whatever is raised."""
    before, buffers, given = _random_states(device), Buffers(model, *outside), written(inputs)
    try:
        yield
    finally:
        changed = buffers.put_back()
    if any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True)):
        raise UserError(
            "curvature of a model whose forward draws random numbers: each product would be one of another loss. "
            "Call model.eval(), or take the noise out of forward"
        )
    if written(inputs) != given:
        raise UserError("curvature of a model whose forward changes its inputs, which every product is of: let it work on a copy")
    if changed:
        advice = "Call model.eval(), or" if buffers.training else "It is in eval mode already:"
        raise UserError(
            f"curvature of a model whose forward changes its buffer {changed[0]!r} (running statistics, a moving "
            f"average): each product could be one of another loss. {advice} keep forward from changing it"
        )


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        module: Any = torch.get_device_module(device)
        states.append(module.get_rng_state(device))
    return states
