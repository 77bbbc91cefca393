"""The decomposition against its formulas, written out with the products, in float64.

g the gradient, d an ascent direction, eps = d / |d|, H = H_G + H_F.
"""

import math

import pytest
import torch
from test_curvature import both, case, decoder, directions, error, flat, seeded, sentences, squares
from torch import nn

from functional_sam.curvature import CurvatureProducts, decompose, decompose_many, functional_sharpness, quadratic_fit
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy
from functional_sam.vectors import Space


def check(parts, products, d):
    """Every field against its formula."""
    g, eps = flat(products.gradient()), flat(d) / flat(d).norm()
    shaped = [e.view_as(p) for e, p in zip(eps.split([p.numel() for p in products.parameters]), products.parameters, strict=True)]
    logit, func = flat(products.gauss_newton(shaped)), flat(products.functional(shaped))
    cosine = lambda a, b: float(nn.functional.cosine_similarity(a, b, dim=0))  # noqa: E731
    assert error(parts.gradient, [g]) < 1e-13
    assert error(parts.delta_logit, [logit]) < 1e-12
    assert error(parts.delta_func, [func]) < 1e-12
    total = sum(cross_entropy(products.model(inputs), targets)[0].item() for inputs, targets in products.batches)
    count = sum(int((targets != IGNORE).sum()) for _, targets in products.batches)
    expected = {
        "loss": total / count,
        "norm_gradient": float(g.norm()),
        "norm_logit": float(logit.norm()),
        "norm_func": float(func.norm()),
        "share": float(func.norm() / (func.norm() + logit.norm())),
        "cosine": cosine(logit, func),
        "cosine_logit_gradient": cosine(logit, g),
        "cosine_func_gradient": cosine(func, g),
        "curvature_logit": float(eps @ logit),
        "curvature_func": float(eps @ func),
        "cosine_eps_gradient": cosine(eps, g),
    }
    for name, value in expected.items():
        assert getattr(parts, name) == pytest.approx(value, rel=1e-9), name


@both
def test_decompose_along_the_gradient(kind):
    model, batches = case(kind)
    products = CurvatureProducts(model, batches)
    check(decompose(model, batches), products, products.gradient())


def test_decompose_along_a_given_direction():
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches)
    d = directions(products)
    check(decompose(model, batches, ascent=d), products, d)


def test_decompose_along_adam():
    model, batches = case("decoder")
    names = dict(model.named_parameters())
    groups = [{"params": [p for n, p in names.items() if "norm" in n], "betas": (0.8, 0.9), "eps": 1e-3},
              {"params": [p for n, p in names.items() if "norm" not in n]}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-9)
    products = CurvatureProducts(model, batches)
    check(decompose(model, batches, "adam", optimizer), products, products.gradient())  # no state yet
    squares = {name: torch.zeros_like(p) for name, p in names.items()}
    for _ in range(3):
        for name, g_i in zip(names, products.gradient(), strict=True):
            names[name].grad = g_i
            beta = 0.9 if "norm" in name else 0.98
            squares[name] = beta * squares[name] + (1 - beta) * g_i**2
        optimizer.step()
    d = []
    for name, g_i in zip(names, products.gradient(), strict=True):
        beta, e = (0.9, 1e-3) if "norm" in name else (0.98, 1e-9)
        d.append(g_i / ((squares[name] / (1 - beta**3)).sqrt() + e))
    check(decompose(model, batches, "adam", optimizer), products, d)
    del optimizer.state[names["positions"]]  # as if it had never had a gradient: it stays, as in training
    d[list(names).index("positions")].zero_()
    check(decompose(model, batches, "adam", optimizer), products, d)


def test_decompose_along_the_other_ascents():
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches)
    g = products.gradient()
    adaptive = [g_i if p.ndim == 1 else g_i * (p.detach().abs() + 0.01) ** 2 for g_i, p in zip(g, products.parameters, strict=True)]
    check(decompose(model, batches, "adaptive"), products, adaptive)
    check(decompose(model, batches, "fisher", eta=3.0), products, [g_i / (1 + 3 * g_i**2) for g_i in g])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for factor in (1.0, 2.0):
        for p, g_i in zip(products.parameters, g, strict=True):
            p.grad = factor * g_i * g_i.sign() ** (1 if factor == 1 else 0)
        optimizer.step()
    buffers = [0.9 * g_i.abs() + 2 * g_i for g_i in g]
    check(decompose(model, batches, "momentum", optimizer), products, buffers)


@both
@pytest.mark.parametrize("by", ["kind", "layer"])
def test_parts_by_group(kind, by):
    """Norms restricted to a group; their squares add up."""
    model, batches = case(kind)
    found = decompose(model, batches)
    parts, names = getattr(found, f"by_{by}"), [name for name, _ in model.named_parameters()]
    assert (
        list(parts)
        == {
            ("decoder", "kind"): ["embedding", "norm", "attention", "mlp"],
            ("vit", "kind"): ["embedding", "norm", "attention", "mlp", "head"],
            ("decoder", "layer"): ["embedding", "blocks.0", "blocks.1", "norm"],
            ("vit", "layer"): ["embedding", "blocks.0", "blocks.1", "norm", "head"],
        }[kind, by]
    )
    assert sum(part.num_parameters for part in parts.values()) == sum(p.numel() for p in model.parameters())
    for field in ("gradient", "logit", "func"):
        total = sum(getattr(part, f"norm_{field}") ** 2 for part in parts.values())
        assert math.sqrt(total) == pytest.approx(getattr(found, f"norm_{field}"), rel=1e-12)
    assert sum(part.norm_eps**2 for part in parts.values()) == pytest.approx(1, rel=1e-12)
    group = {"kind": "mlp", "layer": "blocks.1"}[by]
    inside = [i for i, name in enumerate(names) if ("up" in name or "down" in name if by == "kind" else "blocks.1" in name)]
    func, logit = (float(flat([tensors[i] for i in inside]).norm()) for tensors in (found.delta_func, found.delta_logit))
    assert parts[group].norm_func == pytest.approx(func, rel=1e-12)
    assert parts[group].share == pytest.approx(func / (func + logit), rel=1e-12)


def test_quadratic_fit_is_the_loss_to_third_order():
    """What is left shrinks as rho^3; the weights come back bit for bit."""
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches)
    before, v = [p.detach().clone() for p in model.parameters()], directions(products)
    for ascent in ("gradient", v):
        fit = quadratic_fit(products, [1e-3, 2e-3, 0.0, -1e-3], ascent)
        d = products.gradient() if ascent == "gradient" else v
        eps = [t / flat(d).norm() for t in d]
        assert fit.slope == pytest.approx(float(flat(eps) @ flat(products.gradient())))
        assert fit.curvature == pytest.approx(float(flat(eps) @ flat(products.hessian(eps))))
        small, double, zero, back = fit.points
        left = [point.measured - point.predicted for point in (small, double)]
        assert left[1] / left[0] == pytest.approx(8, rel=0.05)
        assert small.error < 1e-3
        assert small.linear == pytest.approx(-back.linear)
        assert zero.measured == zero.predicted == 0
        assert math.isnan(zero.error)
    assert all(torch.equal(p, p_0) for p, p_0 in zip(model.parameters(), before, strict=True))
    for name in ("norm", "embedding"):
        fit = quadratic_fit(CurvatureProducts(model, batches, parameters=name), [1e-3])
        assert fit.points[0].error < 1e-3
    assert quadratic_fit(CurvatureProducts(model, batches, method="difference"), [1e-3]).points[0].error < 1e-3


@pytest.mark.parametrize("geometry", [False, True])
def test_functional_sharpness(geometry):
    """Every number against the dense matrices."""
    model = decoder(vocab=7, width=4, depth=1, heads=2, length=6, mlp=8)
    inputs = torch.randint(7, (3, 6), generator=seeded(1))
    products = CurvatureProducts(model, [(inputs, inputs.roll(-1, 1))])
    if geometry:
        products = products.in_adam_geometry(second_moments=[torch.rand_like(p) for p in model.parameters()], eps=1e-2)
    space = Space(products.parameters)
    found = functional_sharpness(products, probes=40, tolerance=1e-6, generator=seeded())
    g = space.flat(products.gradient())
    eps = g / g.norm()
    for name in ("hessian", "gauss_newton", "functional"):
        A = torch.stack([space.flat(getattr(products, name)(space.tensors(e))) for e in torch.eye(space.size, dtype=torch.float64)])
        values, measures = torch.linalg.eigvalsh(A), getattr(found, name)
        assert measures.quadratic == pytest.approx(float(eps @ A @ eps), rel=1e-9)
        assert measures.norm == pytest.approx(float((A @ eps).norm()), rel=1e-9)
        assert abs(measures.trace.mean - float(values.sum())) < 3 * measures.trace.stderr
        assert measures.trace.n == 40
        assert measures.top.value == pytest.approx(float(values[-1]), rel=1e-6)
        assert measures.bottom.value == pytest.approx(float(values[0]), abs=1e-6 * float(values.abs().max()))
        assert measures.top.converged
    assert found.share == pytest.approx(found.functional.norm / (found.functional.norm + found.gauss_newton.norm))
    assert found.hessian.trace.mean == pytest.approx(found.functional.trace.mean + found.gauss_newton.trace.mean)


def test_several_ascents_share_the_gradient():
    model, batches = case("decoder")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    along_g, along_v = decompose_many(model, batches, ["gradient", directions(CurvatureProducts(model, batches))])
    assert len(calls) == len(batches)  # one forward of each batch serves the gradient and both halves of each ascent
    assert along_g.gradient is along_v.gradient
    alone = decompose(model, batches)
    assert (alone.share, alone.cosine) == (along_g.share, along_g.cosine)


def test_another_forward_and_another_loss():
    """A model whose output is a dictionary, as those of Hugging Face are, with a loss of its own."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = decoder()

        def forward(self, tokens):
            return {"logits": self.inner(tokens)}

    model, batches = Wrapped(), [sentences(2)]
    parts = decompose(model, batches, loss_fn=squares, forward=lambda model, inputs: model(inputs)["logits"])
    plain = decompose(model.inner, batches, loss_fn=squares)
    assert error(parts.delta_func, plain.delta_func) < 1e-14
    assert parts.share == pytest.approx(plain.share, rel=1e-12)


def test_linear_model_is_all_logit():
    model = nn.Linear(4, 3, bias=False).double()
    batch = torch.randn(20, 4, dtype=torch.float64, generator=seeded()), torch.arange(20) % 3
    parts = decompose(model, [batch])
    assert (parts.share, parts.norm_func, parts.curvature_func) == (0, 0, 0)
    assert parts.norm_logit > 0
    assert math.isnan(parts.cosine)
    assert math.isnan(parts.cosine_func_gradient)


def test_user_errors():
    model, batches = case("decoder")
    for words, ascent, optimizer in (
        ("'adams'", "adams", None),
        ("optimizer=", "adam", None),
        ("every trainable", "adam", torch.optim.AdamW(decoder().parameters())),
        ("AdamW", "adam", torch.optim.SGD(model.parameters(), lr=0.1)),
        ("shapes", [torch.ones(3)], None),
        ("optimizer=", "momentum", None),
        ("is zero", [torch.zeros_like(p) for p in model.parameters()], None),
    ):
        with pytest.raises(UserError, match=words):
            decompose(model, batches, ascent, optimizer)
    with pytest.raises(FloatingPointError, match="norm nan"):
        decompose(model, batches, [torch.full_like(p, math.nan) for p in model.parameters()])
