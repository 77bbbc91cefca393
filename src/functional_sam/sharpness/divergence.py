"""How far predictions have moved: a divergence between the logits of two passes, chunk by chunk; and inputs with noise."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from functional_sam.errors import UserError
from functional_sam.head import logit_chunks
from functional_sam.losses import IGNORE
from functional_sam.sharpness.passes import Kept
from functional_sam.weights import unwrapped


@torch.no_grad()
def divergence(there: Kept, here: Kept, old: dict[Tensor, Tensor], targets: Any) -> tuple[Tensor, Tensor]:
    """Return the sum over rows with a target of KL(softmax(z_old) || softmax(z_now)), and the number of these rows.

    there, here: what the passes at the old weights and at the present ones kept; old: parameter -> its old value. Chunk by chunk:
    with a readout there are never N x V logits. One logit a row is the mean of a normal number of variance 1 (least squares),
    whose KL is half the squared difference.
    """
    before, num_rows, num_classes = _rows(there, old)
    now, _, _ = _rows(here, {})
    total = torch.zeros((), dtype=torch.float64)
    classes = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == num_rows
    valid = (targets != IGNORE).reshape(-1) if classes else torch.ones(num_rows, dtype=torch.bool)
    for rows in logit_chunks(num_rows, num_classes):
        if num_classes == 1:
            moved = (before(rows) - now(rows)).square().sum(-1) / 2
        else:
            log_p, log_q = before(rows).log_softmax(-1), now(rows).log_softmax(-1)
            p = log_p.exp()
            moved = (p * log_p.sub(log_q)).masked_fill_(p == 0, 0.0).sum(-1)  # 0 log 0 = 0: classes that are masked out
        total = total.to(moved.device) + moved.where(valid[rows].to(moved.device), 0.0).double().sum()
    return total, valid.sum().to(total.device)


@contextlib.contextmanager
def noisy_inputs(model: nn.Module, sigma: float, seed: int) -> Iterator[None]:
    """Add noise to inputs x inside the block: x + z, z ~ N(0, sigma^2).

    x is what the input embedding returns, or without one the inputs that are real numbers. The embedding is the model's
    get_input_embeddings() where it has one, or its first nn.Embedding. Numbers are of a generator of their own: dropout draws
    what it would have drawn. Raises UserError after the block where no input was reached.
    """
    inner: Any = unwrapped(model)
    reached = False
    generators: dict[torch.device, torch.Generator] = {}

    def noisy(x: Any) -> Any:
        nonlocal reached
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        reached = True
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(seed))
        return x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    own: Any = getattr(inner, "get_input_embeddings", lambda: None)()
    embedding = own or next((module for module in inner.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is not None:
        handle = embedding.register_forward_hook(lambda module, inputs, output: noisy(output))
    else:
        handle = inner.register_forward_pre_hook(
            lambda module, args, kwargs: (tuple(map(noisy, args)), {key: noisy(value) for key, value in kwargs.items()}),
            with_kwargs=True,
        )
    try:
        yield
    finally:
        handle.remove()
    if not reached:
        raise UserError(
            f'divergence="noise" found no input of {type(inner).__name__} to add noise to: give the model get_input_embeddings(), '
            "the module whose output is the embedded input"
        )


def _rows(memory: Kept, values: dict[Tensor, Tensor]) -> tuple[Callable[[slice], Tensor], int, int]:
    """(rows -> their logits in float32 at least, number of rows, of classes); `values` of the parameters at that point."""
    if memory.h is None:
        assert memory.logits is not None
        if memory.logits.ndim < 2:
            raise UserError(f"logits {list(memory.logits.shape)}: a divergence of softmaxes needs logits [..., V]")
        logits = memory.logits.flatten(0, -2)
        return lambda rows: _widened(logits[rows]), *logits.shape
    assert memory.weight is not None
    h = memory.h.flatten(0, -2)
    weight = values.get(memory.weight, memory.weight).detach().to(h.dtype)
    return lambda rows: _widened(h[rows] @ weight.T), len(h), len(weight)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
