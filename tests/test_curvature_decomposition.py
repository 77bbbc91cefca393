"""The decomposition against its formulas, written out with the products, in float64.

g the gradient, d an ascent direction, eps = d / |d|, H = H_G + H_F.
"""

import math

import pytest
import torch
from test_curvature import both, case, decoder, directions, error, flat, one_thread, seeded, sentences, squares  # noqa: F401
from torch import nn

from functional_sam.curvature import CurvatureProducts, decompose, decompose_many
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy


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
    del optimizer.state[names["positions"]]  # as if it had never had a gradient
    at = list(names).index("positions")
    g_i = products.gradient()[at]
    d[at] = g_i / (g_i.abs() + 1e-9)
    check(decompose(model, batches, "adam", optimizer), products, d)


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
        ("norm 0.0", [torch.zeros_like(p) for p in model.parameters()], None),
        ("norm nan", [torch.full_like(p, math.nan) for p in model.parameters()], None),
    ):
        with pytest.raises(UserError, match=words):
            decompose(model, batches, ascent, optimizer)
