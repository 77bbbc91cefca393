"""Parameters with a gradient at one of theta and theta' only, as a routed expert has: the one that is not there is zero."""

import math

import pytest
import torch
from conftest import adamw, gradients, make_model
from test_sharpness_oracle import close, combine, norm, theta_of
from torch.nn import functional as F

from functional_sam import SharpnessAware


class Routed(torch.nn.Module):
    """One expert where the gate is near where it began, the other elsewhere, as top-k routing changes between theta and theta'."""

    def __init__(self):
        super().__init__()
        self.gate, self.here, self.there = (torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3))
        self.margin = math.inf

    def forward(self, x):
        expert = self.here if (self.gate - self.began).norm() <= self.margin else self.there
        return (x @ self.gate).tanh() * (x @ expert) + x @ self.gate


def routed(rho, fraction=0.5):
    """(model, batch, theta, g, g' at theta + rho g/|g|), the change of expert a fraction of the way."""
    model = make_model(Routed)
    theta = theta_of(model)
    model.began = theta["gate"]
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))

    def pulled(u=None):
        z, named = model(inputs), dict(model.named_parameters())
        u = torch.autograd.grad(F.cross_entropy(z, targets), z, retain_graph=True)[0] if u is None else u
        grads = torch.autograd.grad(z, list(named.values()), u, allow_unused=True, materialize_grads=True)
        return dict(zip(named, grads, strict=True)), u

    g, u = pulled()
    step = {n: rho * x / norm(g) for n, x in g.items()}
    model.margin = fraction * float(step["gate"].norm())
    model.load_state_dict(combine(1.0, theta, 1.0, step))
    (there, _), (functional, _) = pulled(), pulled(u)
    model.load_state_dict(theta)
    assert not g["there"].any()
    assert not there["here"].any()
    assert there["there"].any()
    return model, (inputs, targets), g, there, functional


def orthogonal(x, y):
    """The part of x orthogonal to y."""
    return combine(1.0, x, -sum(float((x[n] * y[n]).sum()) for n in x) / norm(y) ** 2, y)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("gnp", {}, lambda g, there: combine(0.2, g, 0.8, there)),
        ("gsam", {}, lambda g, there: combine(1.0, there, -1.0, orthogonal(g, there))),
        ("wsam", {"decoupled": False}, lambda g, there: combine(-8.0, g, 9.0, there)),
        ("wsam", {}, lambda g, there: combine(-8.0, g, 9.0, there)),
        ("looksam", {}, lambda g, there: there),
    ],
)
def test_mixes_of_parameters_with_one_of_the_two_gradients(method, options, expected):
    """The one that is not there is zero. Through the weights after a step of SGD, which a decoupled wsam moves after it."""
    model, batch, g, there, _ = routed(0.3)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), theta_of(model)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.3, **options)
    sharpness.backward([batch])
    if method == "looksam":
        close({n: sharpness._mix.orthogonal[p] for n, p in model.named_parameters()}, orthogonal(there, g))
    optimizer.step()
    close(theta_of(model), combine(1.0, before, -0.1, expected(g, there)))


@pytest.mark.parametrize("phi", [0.0, 30.0, 45.0])
def test_differences_of_parameters_with_one_of_the_two_gradients(phi):
    model, batch, g, there, functional = routed(0.1)
    a, b = (math.sqrt(2) * f(math.radians(phi)) for f in (math.cos, math.sin))
    func, logit = combine(1.0, functional, -1.0, g), combine(1.0, there, -1.0, functional)
    options = {"derivative": "difference", "step": 0.1, "phi": phi}
    SharpnessAware(model, adamw(model), "angle-sam", rho=0.3, **options).backward([batch])
    close(gradients(model), combine(1.0, g, 3.0, combine(a, func, b, logit)))
