"""What would be wrong with no sign of it: losses of more than the logits, no gradients, buffers that move; and other layouts."""

import pytest
import torch
from test_curvature import central_difference, decoder, directions, error, flat, seeded, sentences
from torch import nn
from torch.nn import functional as F

from functional_sam.curvature import CurvatureProducts, fit_scale
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE

X, Y = torch.randn(6, 5, dtype=torch.float64, generator=seeded()), torch.arange(6) % 4
METHODS = pytest.mark.parametrize("method", ["exact", "difference"])


def small(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), *layers, nn.Linear(12, 4)).double()


def each_product(products):
    """Every way to a derivative."""
    v = directions(products)
    yield products.gradient
    for name in ("hessian", "gauss_newton", "functional"):
        yield lambda name=name: getattr(products, name)(v)
    yield lambda: products.split(v)


class Router(nn.Module):
    """Experts whose balance is a term of the loss, left on the model by forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(5, 3), nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        self.balance = 3 * p.mean(0).square().sum()
        return torch.einsum("be,bi,eio->bo", p, x, self.experts)


def cross_entropies(z, targets):
    return F.cross_entropy(z, targets, reduction="sum"), len(targets)


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4).double()

    def forward(self, z, targets):
        return cross_entropies(self.head(z), targets)


@METHODS
@pytest.mark.parametrize("kind", ["balance", "decay"])
def test_a_loss_of_more_of_the_model_than_its_logits_is_refused(kind, method):
    model = Router().double()
    loss_fn = {
        "balance": lambda z, t: (cross_entropies(z, t)[0] + len(t) * model.balance, len(t)),
        "decay": lambda z, t: (cross_entropies(z, t)[0] + model.gate.weight.square().sum(), len(t)),
    }[kind]
    products = CurvatureProducts(model, [(X, Y)], loss_fn, method=method)
    for product in list(each_product(products))[:4]:
        with pytest.raises(UserError, match=r"a parameter of the model .* past the logits"):
            product()


@METHODS
@pytest.mark.parametrize("kind", ["parameters", "targets"])
def test_what_others_train_is_a_constant_of_the_products(kind, method):
    """Parameters of the loss, targets with a graph of another model: they get no gradient, and the products are those of theta."""
    model, teacher, head = small(), nn.Linear(5, 4).double(), WithHead()
    loss_fn, targets = (head, Y) if kind == "parameters" else (lambda z, t: ((z - t).square().sum(), len(t)), teacher(X))
    products = CurvatureProducts(model, [(X, targets)], loss_fn, method=method)
    v = directions(products)
    gradient = lambda: torch.autograd.grad(loss_fn(model(X), targets)[0] / 6, products.parameters, retain_graph=True)  # noqa: E731
    assert error(products.hessian(v), central_difference(gradient, products.parameters, v, h=1e-5)) < 1e-7
    assert all(p.grad is None for p in [*teacher.parameters(), *head.parameters()])


@METHODS
def test_a_sum_of_logits_has_products(method):
    """Its cotangent is one number in many places."""
    model = small()
    products = CurvatureProducts(model, [(X, Y)], lambda z, t: (z.sum(), len(t)), method=method)
    assert all(not value.any() for value in products.gauss_newton(directions(products)))


@METHODS
def test_a_frozen_term_and_a_head_that_is_not_trained_are_a_loss(method):
    """Constants; and a loss that is a module with parameters of which none requires a gradient."""
    model = Router().double()
    loss_fn = WithHead().requires_grad_(False)
    products = CurvatureProducts(model, [(X, Y)], lambda z, t: (loss_fn(z, t)[0] + model.balance.detach(), len(t)), method=method)
    v = directions(products)
    gradient = lambda: torch.autograd.grad(loss_fn(model(X), Y)[0] / 6, products.parameters)  # noqa: E731
    assert error(products.hessian(v), central_difference(gradient, products.parameters, v, h=1e-5)) < 1e-7


@METHODS
def test_a_loss_that_detaches_the_logits_is_refused(method):
    products = CurvatureProducts(small(), [(X, Y)], lambda z, t: cross_entropies(z.detach(), t), method=method)
    for product in each_product(products):
        with pytest.raises(UserError, match="does not depend on the logits"):
            product()


@METHODS
def test_a_batch_without_targets_may_have_a_constant_loss(method):
    def loss_fn(z, targets):
        return (z.new_zeros(()), 0) if (targets < 0).all() else cross_entropies(z, targets)

    model = small(nn.Tanh())
    products, plain = (CurvatureProducts(model, b, loss_fn, method=method) for b in ([(X, Y), (X, Y - 9)], [(X, Y)]))
    for ours, reference in zip(each_product(products), each_product(plain), strict=True):
        torch.testing.assert_close(ours(), reference())


@METHODS
@pytest.mark.parametrize("readout", [True, False])
def test_no_derivatives_are_refused_and_not_zero(readout, method):
    """Under inference_mode, and for a forward under no_grad, with a readout and without; the loss itself is given."""
    model, batch = decoder(), sentences(2)
    call = (lambda m, i, readout=None: m(i, readout=readout)) if readout else (lambda m, i: m(i))
    options = {"method": method}
    fine, detached = (CurvatureProducts(model, [batch], forward=f, **options) for f in (call, torch.no_grad()(call)))
    if not readout:
        detached = CurvatureProducts(model, [batch], forward=lambda m, i: m(i).detach(), **options)
    loss = float(fine.loss())
    assert float(detached.loss()) == loss
    for product in each_product(detached):
        with pytest.raises(UserError, match="depend on no parameter"):
            product()
    with torch.inference_mode():
        assert float(fine.loss()) == pytest.approx(loss, rel=1e-14)
        for product in each_product(fine):
            with pytest.raises(UserError, match="inference_mode"):
                product()
        made_inside = nn.Linear(5, 4).double()
    with torch.no_grad():
        assert flat(fine.hessian(directions(fine))).norm() > 0
    with pytest.raises(UserError, match="made under torch"):
        CurvatureProducts(made_inside, [(X, Y)], method=method).gradient()


class Moving(nn.Module):
    """A centre that forward reads and moves, in three ways."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(5, 4).double(), how
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        h = self.linear(x)
        if self.training:
            new = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            if self.how == "in place":
                self.mean.copy_(new)
            elif self.how == "data":
                self.mean.data.copy_(new)
            else:
                self.mean = new
        return (h - self.mean).tanh()


MOVING = {
    "in place": lambda: Moving("in place"),
    "data": lambda: Moving("data"),
    "replaced": lambda: Moving("replaced"),
    "instance norm": lambda: small(nn.Unflatten(1, (3, 4)), nn.InstanceNorm1d(3, track_running_stats=True).double(), nn.Flatten()),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4).double()),
}


@METHODS
@pytest.mark.parametrize("kind", MOVING)
def test_a_buffer_that_forward_moves_is_refused_and_put_back(kind, method):
    model = MOVING[kind]()
    products = CurvatureProducts(model, [(X, Y)], method=method)
    names, before = zip(*((name, buffer.clone()) for name, buffer in model.named_buffers()), strict=True)
    for product in [products.loss, *each_product(products)]:
        with pytest.raises(UserError, match=rf"buffer '({'|'.join(names)})'.*model\.eval\(\)"):
            product()
        assert all(map(torch.equal, model.buffers(), before))
    model.eval()
    v = directions(products)
    gradient = lambda: torch.autograd.grad(F.cross_entropy(model(X), Y), products.parameters)  # noqa: E731
    assert error(products.hessian(v), central_difference(gradient, products.parameters, v, h=1e-5)) < 1e-7


@METHODS
def test_a_cache_in_a_buffer_may_grow(method):
    """Sines of positions that forward makes for as many as it meets; in training mode too, and beside a nan that nobody reads."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 4).double()
            self.register_buffer("sines", torch.arange(2.0).double().sin())
            self.register_buffer("unused", torch.full((2,), torch.nan))
            self.register_buffer("later", None, persistent=False)

        def forward(self, x):
            if len(x) > len(self.sines):
                self.register_buffer("sines", torch.arange(len(x)).double().sin(), persistent=False)
            self.later = self.sines[: len(x)]
            return (self.linear(x) + self.later.unsqueeze(-1)).tanh()

    model = Positions()
    products = CurvatureProducts(model, [(X, Y), (X[:3], Y[:3])], method=method)
    v = directions(products)
    first = products.hessian(v)
    assert len(model.sines) == 6
    assert error(products.hessian(v), first) < 1e-14


@METHODS
def test_batches_that_are_changed_are_refused(method):
    def masked(z, targets):
        targets[targets == 0] = IGNORE
        return cross_entropies(z, targets)

    def shifted(model, inputs):
        return model(inputs["x"].add_(1.0))

    for options, expected in (({"loss_fn": masked}, "loss_fn changed targets"), ({"forward": shifted}, "changes its inputs")):
        inputs = {"x": X.clone()} if "forward" in options else X
        with pytest.raises(UserError, match=expected):
            CurvatureProducts(small(), [(inputs, Y.clone())], method=method, **options).gradient()


def test_hooks_on_gradients_are_refused():
    """One that doubles a gradient would double a product twice; differences are of the gradient as it leaves it."""
    model = small(nn.Tanh())
    products, differences = (CurvatureProducts(model, [(X, Y)], method=method) for method in ("exact", "difference"))
    v = directions(products)
    reference = products.hessian(v)
    hook = model[0].weight.register_hook(lambda g: 2 * g)
    for product in each_product(products):
        with pytest.raises(UserError, match=r"^0\.weight has a hook"):
            product()
    doubled = [2 * reference[0], *reference[1:]]
    assert error(differences.hessian(v), doubled) < 1e-8
    hook.remove()
    assert error(products.hessian(v), reference) < 1e-14


# --- other layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:Sparse invariant:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("place", ["buffer", "inputs"])
def test_sparse_buffers_and_inputs(place, layout):
    """A graph net whose adjacency is sparse, against the same with a dense one; through a loader, which looks at its batches."""
    A = (torch.arange(36).view(6, 6) % 5 == 0).double().to_sparse(layout=layout)

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = small()
            if place == "buffer":
                self.register_buffer("adjacency", A)

        def forward(self, inputs):
            adjacency, x = (self.adjacency, inputs) if place == "buffer" else inputs
            return (adjacency @ self.linear(x).tanh()).tanh()

    class Loader:
        def __iter__(self):
            return iter([(X, Y) if place == "buffer" else ((A, X), Y)])

    model = Graph()
    products = CurvatureProducts(model, Loader())
    dense = CurvatureProducts(model.linear, [(X, Y)], forward=lambda m, x: (A.to_dense() @ m(x).tanh()).tanh())
    for ours, reference in zip(each_product(products), each_product(dense), strict=True):
        torch.testing.assert_close(ours(), reference())
    if place == "buffer":
        v, before = directions(products), products.hessian(directions(products))
        model.adjacency.mul_(0.5) if layout == torch.sparse_coo else model.adjacency.values().mul_(0.5)
        assert error(products.hessian(v), before) > 1e-3


@METHODS
def test_jagged_inputs_and_logits(method):
    jagged = torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged)
    model = small(nn.Tanh())
    ours = CurvatureProducts(model, [(jagged, Y)], forward=lambda m, x: m(x).values(), method=method)
    plain = CurvatureProducts(model, [(X, Y)], method=method)
    for product, reference in zip(each_product(ours), each_product(plain), strict=True):
        torch.testing.assert_close(product(), reference())
    squares = lambda z, t: (z.values().square().sum(), 6)  # noqa: E731
    for options in ({}, {"loss_fn": squares}):
        with pytest.raises(UserError, match=r"layout torch\.jagged.*values\(\)"):
            CurvatureProducts(model, [(jagged, Y)], method=method, **options).gradient()


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)).double()
    with pytest.raises(UserError, match="sparse=False"):
        CurvatureProducts(model, [(Y, Y)]).gradient()


@METHODS
def test_padding_is_the_same_with_gradients_and_without(method):
    """nn.TransformerEncoder's fast path zeroes what is padded; it is off inside a product, and only there."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, inputs):
            x, padding = inputs
            return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))

    torch.manual_seed(0)
    model, x, y = Encoder().double().eval(), torch.randn(4, 5, 8, dtype=torch.float64, generator=seeded()), torch.arange(4) % 3
    padding = torch.arange(5) >= torch.tensor([5, 3, 5, 1]).unsqueeze(-1)
    products = CurvatureProducts(model, [((x, padding), y)], method=method)
    loss = F.cross_entropy(model((x, padding)), y)
    assert float(products.loss()) == pytest.approx(float(loss.detach()), rel=1e-12)
    gradient = lambda: torch.autograd.grad(F.cross_entropy(model((x, padding)), y), products.parameters)  # noqa: E731
    v = directions(products)
    H_v = central_difference(gradient, products.parameters, v, h=1e-5)
    assert error([a + b for a, b in zip(*products.split(v), strict=True)], H_v) < 1e-7
    at_one = lambda s: float(fit_scale(model, [((x, padding), y)], tolerance=s).loss)  # noqa: E731
    assert at_one(0.1) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()


class Running(nn.Module):
    """A running mean that is taken off, and moved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        seen = x - self.mean
        self.mean += x.detach().mean()
        return seen


@METHODS
def test_a_state_that_forward_knows_and_the_model_does_not_is_refused(method):
    moving, model = Running(), small(nn.Tanh())
    products = CurvatureProducts(model, [(X, Y)], method=method, forward=lambda model, x: model(moving(x)))
    for product in (products.loss, products.gradient):
        with pytest.raises(UserError, match="changes its buffer 'mean'"):
            product()
        assert moving.mean == 0


@METHODS
def test_a_state_of_the_loss_is_the_same_in_all_products(method):
    """DINO's centre, in a closure: H v of the loss as it is, however often it is asked."""
    moving, model = Running(), small(nn.Tanh())
    moving.mean += 0.3
    products, still = (
        CurvatureProducts(model, [(X, Y), (X, Y)], loss_fn, method=method, retain=False)
        for loss_fn in (lambda z, t: cross_entropies(moving(z) ** 2, t), lambda z, t: cross_entropies((z - 0.3) ** 2, t))
    )
    for _ in range(2):
        for product, wanted in zip(each_product(products), each_product(still), strict=True):
            torch.testing.assert_close(product(), wanted(), rtol=1e-9, atol=1e-12)
        assert moving.mean == 0.3


def test_weights_that_trade_places_make_graphs_anew():
    model = small(nn.Tanh())
    products = CurvatureProducts(model, [(X, Y)])
    v = products.gradient()
    products.hessian(v)
    for weight in (model[0].weight, model[0].bias):
        weight.data[[0, 1]] = weight.data[[1, 0]]  # past the version, and of the same norm
        for a, b in zip(products.hessian(v), CurvatureProducts(model, [(X, Y)]).hessian(v), strict=True):
            assert torch.equal(a, b)
