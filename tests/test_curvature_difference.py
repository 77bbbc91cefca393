"""Differences of gradients against exact products, in one process and sharded over two.

theta the parameters, v a direction.
"""

import pytest
import torch
from conftest import make_batch, make_model
from processes import gloo
from test_curvature import both, case, decoder, directions, error, generic_cross_entropy, seeded, sentences
from torch import nn
from torch.distributed.fsdp import fully_shard

from functional_sam.curvature import CurvatureProducts, decompose, density, eigenvalues, hutch_plus_plus, hutchinson, quadratic_fit
from functional_sam.errors import UserError

NAMES = ("hessian", "gauss_newton", "functional")


@both
@pytest.mark.parametrize("loss_fn", [None, generic_cross_entropy])
def test_differences_are_the_products(kind, loss_fn):
    """To more digits than the error estimate promises."""
    model, batches = case(kind)
    options = {} if loss_fn is None else {"loss_fn": loss_fn}
    products, exact = (CurvatureProducts(model, batches, method=method, **options) for method in ("difference", "exact"))
    v = directions(exact)
    for name in NAMES:
        reference = getattr(exact, name)(v)
        off = error(getattr(products, name)(v), reference)
        assert off < 1e-8, name
        assert off < products.error < 1e-5, name
        assert exact.error == 0
    loss, gradient = products.loss_and_gradient()
    assert float(loss) == pytest.approx(float(exact.loss()), rel=1e-13)
    assert error(gradient, exact.gradient()) < 1e-13


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_step_follows_the_length_of_v(scale):
    model, batches = case("decoder")
    products, exact = (CurvatureProducts(model, batches, method=method) for method in ("difference", "exact"))
    v = [scale * t for t in directions(exact)]
    assert error(products.functional(v), exact.functional(v)) < 1e-8


def test_float32():
    model, batches = decoder(dtype=torch.float32), [sentences(2)]
    products, exact = (
        CurvatureProducts(model, batches, method="difference"),
        CurvatureProducts(decoder(dtype=torch.float32), batches),
    )
    v = directions(exact)
    for name in NAMES:
        off = error(getattr(products, name)(v), getattr(exact, name)(v))
        assert off < 2e-3, name
        assert off < 3 * products.error < 0.03, name


def test_subset_and_everything_put_back():
    model, batches = case("decoder")
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    products, exact = (CurvatureProducts(model, batches, parameters="norm", method=m) for m in ("difference", "exact"))
    v = directions(exact)
    for name in NAMES:
        assert error(getattr(products, name)(v), getattr(exact, name)(v)) < 1e-8
    for p, p_0 in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, p_0)
        assert torch.equal(p.grad, torch.ones_like(p))

    def fails(model, inputs):
        if not torch.equal(next(model.parameters()), before[0]):
            raise RuntimeError("in the middle")
        return model(inputs)

    with pytest.raises(RuntimeError, match="middle"):
        CurvatureProducts(model, batches, forward=fails, method="difference").hessian(directions(CurvatureProducts(model, batches)))
    assert all(torch.equal(p, p_0) for p, p_0 in zip(model.parameters(), before, strict=True))


def test_refusals():
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches, method="difference")
    with pytest.raises(UserError, match="v is zero"):
        products.hessian([torch.zeros_like(p) for p in model.parameters()])
    ignored = [(inputs, torch.full_like(targets, -100)) for inputs, targets in batches]
    with pytest.raises(UserError, match="no valid target"):
        CurvatureProducts(model, ignored, method="difference").hessian(directions(products))
    dropping = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        CurvatureProducts(dropping, [(torch.ones(2, 4).double(), torch.arange(2))], method="difference").gradient()


# --- sharded --------------------------------------------------------------------------------------------------------------


def sharded_equals_whole(rank):
    """Products, eigenvalues, density and traces of a model in two shards with a batch on each, against one process with both."""
    batches = [make_batch(3, seed=1, ignored=1), make_batch(2, seed=2)]
    whole = CurvatureProducts(make_model(), batches)
    model = make_model()
    fully_shard(model.up)
    fully_shard(model)
    with pytest.raises(UserError, match="method='difference'"):
        CurvatureProducts(model, [batches[rank]])
    with pytest.raises(UserError, match="sharded"):
        decompose(model, [batches[rank]])
    products = CurvatureProducts(model, [batches[rank]], method="difference")
    before = [p.to_local().clone() for p in model.parameters()]
    ours, reference = decompose(model, [batches[rank]], method="difference"), decompose(make_model(), batches)
    for field in ("share", "cosine", "curvature_logit", "curvature_func", "norm_gradient"):
        assert getattr(ours, field) == pytest.approx(getattr(reference, field), rel=1e-6)
    assert ours.by_kind["mlp"].norm_func == pytest.approx(reference.by_kind["mlp"].norm_func, rel=1e-6)
    fits = [
        quadratic_fit(of, [1e-3]).points[0].measured
        for of in (CurvatureProducts(model, [batches[rank]], method="difference"), whole)
    ]
    assert fits[0] == pytest.approx(fits[1], rel=1e-7)
    gather = lambda tensors: [t.full_tensor() for t in tensors]  # noqa: E731
    loss, gradient = products.loss_and_gradient()
    assert float(loss) == pytest.approx(float(whole.loss()), rel=1e-12)
    assert error(gather(gradient), whole.gradient()) < 1e-12
    for name in NAMES:
        assert error(gather(getattr(products, name)(gradient)), getattr(whole, name)(whole.gradient())) < 1e-8, name
        assert 0 < products.error < 1e-5
    for p, p_0 in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), p_0)
        assert p.grad is None

    def numbers(of):
        like, product = of.parameters, of.functional
        ends = eigenvalues(product, like, 1, max_products=6, generator=seeded(3))
        nodes = density(product, like, 1, 5, generator=seeded(3)).nodes
        return [
            *[x for e in ends.top + ends.bottom for x in (e.value, e.residual)],
            *nodes.flatten().tolist(),
            hutchinson(product, like, 2, generator=seeded(3)).mean,
            hutch_plus_plus(product, like, 6, generator=seeded(3)).mean,
        ]

    assert numbers(products) == pytest.approx(numbers(whole), rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_sharded_model(server):
    gloo(2, sharded_equals_whole)
