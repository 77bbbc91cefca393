"""Models, batches and arguments of which there is no curvature: refused, with a way out."""

import pytest
import torch
from test_curvature import case, central_difference, decoder, directions, error, flat, seeded, sentences
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from functional_sam.curvature import CurvatureProducts
from functional_sam.curvature.context import second_order
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE


class Attention(nn.Module):
    """Dropout that no module of its own announces."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


@pytest.mark.parametrize(
    "layer", [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), Attention(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))]
)
def test_random_models_are_refused_in_training_mode(layer):
    model = layer.double()
    x = torch.randn(3, 4, dtype=torch.float64, generator=seeded())
    products = CurvatureProducts(model, [(x, torch.arange(3))])
    v = directions(products)
    for product in (products.gradient, lambda: products.hessian(v), lambda: products.split(v)):
        with pytest.raises(UserError, match=r"model\.eval\(\)"):
            product()
    model.eval()
    assert flat(products.hessian(v)).isfinite().all()


def test_dropout_of_zero_is_no_dropout():
    with second_order(nn.Sequential(nn.Dropout(0.0), nn.MultiheadAttention(4, 2)), "cpu"):
        pass


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_random_numbers_in_forward_are_refused(method):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.1))

    x = torch.randn(3, 4, dtype=torch.float64, generator=seeded())
    products = CurvatureProducts(Noisy(4, 4).double(), [(x, torch.arange(3))], method=method)
    with pytest.raises(UserError, match="random numbers"):
        products.hessian(directions(products))


def test_shuffled_batches_are_refused():
    """A loader is good if its passes are alike; an iterator has one pass only."""
    x, y = torch.randn(12, 4, dtype=torch.float64, generator=seeded()), torch.arange(12) % 3
    rows = torch.utils.data.TensorDataset(x, y)
    model = nn.Linear(4, 3).double()
    whole = CurvatureProducts(model, [(x, y)])
    v = directions(whole)
    steady = CurvatureProducts(model, torch.utils.data.DataLoader(rows, 5))
    assert error(steady.hessian(v), whole.hessian(v)) < 1e-12
    shuffled = CurvatureProducts(model, torch.utils.data.DataLoader(rows, 5, shuffle=True, generator=seeded()))
    with pytest.raises(UserError, match="shuffle=False"):
        shuffled.hessian(v)

    class Shorter:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(x, y)] * (3 - self.passes))

    with pytest.raises(UserError, match="differ"):
        CurvatureProducts(model, Shorter()).hessian(v)
    with pytest.raises(UserError, match="list"):
        CurvatureProducts(model, iter([(x, y)]))
    with pytest.raises(UserError, match="list"):
        CurvatureProducts(model, (batch for batch in [(x, y)]))


def test_user_errors():
    model, batches = case("decoder")
    ignored = [(inputs, torch.full_like(targets, IGNORE)) for inputs, targets in batches]
    for words, build in {
        "no batch": lambda: CurvatureProducts(model, []),
        "no valid target": lambda: CurvatureProducts(model, ignored).gradient(),
        "bfloat16": lambda: CurvatureProducts(decoder(dtype=torch.bfloat16), batches),
        "frozen": lambda: CurvatureProducts(decoder().requires_grad_(False), batches),
        "shapes": lambda: CurvatureProducts(model, batches).hessian([torch.zeros(3)]),
        "'always'": lambda: CurvatureProducts(model, batches, retain="always"),
        "'forward'": lambda: CurvatureProducts(model, batches, method="forward"),
        "'blocks.9": lambda: CurvatureProducts(model, batches, parameters="blocks.9.*"),
    }.items():
        with pytest.raises(UserError, match=words):
            build()


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_logits_that_are_not_the_targets_are_refused(method):
    """Classes in the second dimension, too many targets, no tensor, a mean: by each of the three that look at logits."""
    columns, linear = nn.Conv1d(5, 3, 1).double(), nn.Linear(5, 3).double()
    x, y = torch.randn(4, 5, dtype=torch.float64, generator=seeded()), torch.arange(4) % 3
    sequences = torch.randn(4, 5, 6, dtype=torch.float64, generator=seeded()), torch.arange(24).view(4, 6) % 3
    words, following = sentences(2)
    for expected, model, batch, options in (
        ("LAST dimension", columns, sequences, {}),
        ("one class index a row", linear, (x, y.repeat(2)), {}),
        ("one class index a row", decoder(), (words, following[:, :-1]), {}),
        ("targets is a NoneType", linear, (x, None), {}),
        ("returned a dict", linear, (x, y), {"forward": lambda model, x: {"logits": model(x)}}),
        ("returned a Tensor: expected .SUM", linear, (x, y), {"loss_fn": F.cross_entropy}),
        ("returned a mean .* and the count 4", linear, (x, y), {"loss_fn": lambda z, t: (F.cross_entropy(z, t), len(t))}),
    ):
        for call in (lambda p: p.loss(), lambda p: p.loss_and_gradient(), lambda p: p.hessian(directions(p))):
            with pytest.raises(UserError, match=expected):
                call(CurvatureProducts(model, [batch], method=method, **options))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double(), decoder()])
def test_soft_labels(model):
    """With a readout and without, against central differences of the plain gradient."""
    x = sentences(2)[0] if hasattr(model, "has_readout") else torch.randn(4, 5, dtype=torch.float64, generator=seeded())
    soft = torch.randn(model(x).shape, dtype=torch.float64, generator=seeded(1)).softmax(-1)
    products = CurvatureProducts(model, [(x, soft)])
    loss = lambda: -(model(x).log_softmax(-1) * soft).sum(-1).mean()  # noqa: E731
    gradient = lambda: torch.autograd.grad(loss(), products.parameters)  # noqa: E731
    v = directions(products)
    assert float(products.loss()) == pytest.approx(float(loss().detach()), rel=1e-13)
    assert error(products.hessian(v), central_difference(gradient, products.parameters, v, h=1e-4)) < 1e-8


def test_reentrant_checkpointing_is_refused():
    """With nothing trained before the block autograd.grad is silent, and gives zeros for all of it."""

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.block = nn.Linear(4, 4).requires_grad_(False), nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.head, self.reentrant = nn.Linear(8, 3), True

        def forward(self, x):
            return self.head(checkpoint(self.block, self.frozen(x).requires_grad_(), use_reentrant=self.reentrant))

    model = Blocks().double()
    batch = torch.randn(5, 4, dtype=torch.float64, generator=seeded()), torch.arange(5) % 3
    products, differences = (CurvatureProducts(model, [batch], method=method) for method in ("exact", "difference"))
    with pytest.raises(UserError, match="use_reentrant=False"):
        products.gradient()
    v = directions(products)
    reference = differences.functional(v)
    model.reentrant = False
    assert error(products.functional(v), reference) < 1e-8
    assert flat(reference[:2]).norm() > 0


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_an_embedding_that_writes_to_itself_is_refused(method):
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Tanh(), nn.Linear(4, 3)).double()
    before, products = model[0].weight.clone(), CurvatureProducts(model, [(torch.arange(5), torch.arange(5) % 3)], method=method)
    for call in (products.gradient, products.loss, lambda: products.hessian(directions(products))):
        with pytest.raises(UserError, match=r"'0' has max_norm=0.5"):
            call()
    assert torch.equal(before, model[0].weight)
    model[0].max_norm = None
    products.hessian(directions(products))


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_parameters_that_are_frozen_or_replaced_later(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64, generator=seeded())
    products = CurvatureProducts(model, [(x, torch.arange(3))], method=method)
    v = directions(products)
    products.hessian(v)
    model[0].weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"shape \[4, 4\] is frozen now"):
        products.hessian(v)
    model[0].weight.requires_grad_(True)
    products.hessian(v)
    model[2].weight = model[0].weight
    with pytest.raises(UserError, match=r"shape \[4, 4\] is no longer the model's"):
        products.hessian(v)
