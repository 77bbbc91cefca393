"""Curvature products against finite differences, closed forms and dense matrices, in float64.

theta the parameters, z the logits, u = dL/dz, g the gradient, H = H_G + H_F.
"""

import pytest
import torch
from torch import nn

from functional_sam.curvature import CurvatureProducts
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy
from functional_sam.models import Decoder, ViT


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(model):
    """The model away from its initialization, where every LayerNorm scale is one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=seeded(9)))
    return model


def decoder(**options):
    shape = {"vocab": 13, "width": 8, "depth": 2, "heads": 2, "length": 6, "dtype": torch.float64, **options}
    return moved(Decoder(**shape, generator=seeded()))


def sentences(rows, seed=1):
    tokens = torch.randint(13, (rows, 7), generator=seeded(seed))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[:, -1] = targets[0, :2] = IGNORE
    return inputs, targets


def vision():
    model = moved(ViT(image=4, patch=2, classes=5, width=8, depth=2, heads=2, dtype=torch.float64, generator=seeded()))
    return model, [(torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=seeded(1)), torch.tensor([0, 1, 2, IGNORE, 3, 4]))]


def case(kind):
    return (decoder(), [sentences(2), sentences(3, seed=2)]) if kind == "decoder" else vision()


both = pytest.mark.parametrize("kind", ["decoder", "vit"])


def generic_cross_entropy(logits, targets):
    """The same loss, unknown to CurvatureProducts, so without the closed form."""
    return cross_entropy(logits, targets)


def squares(logits, targets):
    return (logits - nn.functional.one_hot(targets.clamp(min=0), logits.shape[-1])).pow(2).sum(), targets.new_tensor(
        targets.numel()
    )


losses = pytest.mark.parametrize("loss_fn", [cross_entropy, generic_cross_entropy, squares])


def directions(products, count=1, seed=3):
    generator = seeded(seed)
    drawn = [[torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in products.parameters] for _ in range(count)]
    return drawn[0] if count == 1 else drawn


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def error(ours, reference):
    return float((flat(ours) - flat(reference)).norm() / flat(reference).norm())


def central_difference(function, parameters, v, h):
    """d/dh function(theta + h v) to fourth order, theta put back."""
    start, total = [p.detach().clone() for p in parameters], None
    for step, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        with torch.no_grad():
            for p, p_0, v_i in zip(parameters, start, v, strict=True):
                p.copy_(p_0 + step * h * v_i)
        part = weight / (12 * h) * flat(function())
        total = part if total is None else total + part
    with torch.no_grad():
        for p, p_0 in zip(parameters, start, strict=True):
            p.copy_(p_0)
    return [total]


# --- the three products ---------------------------------------------------------------------------------------------------


@both
@losses
def test_hessian_is_the_derivative_of_the_gradient(kind, loss_fn):
    model, batches = case(kind)
    products = CurvatureProducts(model, batches, loss_fn)
    v = directions(products)
    reference = central_difference(products.gradient, products.parameters, v, h=1e-4)
    assert error(products.hessian(v), reference) < 1e-8


@both
@losses
def test_halves_add_up_to_the_hessian(kind, loss_fn):
    products = CurvatureProducts(*case(kind), loss_fn)
    v = directions(products)
    logit, func, whole = products.gauss_newton(v), products.functional(v), products.hessian(v)
    assert error([a + b for a, b in zip(logit, func, strict=True)], whole) < 1e-12
    assert flat(logit).norm() > 0.01 * flat(whole).norm()
    assert flat(func).norm() > 0.01 * flat(whole).norm()
    together = products.split(v)
    assert error(together[0], logit) < 1e-13
    assert error(together[1], func) < 1e-13


@both
def test_functional_half_alone(kind):
    """H_F v is the derivative of theta -> J(theta)^T u at fixed u."""
    model, batches = case(kind)
    (inputs, targets), products = batches[0], CurvatureProducts(model, batches[:1])
    z = model(inputs)
    u = torch.autograd.grad(cross_entropy(z, targets)[0], z)[0] / (targets != IGNORE).sum()
    pull_back = lambda: torch.autograd.grad((model(inputs) * u).sum(), products.parameters)  # noqa: E731
    v = directions(products)
    assert error(products.functional(v), central_difference(pull_back, products.parameters, v, h=1e-4)) < 1e-8


@both
def test_logit_half_alone(kind):
    """H_G v with J and d2L/dz2 as dense matrices."""
    model, batches = case(kind)
    (inputs, targets), products = batches[0], CurvatureProducts(model, batches[:1])
    z = model(inputs)
    loss_hessian = torch.autograd.functional.hessian(lambda z: cross_entropy(z, targets)[0], z.detach()).reshape(z.numel(), -1)
    rows = [flat(torch.autograd.grad(z_k, products.parameters, retain_graph=True)) for z_k in z.flatten()]
    J, v = torch.stack(rows), directions(products)
    reference = J.T @ (loss_hessian @ (J @ flat(v))) / (targets != IGNORE).sum()
    assert error(products.gauss_newton(v), [reference]) < 1e-12


@both
def test_symmetric_and_semidefinite(kind):
    products = CurvatureProducts(*case(kind))
    v, w = directions(products, count=2)
    for product in (products.hessian, products.gauss_newton, products.functional):
        assert flat(v) @ flat(product(w)) == pytest.approx(float(flat(w) @ flat(product(v))), rel=1e-10)
    for seed in range(5):
        v = directions(products, seed=seed)
        assert flat(v) @ flat(products.gauss_newton(v)) > 0


def test_closed_form_of_cross_entropy():
    model, batches = case("decoder")
    v = directions(CurvatureProducts(model, batches))
    closed, generic = (CurvatureProducts(model, batches, loss).gauss_newton(v) for loss in (cross_entropy, generic_cross_entropy))
    assert error(closed, generic) < 1e-13


def test_softmax_regression():
    """z = W x: H_F = 0 and H_G = mean of (diag p - p p^T) kron x x^T."""
    model = nn.Linear(4, 3, bias=False).double()
    x, targets = torch.randn(20, 4, dtype=torch.float64, generator=seeded()), torch.arange(20) % 3
    products = CurvatureProducts(model, [(x, targets)])
    v = directions(products)
    p = model(x).softmax(-1).detach()
    blocks = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    H = torch.einsum("nij,nk,nl->ikjl", blocks, x, x).reshape(12, 12) / 20
    assert error(products.gauss_newton(v), [H @ flat(v)]) < 1e-12
    assert error(products.hessian(v), [H @ flat(v)]) < 1e-12
    assert torch.equal(flat(products.functional(v)), torch.zeros(12, dtype=torch.float64))


def test_two_layer_net_by_hand():
    """z = a tanh(b x), loss z^2 / 2, at one x: u = z, H_G = J^T J and H_F = z d2z."""
    a, b = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.7, -0.4))
    x, h = 1.3, torch.tanh(torch.tensor(-0.4 * 1.3, dtype=torch.float64))
    slope = (1 - h * h) * x  # dh/db
    z, J = 0.7 * h, torch.stack([h, 0.7 * slope])
    d2z = torch.stack([torch.stack([0 * h, slope]), torch.stack([slope, 0.7 * -2 * h * slope * x])])
    products = CurvatureProducts(
        nn.Module(), [(x, None)], lambda z, _: (z.square().sum() / 2, torch.tensor(1)), lambda _, x: a * torch.tanh(b * x), [a, b]
    )
    for i, v in enumerate(torch.eye(2, dtype=torch.float64)):
        v = list(v.split(1))
        assert error(products.gauss_newton(v), [J * J[i]]) < 1e-14
        assert error(products.functional(v), [z * d2z[i]]) < 1e-14
        assert error(products.hessian(v), [J * J[i] + z * d2z[i]]) < 1e-14
        assert products.loss().item() == pytest.approx(float(z * z / 2))


def test_tied_embedding_counts_twice():
    """Of E used at both ends, H is the sum of the four blocks of an untied twin whose two matrices happen to be equal."""

    class Twin(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.inner = tied
            self.head = nn.Parameter(tied.tokens.detach().clone())

        def forward(self, tokens):
            h = self.inner(tokens, readout=lambda h, _: h)
            return h @ self.head.T

    tied, batches = decoder(), [sentences(3)]
    twin = Twin(tied)
    ours = CurvatureProducts(tied, batches, parameters=[tied.tokens])
    both_ends = CurvatureProducts(twin, batches, parameters=[tied.tokens, twin.head])
    v = directions(ours)
    for name in ("hessian", "gauss_newton", "functional"):
        at_embedding, at_head = getattr(both_ends, name)(v * 2)
        assert error(getattr(ours, name)(v), [at_embedding + at_head]) < 1e-12
        assert (at_embedding * at_head).count_nonzero()
    assert error(ours.gradient(), [sum(both_ends.gradient())]) < 1e-12


def test_loss_linear_in_the_logits_has_no_logit_half():
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches, lambda z, targets: (z.sum(), targets.new_tensor(targets.numel())))
    v = directions(products)
    assert flat(products.gauss_newton(v)).count_nonzero() == 0
    assert error(products.functional(v), products.hessian(v)) < 1e-13


def test_quadratic_gives_back_its_matrix_and_leaves_v_alone():
    """H = 2 I over two batches, where autograd hands v itself out as the product of a batch."""
    theta = nn.Parameter(torch.arange(3.0, dtype=torch.float64))
    products = CurvatureProducts(
        nn.Module(), [(1, 1), (1, 1)], lambda z, n: (z.pow(2).sum(), torch.tensor(n)), lambda model, inputs: theta, [theta]
    )
    v = [torch.randn(3, dtype=torch.float64, generator=seeded())]
    before = v[0].clone()
    for product in (products.hessian, products.gauss_newton):
        torch.testing.assert_close(product(v)[0], 2 * before, rtol=0, atol=1e-15)
    assert products.functional(v)[0].count_nonzero() == 0
    assert torch.equal(v[0], before)


def test_uneven_batches_equal_one():
    model, (inputs, targets) = decoder(), sentences(6)
    whole = CurvatureProducts(model, [(inputs, targets)])
    parts = CurvatureProducts(model, [(inputs[i:j], targets[i:j]) for i, j in ((0, 1), (1, 4), (4, 6))])
    assert len({int((target != IGNORE).sum()) for _, target in parts.batches}) == 3
    v = directions(whole)
    assert error(parts.gradient(), whole.gradient()) < 1e-12
    for name in ("hessian", "gauss_newton", "functional"):
        assert error(getattr(parts, name)(v), getattr(whole, name)(v)) < 1e-12
    assert float(parts.loss_and_gradient()[0]) == pytest.approx(float(whole.loss_and_gradient()[0]), rel=1e-13)


def test_subset_of_parameters_is_a_block_of_the_hessian():
    model, batches = case("decoder")
    whole, norms = CurvatureProducts(model, batches), [p for n, p in model.named_parameters() if "norm" in n]
    products = CurvatureProducts(model, batches, parameters=norms)
    v = directions(products)
    inside = {id(p): v_i for p, v_i in zip(norms, v, strict=True)}
    padded = [inside.get(id(p), torch.zeros_like(p)) for p in whole.parameters]
    for name in ("hessian", "gauss_newton", "functional"):
        block = [t for p, t in zip(whole.parameters, getattr(whole, name)(padded), strict=True) if id(p) in inside]
        assert error(getattr(products, name)(v), block) < 1e-12


# --- what surrounds the code ----------------------------------------------------------------------------------------------


def test_checkpointed_blocks():
    v = directions(CurvatureProducts(decoder(), [sentences(2)]))
    off, on = (CurvatureProducts(decoder(checkpoint_blocks=flag), [sentences(2)]) for flag in (False, True))
    for name in ("hessian", "gauss_newton", "functional"):
        assert error(getattr(on, name)(v), getattr(off, name)(v)) < 1e-13


def test_float32():
    model, batches = decoder(dtype=torch.float32), [sentences(2)]
    exact = CurvatureProducts(decoder(dtype=torch.float32).double(), batches)
    products = CurvatureProducts(model, batches)
    v = directions(products)
    for name in ("hessian", "gauss_newton", "functional"):
        ours = getattr(products, name)(v)
        assert {tensor.dtype for tensor in ours} == {torch.float32}
        assert error(ours, getattr(exact, name)([t.double() for t in v])) < 1e-5


def test_bfloat16_weights_in_float32():
    """What bf16 training leaves, widened: the products are those of the same numbers in float64."""
    narrow, batches = decoder(dtype=torch.bfloat16), [sentences(2)]
    with pytest.raises(UserError, match=r"bfloat16.*model\.float\(\)"):
        CurvatureProducts(narrow, batches)
    exact = decoder()
    exact.load_state_dict(narrow.state_dict())
    products, reference = CurvatureProducts(narrow.float(), batches), CurvatureProducts(exact, batches)
    v = directions(products)
    for name in ("hessian", "gauss_newton", "functional"):
        assert error([t.double() for t in getattr(products, name)(v)], getattr(reference, name)([t.double() for t in v])) < 1e-5


def test_leaves_the_model_alone_and_the_surroundings_out():
    model, batches = decoder(dtype=torch.float32), [sentences(2)]
    products = CurvatureProducts(model, batches)
    before, v = [p.detach().clone() for p in model.parameters()], directions(products)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    plain = products.split(v)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = products.split(v)
    assert all(torch.equal(a, b) for a, b in zip(plain[0] + plain[1], inside[0] + inside[1], strict=True))
    assert not any(tensor.requires_grad for tensor in plain[0] + plain[1])
    for p, p_0 in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, p_0)
        assert torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.slow
def test_compiled_model_runs_eagerly():
    model, batches = case("decoder")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batches[0][0])
    v = directions(CurvatureProducts(model, batches))
    assert error(CurvatureProducts(compiled, batches).functional(v), CurvatureProducts(model, batches).functional(v)) < 1e-13
