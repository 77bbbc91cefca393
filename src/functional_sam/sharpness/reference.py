"""The method on one readable page: torch.func, nothing in place, one batch. Tests hold the fast version to it.

theta is a dict of tensors, z = F(theta) the logits, u = dL/dz, J = dz/dtheta; vjp(F, theta) gives z and u -> J^T u.
The paper's four methods are two choices, each a line:

    which derivative  sam            J(theta')^T u(theta')   functional_sam  J(theta')^T u(theta)
    where theta' is   SAM's ascent   theta + rho g / |g|    preconditioned  theta + rho P g / |P g|, P = adam_preconditioner(...)

Source: Singh et al. 2025 (Functional-SAM), whose listing differs from SAM in the last lines only.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp
from torch.nn import functional as F

Theta = dict[str, Tensor]


def logits_of(model: torch.nn.Module, inputs: Tensor) -> Callable[[Theta], Tensor]:
    """F: theta -> z for fixed inputs."""
    return lambda theta: functional_call(model, theta, (inputs,))


def mean_loss(targets: Tensor) -> Callable[[Tensor], Tensor]:
    """L: z -> mean cross-entropy over the targets that are not -100."""
    return lambda z: F.cross_entropy(z.flatten(0, -2), targets.flatten())


def norm(vector: Theta) -> Tensor:
    """Euclidean norm of all entries together."""
    return torch.stack([value.square().sum() for value in vector.values()]).sum().sqrt()


def adam_preconditioner(v: Theta, steps: int, beta2: float, e: float) -> Theta:
    """P = 1 / (sqrt(v_hat) + e), v_hat = v / (1 - beta2^steps): v is Adam's running mean of g^2 after `steps` steps.

    P = 0 where v = 0, at words that were not met so far: 1 / e would give them nearly all of the ascent.
    """
    return {name: (v_ > 0) / ((v_ / (1 - beta2**steps)).sqrt() + e) for name, v_ in v.items()}


def ascend(theta: Theta, g: Theta, rho: float, preconditioner: Theta | None = None) -> Theta:
    """theta' = theta + rho d / |d|, d = g (SAM) or P g (preconditioned)."""
    d = g if preconditioner is None else {name: preconditioner[name] * g[name] for name in g}
    size = norm(d)
    return {name: theta[name] + rho * d[name] / size for name in theta}


def sam(
    model: torch.nn.Module, theta: Theta, inputs: Tensor, targets: Tensor, rho: float, preconditioner: Theta | None = None
) -> Theta:
    """J(theta')^T u(theta')."""
    z_of, loss = logits_of(model, inputs), mean_loss(targets)
    z, pull_back = vjp(z_of, theta)[:2]
    u = grad(loss)(z)
    theta_ = ascend(theta, pull_back(u)[0], rho, preconditioner)
    z_, pull_back_ = vjp(z_of, theta_)[:2]
    u_ = grad(loss)(z_)
    result: Theta = pull_back_(u_)[0]
    return result


def functional_sam(
    model: torch.nn.Module, theta: Theta, inputs: Tensor, targets: Tensor, rho: float, preconditioner: Theta | None = None
) -> Theta:
    """J(theta')^T u(theta): SAM's lines but the last two."""
    z_of, loss = logits_of(model, inputs), mean_loss(targets)
    z, pull_back = vjp(z_of, theta)[:2]
    u = grad(loss)(z)
    theta_ = ascend(theta, pull_back(u)[0], rho, preconditioner)
    _, pull_back_ = vjp(z_of, theta_)[:2]
    result: Theta = pull_back_(u)[0]
    return result


def logit_sam(
    model: torch.nn.Module, theta: Theta, inputs: Tensor, targets: Tensor, rho: float, preconditioner: Theta | None = None
) -> Theta:
    """J(theta)^T u(theta'): the other part."""
    z_of, loss = logits_of(model, inputs), mean_loss(targets)
    z, pull_back = vjp(z_of, theta)[:2]
    u = grad(loss)(z)
    theta_ = ascend(theta, pull_back(u)[0], rho, preconditioner)
    u_ = grad(loss)(z_of(theta_))
    result: Theta = pull_back(u_)[0]
    return result
