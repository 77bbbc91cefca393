"""Derivatives that PyTorch has wrong, and forwards that take some themselves, against central differences; two threads."""

import threading

import pytest
import torch
from test_curvature import central_difference, directions, error, flat, moved, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from functional_sam.curvature import CurvatureProducts
from functional_sam.curvature.functions import gelu
from functional_sam.derivatives import Derivatives, DifferentiatesItself, layer_norm, twice_differentiable, weight_norm
from functional_sam.errors import UserError

X, Y = torch.randn(6, 5, dtype=torch.float64, generator=seeded()), torch.arange(6) % 4


def squares(z, targets):
    return (z - targets).square().sum(), len(targets)


def agree_with_central_differences(products, loss, tolerance=2e-7, h=1e-5):
    """H along a direction, its symmetry, and the sum of its halves; loss() with PyTorch's own functions. H_F: u is held by hand."""
    params = products.parameters
    v, w = directions(products), directions(products, seed=7)
    gradient = lambda: torch.autograd.grad(loss(), params, allow_unused=True, materialize_grads=True)  # noqa: E731
    assert error(products.gradient(), gradient()) < 1e-12
    reference = central_difference(gradient, params, v, h=h)
    assert error(products.hessian(v), reference) < tolerance
    assert float(flat(products.hessian(v)) @ flat(w)) == pytest.approx(float(flat(products.hessian(w)) @ flat(v)), rel=1e-10)
    logit, func = products.split(v)
    assert error([a + b for a, b in zip(logit, func, strict=True)], reference) < tolerance
    assert error(products.functional(v), CurvatureProducts(*products_of(products), method="difference").functional(v)) < tolerance


def products_of(products):
    return products.model, list(products.batches), products.loss_fn


# --- weight norm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", ["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm(kind, dim):
    wrap = nn.utils.parametrizations.weight_norm if kind == "parametrization" else nn.utils.weight_norm
    model = moved(nn.Sequential(wrap(nn.Linear(5, 7), dim=dim), nn.Tanh(), wrap(nn.Linear(7, 4))).double())
    agree_with_central_differences(CurvatureProducts(model, [(X, Y)]), lambda: F.cross_entropy(model(X), Y))


def test_weight_norm_where_the_quick_functions_do_not_serve():
    """The model changes in place what a quick function needs."""
    model = moved(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)).double())
    call = lambda model, x: F.gelu(model(x)).add_(1.0).square()  # noqa: E731
    products = CurvatureProducts(model, [(X, Y)], forward=call)
    gradient = lambda: torch.autograd.grad(F.cross_entropy(call(model, X), Y), products.parameters)  # noqa: E731
    v = directions(products)
    assert error(products.hessian(v), central_difference(gradient, products.parameters, v, h=1e-5)) < 2e-7


def test_composed_functions_in_a_checkpointed_block_are_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)).double()
    products = CurvatureProducts(layer, [(X, Y)], forward=lambda model, x: checkpoint(model, x, use_reentrant=False))
    with pytest.raises((UserError, RuntimeError), match=r"activation checkpointing.*method='difference'|recomputation"):
        products.gradient()  # before torch 2.8 nothing tells of the block, and checkpoint itself raises


def test_derivatives_serve_other_double_backwards():
    """As sharpness may use them: around a forward alone."""
    model = moved(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)).double())
    params = list(model.parameters())
    v = [torch.randn(p.shape, dtype=p.dtype, generator=seeded(3)) for p in params]
    g = torch.autograd.grad(F.cross_entropy(twice_differentiable(lambda: model(X)), Y), params, create_graph=True)
    Hv = torch.autograd.grad(g, params, v)
    gradient = lambda: torch.autograd.grad(F.cross_entropy(model(X), Y), params)  # noqa: E731
    assert error(Hv, central_difference(gradient, params, v, h=1e-5)) < 2e-7


def test_twice_differentiable_runs_again_for_a_forward_that_differentiates():
    calls = []

    def forward():
        calls.append(1)
        x = X.clone().requires_grad_()
        return torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0]

    torch.testing.assert_close(twice_differentiable(forward).detach(), 3 * X * X)
    assert len(calls) == 2


# --- forwards that take derivatives themselves ---------------------------------------------------------------------------------


class Field(nn.Module):
    """u(x) and du/dx, as in a physics-informed net or a force field."""

    def __init__(self, act, inner="grad"):
        super().__init__()
        self.a, self.b, self.act, self.inner = nn.Linear(2, 6), nn.Linear(6, 1), act, inner

    def u(self, x):
        return self.b(self.act(self.a(x)))

    def forward(self, x):
        if self.inner == "jvp":
            return torch.cat([self.u(x), torch.func.jvp(self.u, (x,), (torch.ones_like(x),))[1]], -1)
        x = x.detach().requires_grad_()
        u = self.u(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        if self.inner == "twice":
            (du,) = torch.autograd.grad(du.square().sum(), x, create_graph=True)
        return torch.cat([u, du], -1)


class Attention(nn.Module):
    def forward(self, h):
        q = h.unsqueeze(-1)
        return F.scaled_dot_product_attention(q, q, q).squeeze(-1)


PLACES = torch.randn(4, 2, dtype=torch.float64, generator=seeded(5))
NORMS = {
    "layer_norm": lambda: nn.Sequential(nn.LayerNorm(6), nn.Tanh()),
    "layer_norm of two": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.LayerNorm((2, 3)), nn.Flatten(), nn.Tanh()),
    "instance_norm": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Tanh()),
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False).eval(), nn.Tanh()),
}
SMOOTH = {"gelu": nn.GELU, "tanh gelu": lambda: nn.GELU("tanh"), "silu": nn.SiLU, "tanh": nn.Tanh, "attention": Attention}


@pytest.mark.parametrize("retain", ["auto", False])
@pytest.mark.parametrize("inner", ["grad", "twice"])
@pytest.mark.parametrize("act", [*SMOOTH, *NORMS])
def test_forward_that_takes_derivatives(act, inner, retain):
    model = moved(Field((SMOOTH | NORMS)[act](), inner).double().eval())
    targets = torch.randn(4, 3, dtype=torch.float64, generator=seeded(6))
    products = CurvatureProducts(model, [(PLACES, targets)], squares, retain=retain)
    loss = lambda: squares(twice_differentiable(lambda: model(PLACES)), targets)[0] / 4  # noqa: E731
    v = directions(products)
    plain = squares(model(PLACES), targets)[0] / 4
    assert float(products.loss()) == pytest.approx(float(plain.detach()), rel=1e-12)
    # the gradient of a derivative twice taken is of third order too: it is held to the loss itself
    slope = central_difference(lambda: [squares(model(PLACES), targets)[0].detach() / 4], products.parameters, v, h=1e-5)
    assert float(flat(products.gradient()) @ flat(v)) == pytest.approx(float(slope[0]), rel=1e-6)
    gradient = lambda: torch.autograd.grad(loss(), products.parameters, allow_unused=True, materialize_grads=True)  # noqa: E731
    reference = central_difference(gradient, products.parameters, v, h=1e-5)
    assert error(products.hessian(v), reference) < 1e-6
    assert error([a + b for a, b in zip(*products.split(v), strict=True)], reference) < 1e-6
    w = directions(products, seed=7)
    assert float(flat(products.hessian(v)) @ flat(w)) == pytest.approx(float(flat(products.hessian(w)) @ flat(v)), rel=1e-9)


@pytest.mark.parametrize("act", ["gelu", "layer_norm", "tanh"])
def test_forward_in_tangents(act):
    """torch.func.jvp in forward; PyTorch's own gradient through a layer_norm is wrong there, so the loss is the reference."""
    model = moved(Field((SMOOTH | NORMS)[act](), "jvp").double())
    targets = torch.randn(4, 2, dtype=torch.float64, generator=seeded(6))
    products = CurvatureProducts(model, [(PLACES, targets)], squares)
    v = directions(products)
    slope = central_difference(lambda: [squares(model(PLACES), targets)[0].detach() / 4], products.parameters, v, h=1e-5)
    assert float(flat(products.gradient()) @ flat(v)) == pytest.approx(float(slope[0]), rel=1e-6)
    bend = central_difference(lambda: [flat(products.gradient()) @ flat(v)], products.parameters, v, h=1e-5)
    assert float(flat(products.hessian(v)) @ flat(v)) == pytest.approx(float(bend[0]), rel=1e-6)


def test_torch_func_in_forward():
    """vmap goes on as ever; where PyTorch cannot, the way out is said."""
    layer = moved(nn.Linear(5, 4).double())
    over_rows = lambda model, x: torch.vmap(lambda row: F.gelu(model(row)))(x)  # noqa: E731
    products = CurvatureProducts(layer, [(X, Y)], forward=over_rows)
    plain = CurvatureProducts(layer, [(X, Y)], forward=lambda model, x: F.gelu(model(x)))
    v = directions(products)
    assert error(products.hessian(v), plain.hessian(v)) < 1e-12
    inside = lambda model, x: torch.func.grad(lambda y: model(y).tanh().sum())(x)  # noqa: E731
    with pytest.raises(UserError, match="method='difference'"):
        CurvatureProducts(layer, [(X, Y)], forward=inside).hessian(v)


def test_loss_of_a_forward_that_needs_gradients():
    """Its own loss(), the loss along a direction, and differences, which take forwards without gradients too."""
    model = moved(Field(nn.Tanh()).double())
    targets = torch.randn(4, 3, dtype=torch.float64, generator=seeded(6))
    exact, differences = (
        CurvatureProducts(model, [(PLACES, targets)], squares, method=method) for method in ("exact", "difference")
    )
    loss = float((model(PLACES) - targets).square().sum().detach()) / 4
    v = directions(exact)
    for products in (exact, differences):
        assert float(products.loss()) == pytest.approx(loss, rel=1e-13)
        assert not products.loss().requires_grad
        assert float(products.loss_along(v, 1e-3)) != loss
    for name in ("hessian", "gauss_newton", "functional"):
        assert error(getattr(differences, name)(v), getattr(exact, name)(v)) < 1e-8


def test_a_quick_derivative_is_not_differentiated_again():
    """The functions of functions.py say so themselves; Derivatives says so of what is not theirs."""
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    with pytest.raises(DifferentiatesItself):
        torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(DifferentiatesItself), Derivatives():
        torch.autograd.grad(x.exp().sum(), x, create_graph=True)
    with Derivatives():
        assert torch.equal(torch.autograd.grad(x.exp().sum(), x)[0], X.exp())


def test_composed_functions_are_pytorch_s():
    v, g = X.clone(), torch.linspace(1, 2, 6, dtype=X.dtype).unsqueeze(-1)
    torch.testing.assert_close(weight_norm(v, g, 0), torch._weight_norm(v, g, 0), rtol=1e-13, atol=1e-14)
    scale, shift = torch.linspace(1, 2, 5, dtype=X.dtype), torch.linspace(0, 1, 5, dtype=X.dtype)
    torch.testing.assert_close(layer_norm(X, (5,), scale, shift), F.layer_norm(X, (5,), scale, shift), rtol=1e-13, atol=1e-14)


# --- threads --------------------------------------------------------------------------------------------------------------------


def test_products_of_two_threads():
    """H of one model while another thread takes H_G of another: the derivatives they ask of the same functions differ."""

    def net():
        layers = [nn.Linear(5, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)]
        return moved(nn.Sequential(*layers).double())

    first, second = (CurvatureProducts(net(), [(X, Y)]) for _ in range(2))
    v = directions(first)
    reference, worst, done = first.hessian(v), [0.0], threading.Event()

    def other():
        while not done.is_set():
            second.gauss_newton(directions(second))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(300):
            worst[0] = max(worst[0], error(first.hessian(v), reference))
    finally:
        done.set()
        thread.join()
    assert worst[0] < 1e-12
