"""Numbers for the sharpness of a minimum: of H, and of its logit and its functional part apart.

theta the parameters, eps a unit vector, A one of H, H_G, H_F, P the number of parameters.
"""

from dataclasses import dataclass

import torch
from torch import Generator

from functional_sam.curvature.ascent import Ascent, direction
from functional_sam.curvature.geometry import Products
from functional_sam.curvature.lanczos import MAX_BASIS_BYTES
from functional_sam.curvature.spectrum import Eigenvalue, Eigenvalues, eigenvalues
from functional_sam.curvature.trace import TraceEstimate, estimate
from functional_sam.vectors import Space, dot, norm, ratio, unit


@dataclass(frozen=True)
class Measures:
    """Of one matrix A."""

    quadratic: float  # eps^T A eps
    norm: float  # |A eps|; of H_F it is |delta_func|, of H_G |delta_logit|
    trace: TraceEstimate
    top: Eigenvalue
    bottom: Eigenvalue
    num_products: int  # that Lanczos took


@dataclass(frozen=True)
class FunctionalSharpness:
    """The same measures of H, H_G and H_F, along one eps and with the same random vectors."""

    loss: float
    norm_gradient: float
    share: float  # |H_F eps| / (|H_F eps| + |H_G eps|)
    hessian: Measures
    gauss_newton: Measures
    functional: Measures


def functional_sharpness(
    products: Products,
    ascent: Ascent = "gradient",
    optimizer: torch.optim.Optimizer | None = None,
    *,
    probes: int = 30,
    max_products: int = 200,
    max_basis_bytes: int = MAX_BASIS_BYTES,
    tolerance: float = 1e-3,
    generator: Generator | None = None,
) -> FunctionalSharpness:
    """eps^T A eps, |A eps|, the trace and both ends of the spectrum for A = H, H_G and H_F: the usual sharpness and its halves.

    products: a CurvatureProducts, or its in_adam_geometry(...), whose directions are those of that geometry ("gradient" is then
    the preconditioned ascent). ascent, optimizer: see functional_sam.curvature.ascent.direction.
    probes: random vectors of the traces, common to the three; their standard error is of the probes alone. max_products: of each of
    the three Lanczos runs. max_basis_bytes, tolerance: see eigenvalues.
    Costs, in gradients with graphs kept, 2.3 for each probe and 1.2 to 1.9 for each product.
    Raises UserError as decompose and eigenvalues do.
    """
    loss, g = products.loss_and_gradient()
    eps = unit(direction(ascent, g, products.parameters, optimizer))
    logit, func = products.split(eps)
    along = {"gauss_newton": logit, "functional": func, "hessian": [a + b for a, b in zip(logit, func, strict=True)]}
    space = Space(products.parameters)
    samples: dict[str, list[float]] = {name: [] for name in along}
    for _ in range(probes):
        x = space.tensors(space.signs(generator))
        in_logit, in_func = (dot(x, half) for half in products.split(x))
        samples["gauss_newton"].append(in_logit)
        samples["functional"].append(in_func)
        samples["hessian"].append(in_logit + in_func)
    measured = {}
    for name, A_eps in along.items():
        ends: Eigenvalues = eigenvalues(
            getattr(products, name),
            products.parameters,
            max_products=max_products,
            max_basis_bytes=max_basis_bytes,
            tolerance=tolerance,
            generator=generator,
        )
        measured[name] = Measures(
            quadratic=dot(eps, A_eps),
            norm=norm(A_eps),
            trace=estimate(samples[name]),
            top=ends.top[0],
            bottom=ends.bottom[0],
            num_products=ends.num_products,
        )
    norm_logit, norm_func = norm(logit), norm(func)
    return FunctionalSharpness(float(loss), norm(g), ratio(norm_func, norm_func + norm_logit), **measured)
