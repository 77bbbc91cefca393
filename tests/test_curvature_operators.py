"""Vectors as lists and as dictionaries, `@`, and one definition of each ascent for training and for measuring."""

import pytest
import torch
from conftest import TinyModel, adamw, gradients, make_batch, make_model
from test_curvature import case, directions, error, flat, seeded  # noqa: F401

from functional_sam import SharpnessAware
from functional_sam.curvature import CurvatureProducts, decompose, eigenvalues
from functional_sam.curvature.ascent import direction
from functional_sam.errors import UserError

NAMES = ("hessian", "gauss_newton", "functional")


def test_products_take_and_give_dictionaries():
    """By the names of the parameters, in any order; a part of the parameters by theirs."""
    model, batches = case("decoder")
    for chosen in (None, ["attention", "norm"]):
        products = CurvatureProducts(model, batches, parameters=chosen)
        v = directions(products)
        named = dict(reversed(products.named(v).items()))
        assert set(named) == {n for n, p in model.named_parameters() if any(p is q for q in products.parameters)}
        for name in NAMES:
            operator = getattr(products, name)
            result = operator @ named
            assert isinstance(result, dict)
            assert list(result) == list(products.named(v))
            assert isinstance(operator @ v, list)
            assert error(list(result.values()), operator(v)) == 0
            assert operator.shape == (sum(p.numel() for p in products.parameters),) * 2
        for half, expected in zip(products.split(named), products.split(v), strict=True):
            assert error(list(half.values()), expected) == 0
        assert float(products.loss_along(named, 0.1)) == float(products.loss_along(v, 0.1))


def test_operators_of_adams_geometry():
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches)
    geometry = products.in_adam_geometry(second_moments=[torch.rand_like(p) for p in products.parameters])
    v = directions(products)
    named = products.named(v)
    for name in NAMES:
        assert error(list((getattr(geometry, name) @ named).values()), getattr(geometry, name)(v)) == 0
    logit, func = geometry.split(named)
    assert error(list(func.values()), geometry.functional @ v) < 1e-12
    assert error(list(logit.values()), geometry.gauss_newton @ v) < 1e-12
    tops = []
    for product in (geometry.hessian, lambda v: geometry.hessian @ v):
        generator = torch.Generator().manual_seed(0)
        tops.append(eigenvalues(product, geometry.parameters, end="top", max_products=40, generator=generator).top[0].value)
    assert tops[0] == tops[1]


def test_wrong_names_and_shapes():
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches)
    named = products.named(directions(products))
    first = next(iter(named))
    for wrong, words in [
        ({n: t for n, t in named.items() if n != first}, f"lacks '{first}'"),
        ({**named, "head.bias": torch.zeros(3)}, "has 'head.bias', which is none"),
        ({**named, first: torch.zeros(3)}, "v has shapes"),
    ]:
        with pytest.raises(UserError, match=words):
            products.hessian @ wrong


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=(0.9, 0.98), eps=1e-6),
    "amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.9),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("ascent", ["gradient", "adam", "adaptive", "fisher", "momentum"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_measuring_looks_where_training_goes(kind, ascent, unused):
    """theta' - theta of a step, over its length, is the direction that is measured; with a parameter that has no state too."""
    model = make_model(TinyModel)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(3):
        SharpnessAware(model, optimizer, "plain").backward([make_batch(seed=step)])
        optimizer.step()
    if unused:
        optimizer.state.pop(model.down.weight)
    theta, seen = [p.detach().clone() for p in model.parameters()], []

    def forward(model, inputs):
        seen.append([p.detach().clone() for p in model.parameters()])
        return model(inputs)

    lacks = (ascent == "adam" and kind == "sgd") or (ascent == "momentum" and kind == "adagrad")
    batch = make_batch(seed=7)
    if lacks:
        with pytest.raises(UserError, match="does not keep"):
            SharpnessAware(model, optimizer, "sam", ascent=ascent)
        with pytest.raises(UserError, match="does not keep"):
            decompose(model.eval(), [batch], ascent, optimizer)
        return
    SharpnessAware(model, optimizer, "sam", rho=0.3, ascent=ascent, forward=forward).backward([batch])
    moved = flat([there - here for there, here in zip(seen[-1], theta, strict=True)])
    products = CurvatureProducts(model, [batch])
    measured = flat(list(direction(ascent, products.gradient(), products.parameters, optimizer)))
    torch.testing.assert_close(moved / moved.norm(), measured / measured.norm(), rtol=1e-9, atol=1e-12)
    if unused and ascent in ("adam", "momentum"):
        assert not (seen[-1][3] - theta[3]).any()


def test_a_geometry_of_any_optimizer_with_second_moments():
    """P^1/2 g along itself is P g; a parameter without a second moment stays: its row and column are zero."""
    for kind in ("rmsprop", "adagrad", "amsgrad"):
        model = make_model(TinyModel)
        optimizer = OPTIMIZERS[kind](model.parameters())
        SharpnessAware(model, optimizer, "plain").backward([make_batch()])
        optimizer.step()
        optimizer.state.pop(model.down.weight)
        products = CurvatureProducts(model, [make_batch()])
        geometry = products.in_adam_geometry(optimizer)
        expected = direction("adam", products.gradient(), products.parameters, optimizer)
        assert error([s * g for s, g in zip(geometry.scales, geometry.gradient(), strict=True)], list(expected)) < 1e-12
        result = products.named(geometry.hessian @ directions(products))
        assert not result["down.weight"].any()
        assert result["up.weight"].any()


def test_the_optimizer_that_measures_is_asked_for():
    model, batches = case("decoder")
    with pytest.raises(UserError, match="needs optimizer="):
        decompose(model, batches, "adam")
    part = adamw(torch.nn.ModuleList([model.blocks]))
    with pytest.raises(UserError, match="holds every trainable parameter"):
        decompose(model, batches, "adam", part)
    assert not gradients(model)
