"""How much of the sharpness gradient is logit and how much functional: H eps = H_G eps + H_F eps.

theta the parameters, g the gradient, eps a unit vector, H_G and H_F the halves of the Hessian (see products.py).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functional_sam.curvature.ascent import Ascent, direction
from functional_sam.curvature.batches import Batch
from functional_sam.curvature.groups import labels
from functional_sam.curvature.linearization import Forward
from functional_sam.curvature.outer import LossFn
from functional_sam.curvature.products import MEMORY_BUDGET, CurvatureProducts
from functional_sam.losses import cross_entropy
from functional_sam.vectors import dot, norm, ratio, unit


@dataclass(frozen=True)
class Part:
    """The norms of eps, g, delta_logit and delta_func restricted to a group of parameters."""

    num_parameters: int
    norm_eps: float
    norm_gradient: float
    norm_logit: float
    norm_func: float

    @property
    def share(self) -> float:
        """|delta_func| / (|delta_func| + |delta_logit|) within the group, nan where both are zero."""
        return ratio(self.norm_func, self.norm_func + self.norm_logit)


@dataclass(frozen=True)
class Decomposition:
    """The two parts of H eps and what is said of them. Lists are shaped like the trainable parameters; numbers are floats.

    A cosine is nan where one of its vectors is zero, as delta_func is on a model linear in theta.
    """

    loss: float  # mean loss, nats per target for cross-entropy
    gradient: list[Tensor]  # g
    delta_logit: list[Tensor]  # H_G eps
    delta_func: list[Tensor]  # H_F eps
    norm_gradient: float
    norm_logit: float
    norm_func: float
    share: float  # |delta_func| / (|delta_func| + |delta_logit|), in [0, 1]
    cosine: float  # between delta_logit and delta_func
    cosine_logit_gradient: float
    cosine_func_gradient: float
    cosine_eps_gradient: float  # 1 for ascent="gradient"
    curvature_logit: float  # eps^T H_G eps, never negative for a loss convex in the logits
    curvature_func: float  # eps^T H_F eps
    by_kind: dict[str, Part]  # "embedding", "attention", "mlp", "norm", "head", and "other" for what no rule knows
    by_layer: dict[str, Part]  # "blocks.0", ..., and by kind what is outside of the blocks


def decompose(
    model: nn.Module,
    batches: Iterable[Batch],
    ascent: Ascent = "gradient",
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    *,
    eta: float | None = None,
    method: str = "exact",
    memory_budget: int = MEMORY_BUDGET,
) -> Decomposition:
    """Split the sharpness gradient along one ascent direction d into delta_logit = H_G eps and delta_func = H_F eps.

    eps = d / |d|, d by "gradient", "adam", "adaptive", "fisher" or "momentum", or itself as a list of tensors; see
    functional_sam.curvature.ascent.direction for the formulas, for optimizer and for eta.
    batches, loss_fn, forward, method ("difference" for a sharded model), memory_budget: see CurvatureProducts.
    Costs about 3.6 gradients where the graphs fit the budget (1.3 for g, 2.3 for both parts), about 5 where not.
    Raises UserError for an unknown ascent, for "adam" without an Adam that holds the parameters, for a d of zero, and whatever
    CurvatureProducts raises; FloatingPointError for a d that is not finite.
    Source: arXiv 2502.02407, for the split and for the preconditioned ascent, whose exact form there was not seen.
    """
    return decompose_many(
        model, batches, [ascent], optimizer, loss_fn, forward, eta=eta, method=method, memory_budget=memory_budget
    )[0]


def decompose_many(
    model: nn.Module,
    batches: Iterable[Batch],
    ascents: Sequence[Ascent],
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn = cross_entropy,
    forward: Forward | None = None,
    *,
    eta: float | None = None,
    method: str = "exact",
    memory_budget: int = MEMORY_BUDGET,
) -> list[Decomposition]:
    """Decompose along each of several ascents, which share one gradient and the graphs that fit the budget."""
    products = CurvatureProducts(model, batches, loss_fn, forward, method=method, memory_budget=memory_budget)
    loss, g = products.loss_and_gradient()
    return [_along(products, float(loss), g, unit(direction(d, g, products.parameters, optimizer, eta))) for d in ascents]


def _along(products: CurvatureProducts, loss: float, g: list[Tensor], eps: list[Tensor]) -> Decomposition:
    logit, func = products.split(eps)
    norm_g, norm_logit, norm_func = norm(g), norm(logit), norm(func)
    return Decomposition(
        loss=loss,
        gradient=g,
        delta_logit=logit,
        delta_func=func,
        norm_gradient=norm_g,
        norm_logit=norm_logit,
        norm_func=norm_func,
        share=ratio(norm_func, norm_func + norm_logit),
        cosine=ratio(dot(logit, func), norm_logit * norm_func),
        cosine_logit_gradient=ratio(dot(logit, g), norm_logit * norm_g),
        cosine_func_gradient=ratio(dot(func, g), norm_func * norm_g),
        cosine_eps_gradient=ratio(dot(eps, g), norm_g),
        curvature_logit=dot(eps, logit),
        curvature_func=dot(eps, func),
        by_kind=_parts(labels(products.model, products.parameters, "kind"), eps, g, logit, func),
        by_layer=_parts(labels(products.model, products.parameters, "layer"), eps, g, logit, func),
    )


def _parts(names: list[str], *vectors: list[Tensor]) -> dict[str, Part]:
    """Restrict the four vectors to groups of parameters; names: the group of each parameter."""
    squares: dict[str, list[float]] = {name: [0.0] * 4 for name in dict.fromkeys(names)}
    sizes = dict.fromkeys(squares, 0)
    for i, name in enumerate(names):
        sizes[name] += vectors[0][i].numel()
        for j, vector in enumerate(vectors):
            squares[name][j] += dot([vector[i]], [vector[i]])
    return {name: Part(sizes[name], *map(math.sqrt, sums)) for name, sums in squares.items()}
