"""The oracle: every gradient of the grid by its formula, with torch.func, nothing in place; and a check of itself."""

import math

import pytest
import torch
from conftest import TinyModel, make_batch, make_model
from torch.func import functional_call, grad, jvp, vjp
from torch.nn import functional as F


def norm(x):
    return math.sqrt(sum(float((value * value).sum().detach()) for value in x.values()))


def dot(x, y):
    return sum(float((x[name] * y[name]).sum()) for name in x)


def combine(a, x, b, y):
    return {name: a * x[name] + b * y[name] for name in x}


def state_of(model, optimizer, beta1=0.9, beta2=0.98, e=1e-9):
    """(m, P = 1 / (sqrt(v_hat) + e)) of AdamW by name."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    m = {name: state["exp_avg"].clone() for name, state in states.items()}
    precision = {
        name: 1 / ((state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())).sqrt() + e) for name, state in states.items()
    }
    return m, precision


def direction_of(ascent, theta, g, m, P, normalize_by="direction", eta=None, direction="ascent", preconditioned=False):
    """(d, size)."""
    if ascent == "gradient":
        return g, norm(g)
    if ascent == "adam":
        d = {n: P[n] * g[n] for n in g}
        return d, {"direction": norm(d), "gradient": norm(g), "energy": math.sqrt(dot(g, d))}[normalize_by]
    if ascent == "adaptive":
        T = {n: theta[n].abs() + (eta or 0.01) if theta[n].ndim > 1 else torch.ones_like(theta[n]) for n in g}
        return {n: T[n] ** 2 * g[n] for n in g}, norm({n: T[n] * g[n] for n in g})
    if ascent == "fisher":
        d = {n: g[n] / (1 + (eta or 1.0) * g[n] ** 2) for n in g}
        return d, math.sqrt(dot(g, d))
    sign = 1.0 if direction == "ascent" else -1.0
    d = {n: sign * m[n] * (P[n] if preconditioned else 1.0) for n in g}
    return d, norm(d)


def oracle(model, theta, batch, ascent="gradient", path="sam", rho=0.3, m=None, P=None, phi=45.0, forward=None, **options):
    """(g, method's gradient); rho a number or {name: number}."""
    inputs, targets = batch
    z_of = forward or (lambda values: functional_call(model, values, (inputs,)))

    def loss(z):
        return F.cross_entropy(z.flatten(0, -2), targets.flatten())

    z, pull = vjp(z_of, theta)
    u = grad(loss)(z)
    g = pull(u)[0]
    d, size = direction_of(ascent, theta, g, m, P, **options)
    eps = {n: (rho[n] if isinstance(rho, dict) else rho) * d[n] / size for n in d}
    there = combine(1.0, theta, 1.0, eps)
    if path == "sam":
        return g, grad(lambda values: loss(z_of(values)))(there)
    if path == "functional":
        return g, vjp(z_of, there)[1](u)[0]
    if path == "logit":
        return g, pull(grad(loss)(z_of(there)))[0]
    # Forward over reverse, the composition that is right for layer_norm.
    func = jvp(lambda values: vjp(z_of, values)[1](u)[0], (theta,), (eps,))[1]
    logit = pull(jvp(grad(loss), (z,), (jvp(z_of, (theta,), (eps,))[1],))[1])[0]
    a, b = math.sqrt(2) * math.cos(math.radians(phi)), math.sqrt(2) * math.sin(math.radians(phi))
    return g, {n: g[n] + a * func[n] + b * logit[n] for n in g}


def theta_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(a, b, tolerance=1e-10):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("phi", [0.0, 45.0, 90.0])
def test_its_second_derivatives_are_limits_of_its_paths(phi):
    """functional, sam and logit at rho = 1e-6, scaled up: forward over reverse is trusted no more than it deserves."""
    model = make_model(TinyModel)
    path = {0.0: "functional", 45.0: "sam", 90.0: "logit"}[phi]
    theta, scale = theta_of(model), {0.0: math.sqrt(2), 45.0: 1.0, 90.0: math.sqrt(2)}[phi]
    g, there = oracle(model, theta, make_batch(), path=path, rho=1e-6)
    _, penalty = oracle(model, theta, make_batch(), path="penalty", rho=1.0, phi=phi)
    close(combine(scale / 1e-6, there, -scale / 1e-6, g), combine(1.0, penalty, -1.0, g), 1e-4)
