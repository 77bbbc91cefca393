"""Where second derivatives exist, where weights are moved to, and models that are no function of their inputs and weights."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from functional_sam.errors import UserError
from functional_sam.weights import moved


def require_evaluation(model: nn.Module) -> None:
    """Raise UserError for active dropout and batch normalization in training mode, which make each pass one of another loss."""
    for name, module in model.named_modules():
        random = any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
        random = random or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        if module.training and (random or isinstance(module, _BatchNorm)):
            kind = type(module).__name__
            raise UserError(f"curvature of a model in training mode with an active {kind} ({name!r}): call model.eval() first")


@contextlib.contextmanager
def second_order(model: nn.Module, device: str) -> Iterator[None]:
    """Eager, gradients on, autocast off, plain attention.

    Raises UserError as require_evaluation does.
    """
    require_evaluation(model)
    # Only compiled code needs telling, and torch._dynamo, slow to import, is there if any was.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with eager, torch.enable_grad(), torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


def moved_along(
    model: nn.Module, parameters: Sequence[nn.Parameter], v: Sequence[Tensor], step: float
) -> contextlib.AbstractContextManager[Any]:
    """theta + step v inside the block; after it theta bit for bit, by copy."""
    return moved(model, parameters, lambda: torch._foreach_add_(list(parameters), [v_i.detach() for v_i in v], alpha=step))


@contextlib.contextmanager
def drawing_nothing(device: torch.device) -> Iterator[None]:
    """Raises UserError if the block drew from PyTorch's random generators: dropout or noise that no module announces."""
    before = _random_states(device)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True)):
        raise UserError(
            "curvature of a model whose forward draws random numbers: each product would be one of another loss. "
            "Call model.eval(), or take the noise out of forward"
        )


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        module: Any = torch.get_device_module(device)
        states.append(module.get_rng_state(device))
    return states
