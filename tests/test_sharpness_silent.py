"""What gave another gradient without a word, each found by a caller's own loop: right now, or refused with the way out."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import TinyReadout, adamw, make_batch, make_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from functional_sam import METHODS, SharpnessAware, UserError
from functional_sam.curvature import CurvatureProducts


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, dtype=torch.float64, generator=generator), torch.randint(4, (6,), generator=generator)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def sam_by_hand(model, loss, rho):
    """The gradient at theta + rho g / |g|."""
    params = list(model.parameters())
    theta = [p.detach().clone() for p in params]
    g = torch.autograd.grad(loss(), params)
    size = torch.cat([x.flatten() for x in g]).norm()
    with torch.no_grad():
        torch._foreach_add_(params, g, alpha=float(rho / size))
    there = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        torch._foreach_copy_(params, theta)
    return there


def close(model, wanted, tolerance=1e-12):
    found = [p.grad for p in model.parameters()]
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(found, wanted, strict=True))


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.path != "plain"])
def test_maximize_is_refused(method):
    model = make_model()
    with pytest.raises(UserError, match=r"maximize=True.*put the sign into loss_fn"):
        SharpnessAware(model, adamw(model, maximize=True), method)
    SharpnessAware(model, adamw(model, maximize=True), "plain")


def test_a_learning_rate_in_a_tensor_moves_every_parameter_once():
    model, (x, y) = mlp(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    SharpnessAware(model, optimizer, "sam", rho=0.1, rho_schedule="lr").backward([(x, y)])
    close(model, sam_by_hand(model, lambda: F.cross_entropy(model(x), y), 0.1))


@pytest.mark.parametrize("normalize_by", ["gradient", "energy", "none"])
def test_adagrad_has_no_second_moment_before_its_first_step(normalize_by):
    """Its zeros would make P = 1 / eps; with an initial accumulator it has one."""
    model, data = mlp(), [batch()]
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    sharpness = SharpnessAware(model, optimizer, "precond-sam", rho=1e-4, normalize_by=normalize_by)
    sharpness.backward(data, measure_dose=True)
    assert sharpness.dose < 1e-2
    first, model = flat(model), mlp()
    words = {"normalize_by": "none"} if normalize_by == "none" else {}
    SharpnessAware(model, sgd(model), "sam", rho=1e-4, **words).backward(data)
    assert torch.allclose(first, flat(model), rtol=1e-9)
    model = mlp()
    started = torch.optim.Adagrad(model.parameters(), lr=0.01, initial_accumulator_value=1e-4)
    SharpnessAware(model, started, "precond-sam", rho=1e-4, normalize_by="none").backward(data)
    there, model = flat(model), mlp()  # P = 1 / (sqrt(1e-4) + 1e-10) for every weight
    SharpnessAware(model, sgd(model), "sam", rho=1e-2, normalize_by="none").backward(data)
    assert torch.allclose(there, flat(model), rtol=1e-6)


# ---------------------------------------------------------------------- targets and losses


def test_byte_targets_are_refused():
    """-100 in uint8 is 156, which is a byte."""
    model = nn.Linear(5, 256).double()
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.tensor([156, 3, 9], dtype=torch.uint8)
    with pytest.raises(UserError, match=r"torch.uint8.*targets.long\(\)"):
        SharpnessAware(model, sgd(model), "sam").backward([(x, y)])


@pytest.mark.parametrize("shape", [(6, 1), (6,)])
def test_one_class_is_no_classification(shape):
    model = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)).double() if len(shape) == 1 else nn.Linear(5, 1).double()
    x = batch()[0]
    for targets in (torch.zeros(6, dtype=torch.long), torch.randn(shape, dtype=torch.float64)):
        with pytest.raises(UserError, match=r"two classes or more; for another loss give loss_fn="):
            SharpnessAware(model, sgd(model), "sam").backward([(x, targets)])


def test_a_loss_that_writes_to_its_targets_is_refused():
    def normalizing(z, t):
        return (z - t.sub_(1.0).div_(2.0)).square().sum(), len(t)

    def ignoring(z, t):
        t[t == 0] = -100
        return F.cross_entropy(z, t, reduction="sum"), (t != -100).sum()

    x, y = batch()
    for loss_fn, targets in ((normalizing, torch.randn(6, 4, dtype=torch.float64)), (ignoring, y.clone())):
        for method in ("sam", "functional-sam", "logit-sam"):
            model = mlp()
            with pytest.raises(UserError, match=r"loss_fn changed targets.*work on a copy"):
                SharpnessAware(model, sgd(model), method, loss_fn=loss_fn).backward([(x, targets.clone())])
        model = mlp()
        copied = SharpnessAware(model, sgd(model), "sam", loss_fn=lambda z, t, loss_fn=loss_fn: loss_fn(z, t.clone()))
        copied.backward([(x, targets)])


def test_a_term_that_comes_later_is_refused_when_it_comes():
    model, on = mlp(), []

    def loss_fn(z, t):
        more = model[0].weight.square().sum() if on else 0.0
        return F.cross_entropy(z, t, reduction="sum") + more, len(t)

    sharpness = SharpnessAware(model, sgd(model), "sam", loss_fn=loss_fn)
    sharpness.backward([batch()])
    on.append(1)
    model.zero_grad()
    with pytest.raises(UserError, match=r"depends on the model's 0.weight other than by its logits.*append the term"):
        sharpness.backward([batch()])


def test_the_way_out_of_an_auxiliary_term_is_right():
    """As one more column of the logits it has its gradient: SAM's of the sum, to rounding."""
    model, (x, y) = mlp(), batch()

    def forward(model, inputs):
        z = model(inputs)
        return torch.cat([z, model[0].weight.square().mean().expand(len(z), 1)], 1)

    def loss_fn(z, t):
        return F.cross_entropy(z[:, :-1], t, reduction="sum") + z[:, -1].sum(), len(t)

    SharpnessAware(model, sgd(model), "sam", rho=0.3, forward=forward, loss_fn=loss_fn).backward([(x, y)])
    close(model, sam_by_hand(model, lambda: F.cross_entropy(model(x), y) + model[0].weight.square().mean(), 0.3))


def test_a_mean_over_the_positions_of_one_row_is_refused():
    model = nn.Linear(5, 4).double()
    x, y = torch.randn(1, 7, 5, dtype=torch.float64), torch.randint(4, (1, 7))
    mean = SharpnessAware(model, sgd(model), "sam", loss_fn=lambda z, t: (F.cross_entropy(z[0], t[0]), t.numel()))
    with pytest.raises(UserError, match=r"a mean .* and the count 7"):
        mean.backward([(x, y)])
    right = SharpnessAware(model, sgd(model), "sam", loss_fn=lambda z, t: (F.cross_entropy(z[0], t[0], reduction="sum"), t.numel()))
    right.backward([(x, y)])
    count = SharpnessAware(model, sgd(model), "sam", loss_fn=lambda z, t: (z.sum(), torch.ones(2)))
    with pytest.raises(UserError, match=r"count of shape \[2\]"):
        count.backward([(x, y)])


# ---------------------------------------------------------------------- the model


def test_weights_that_a_parametrization_caches_are_refused():
    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).T

    model = nn.Sequential(nn.Linear(5, 5, bias=False)).double()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    x, y = batch()
    sharpness = SharpnessAware(model, sgd(model), "sam", rho=0.5)
    with parametrize.cached(), pytest.raises(UserError, match=r"inside of parametrize.cached"):
        sharpness.backward([(x, y)])
    sharpness.backward([(x, y)])
    close(model, sam_by_hand(model, lambda: F.cross_entropy(model(x), y), 0.5))


class Padded(nn.Module):
    """Mean over all positions, padded ones too: PyTorch's fast path, which it takes without gradients, has zeros there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs[0], src_key_padding_mask=inputs[1]).mean(1))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_forward_without_gradients_is_the_forward_with_them():
    model = Padded().double().eval()
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, 1:] = True
    data = [((torch.randn(4, 5, 8, dtype=torch.float64), mask), torch.randint(3, (4,)))]
    sharpness = SharpnessAware(model, sgd(model, momentum=0.9), "logit-sam", rho=1e-6)
    sharpness.backward(data, measure_dose=True)
    assert sharpness.dose < 1e-4
    assert torch.backends.mha.get_fastpath_enabled()


class Rope(nn.Module):
    """Rotary positions whose cache grows with the texts, and remembers how far it has grown."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.grow(4)

    def grow(self, length):
        self.cached = length
        self.register_buffer("cos", torch.arange(length)[:, None].mul(torch.arange(1, 9)).cos().double(), persistent=False)

    def forward(self, x):
        if x.shape[1] > self.cached:
            self.grow(x.shape[1])
        return self.head((self.embedding(x) * self.cos[: x.shape[1]]).tanh())


@pytest.mark.parametrize("what", ["check", "dose", "part", "tram"])
def test_a_cache_that_grows_in_forward_keeps_its_size(what):
    model = Rope().double()
    x, y = torch.randint(9, (3, 7)), torch.randint(9, (3, 7))
    words = {"ascent_part": 0.5} if what == "part" else {}
    sharpness = SharpnessAware(model, sgd(model), "tram" if what == "tram" else "sam", rho=0.1, **words)
    if what == "check":
        sharpness.check([(x, y)])
    for _ in range(2):
        sharpness.backward([(x, y), (x, y)], measure_dose=what == "dose")
        model.zero_grad()
    assert model(x).shape == (3, 7, 9)
    assert len(model.cos) == model.cached == 7


def test_statistics_that_forward_replaces_are_still_put_back():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 4)
            self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.linear(x - self.mean.detach())

    model = Running().double()
    with pytest.raises(KeyError):
        SharpnessAware(model, sgd(model), "sam", loss_fn=lambda z, t: {}["the caller's own"]).backward([batch()])
    assert not model.mean.any()


def test_a_memory_that_grows_is_put_back():
    """Saved with the model, it is its state and no cache of positions: one row a step, as by one forward."""

    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 4)
            self.register_buffer("bank", torch.ones(1, 5, dtype=torch.float64))

        def forward(self, x):
            self.bank = torch.cat([self.bank, x.detach().mean(0, keepdim=True)])
            return self.linear(x)

    rows = {}
    for method in ("plain", "sam", "functional-sam", "logit-sam"):
        model = Memory().double()
        SharpnessAware(model, sgd(model), method, rho=0.1).backward([batch()])
        rows[method] = len(model.bank)
    assert set(rows.values()) == {2}
    products = CurvatureProducts(model, [batch()])
    with pytest.raises(UserError, match="changes its buffer 'bank'"):
        products.hessian([torch.ones_like(p) for p in model.parameters()])
    assert len(model.bank) == 2


def test_threads_leave_the_fast_path_as_it_was():
    def train():
        model = mlp()
        for _ in range(20):
            SharpnessAware(model, sgd(model), "logit-sam").backward([batch()])

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_no_pass_would_write_to_is_not_refused():
    """A frozen table with max_norm, and a model without parametrizations inside of parametrize.cached()."""
    frozen = nn.Sequential(nn.Embedding(10, 5, max_norm=100.0).requires_grad_(False), nn.Linear(5, 4)).double()
    SharpnessAware(frozen, torch.optim.SGD(frozen[1].parameters(), lr=0.1), "sam").backward([(torch.arange(6), batch()[1])])
    model = mlp()
    with parametrize.cached():
        SharpnessAware(model, sgd(model), "sam").backward([batch()])


def test_an_expanded_buffer_is_no_obstacle():
    """Nor does it stand in front of the caller's own error, after which .grad is empty and the buffer as it was."""

    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(5, 4), 0
            self.register_buffer("scale", torch.ones(1, 4, dtype=torch.float64).expand(6, 4))

        def forward(self, x):
            self.calls += 1
            if self.calls == 4:
                self.scale[0] *= 3.0
                raise KeyError("the caller's own")
            return self.linear(x) * self.scale

    model = Expanded().double()
    sharpness = SharpnessAware(model, sgd(model), "sam", rho=0.1)
    x, y = batch()
    sharpness.backward([(x, y)])
    close(model, sam_by_hand(model, lambda: F.cross_entropy(model.linear(x), y), 0.1))
    model.zero_grad()
    with pytest.raises(KeyError, match="the caller's own"):
        sharpness.backward([(x, y)])
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.scale, torch.ones(6, 4, dtype=torch.float64))


def test_a_forward_that_takes_derivatives_is_named():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=torch.is_grad_enabled())[0]

    model = Force()
    x, y = batch()
    with pytest.raises(UserError, match=r"let it do so under torch.enable_grad\(\)"):
        SharpnessAware(model, sgd(model), "logit-sam").backward([(x, y)])


def test_an_embedding_that_writes_to_itself_is_refused():
    model = nn.Sequential(nn.Embedding(10, 5, max_norm=1.0), nn.Linear(5, 4))
    with pytest.raises(UserError, match=r"Embedding\(max_norm=1\) writes to its weights in forward"):
        SharpnessAware(model, sgd(model), "sam")


# ---------------------------------------------------------------------- second derivatives


class Tied(nn.Module):
    """A tied head, and a padding row that reaches the loss where the text holds it."""

    def __init__(self, masked=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4, padding_idx=0 if masked else None)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight)  # the padding row too, which an embedding makes zero

    def forward(self, x):
        return self.head(self.embedding(x).tanh())


def test_second_derivatives_of_what_is_no_gradient_are_refused():
    scaled = mlp()
    scaled[0].weight.register_hook(lambda g: 2 * g)
    with pytest.raises(UserError, match=r"0.weight has a hook on its gradient"):
        SharpnessAware(scaled, sgd(scaled), "penalty-sam", derivative="exact")
    SharpnessAware(scaled, sgd(scaled), "penalty-sam", derivative="difference")
    words, y = torch.tensor([[0, 3, 5], [2, 2, 7]]), torch.tensor([[3, 5, -100], [2, 7, 1]])
    tied = Tied().double()
    with pytest.raises(UserError, match=r"shared embedding's padding_idx keeps the gradient"):
        SharpnessAware(tied, sgd(tied), "penalty-sam", derivative="exact").backward([(words, y)])
    with pytest.raises(UserError, match=r"shared embedding's padding_idx keeps the gradient"):
        CurvatureProducts(tied, [(words, y)]).hessian([torch.ones_like(p) for p in tied.parameters()])
    SharpnessAware(tied, sgd(tied), "penalty-sam", derivative="difference").backward([(words, y)])


def test_padding_that_does_not_reach_the_loss_is_no_obstacle():
    """As in a text model whose padded positions have no target: the same as without padding_idx, bit for bit."""
    words, y = torch.tensor([[4, 3, 0], [2, 0, 0]]), torch.tensor([[3, 5, -100], [2, -100, -100]])
    found = []
    for masked in (True, False):
        model = Tied(masked).double()
        SharpnessAware(model, sgd(model), "penalty-sam", derivative="exact").backward([(words, y)])
        v = [torch.ones_like(p) for p in model.parameters()]
        found.append((flat(model), *CurvatureProducts(model, [(words, y)]).hessian(v)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("phi", [0.0, 45.0, 90.0])
def test_weight_norm_has_its_second_derivatives(phi):
    """PyTorch's own take the norm for a constant: a difference of gradients, which does without them, gives the same correction."""
    found = []
    for words in ({"derivative": "exact"}, {"derivative": "difference", "step": 1e-5}):
        model = mlp()
        parametrizations.weight_norm(model[0])
        SharpnessAware(model, sgd(model), "angle-sam", rho=0.1, phi=phi, **words).backward([batch()])
        found.append(flat(model))
    model = mlp()
    parametrizations.weight_norm(model[0])
    SharpnessAware(model, sgd(model), "plain").backward([batch()])
    g = flat(model)
    assert float((found[0] - found[1]).norm() / (found[1] - g).norm()) < 1e-4


def test_both_halves_are_of_one_draw_of_a_random_loss():
    """A loss with dropout on its logits: exact and by difference agree, for the same random numbers."""

    def loss_fn(z, t):
        return F.cross_entropy(F.dropout(z, 0.5), t, reduction="sum"), len(t)

    found = []
    for words in ({"derivative": "exact"}, {"derivative": "difference", "step": 1e-5}):
        model = mlp()
        torch.manual_seed(3)
        SharpnessAware(model, sgd(model), "angle-sam", rho=0.1, phi=30.0, loss_fn=loss_fn, **words).backward([batch()])
        found.append(flat(model))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-6


# ---------------------------------------------------------------------- the object itself


def test_check_leaves_the_callers_gradients():
    model = mlp()
    sharpness = SharpnessAware(model, sgd(model), "sam", rho=0.1)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    before = flat(model)
    sharpness.check([batch(2)])
    assert torch.equal(before, flat(model))


def test_a_copy_has_a_readout_of_its_own():
    """torch._dynamo is there (any optimizer imports it), so that the readout is wrapped for compiled models."""
    import torch._dynamo

    model = make_model(TinyReadout)
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "functional-sam", rho=0.1)
    sharpness.backward([make_batch()])
    optimizer.step()
    optimizer.zero_grad()
    copies = [copy.deepcopy((model, optimizer, sharpness)), pickle.loads(pickle.dumps((model, optimizer, sharpness)))]
    sharpness.backward([make_batch(seed=2)])
    for theirs, _, other in copies:
        other.backward([make_batch(seed=2)])
        assert torch.equal(flat(model), flat(theirs))
