"""What the products keep and what they take: retained graphs, the head in chunks, quick second derivatives."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import TinyReadout, make_batch, make_model
from test_curvature import (
    both,
    case,
    central_difference,
    decoder,
    directions,
    error,
    flat,
    generic_cross_entropy,
    moved,
    seeded,
    sentences,
    vision,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from functional_sam import head
from functional_sam.curvature import CurvatureProducts, functions, outer
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE

NAMES = ("hessian", "gauss_newton", "functional")


def agree(ours, reference, tolerance=1e-12):
    """All products; the unit of an error is |H v|, for a half can be zero."""
    v = directions(reference)
    size = flat(reference.hessian(v)).norm()
    pairs = [(getattr(ours, name)(v), getattr(reference, name)(v)) for name in NAMES]
    pairs += [*zip(ours.split(v), reference.split(v), strict=True), (ours.gradient(), reference.gradient())]
    assert max(float((flat(a) - flat(b)).norm() / size) for a, b in pairs) < tolerance
    assert float(ours.loss_and_gradient()[0]) == pytest.approx(float(reference.loss()), rel=1e-12)


def calls_of(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- retained graphs ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("loss_fn", [None, generic_cross_entropy])
def test_retained_or_not_the_products_are_the_same(kind, loss_fn):
    model, batches = case(kind)
    options = {} if loss_fn is None else {"loss_fn": loss_fn}
    never = CurvatureProducts(model, batches, retain=False, memory_budget=0, **options)
    for retain in (True, "auto"):
        agree(CurvatureProducts(model, batches, retain=retain, **options), never)


def test_one_forward_serves_many_products():
    model, batches = case("decoder")
    products, calls = CurvatureProducts(model, batches), calls_of(model)
    v = directions(products)
    for _ in range(3):
        products.gradient(), products.hessian(v), products.gauss_newton(v), products.functional(v), products.split(v)
    assert len(calls) == len(batches)
    products.release()
    products.hessian(v)
    assert len(calls) == 2 * len(batches)


def test_budget_is_kept():
    """Of three batches of a size as many are kept as fit; the softmax goes first."""
    model, batches = decoder(), [sentences(2, seed=i) for i in range(3)]
    v = directions(CurvatureProducts(model, batches))
    everything = CurvatureProducts(model, batches, memory_budget=2**30)
    everything.hessian(v)
    sizes = [batch.num_bytes for batch in everything._kept.values()]
    assert len(set(sizes)) == 1
    softmax = 2 * 6 * 13 * 8
    assert sizes[0] > 30 * softmax  # the graph of two blocks counts, not only the softmax
    for budget, kept, with_softmax in ((2 * sizes[0], 2, 2), (2 * sizes[0] - softmax, 2, 1), (sizes[0] // 2, 0, 0)):
        products, calls = CurvatureProducts(model, batches, memory_budget=budget), calls_of(model)
        products.hessian(v)
        products.hessian(v)
        assert (len(products._kept), len(calls)) == (kept, 3 + 3 - kept)
        assert sum(batch.num_bytes for batch in products._kept.values()) <= budget
        assert sum(batch.state.outer.u_NV is not None for batch in products._kept.values()) == with_softmax
        agree(products, everything)


@pytest.mark.parametrize("change", ["step", "data", "load", "subset"])
def test_graphs_of_older_weights_are_not_used(change):
    model, batches = case("decoder")
    chosen = "norm" if change == "subset" else None
    products = CurvatureProducts(model, batches, parameters=chosen)
    v = directions(products)
    before = products.hessian(v)
    with torch.no_grad():
        if change == "load":
            model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})
        for p in model.parameters():
            if change in ("step", "subset"):
                p.add_(0.01)
            if change == "data":
                p.data.mul_(1.01)
    fresh = CurvatureProducts(model, batches, parameters=chosen)
    assert error(products.hessian(v), before) > 1e-3
    assert error(products.hessian(v), fresh.hessian(v)) < 1e-13


@both
@pytest.mark.parametrize("loss_fn", [None, generic_cross_entropy])
def test_release_frees_the_graph_without_the_garbage_collector(kind, loss_fn):
    model, batches = case(kind)
    products = CurvatureProducts(model, batches, **({} if loss_fn is None else {"loss_fn": loss_fn}))
    gc.collect()
    gc.disable()
    try:
        for use in (products.release, lambda: products.__dict__.clear()):
            v = directions(products)
            products.split(v), products.hessian(v), products.gauss_newton(v)
            held = [weakref.ref(thing) for batch in products._kept.values() for thing in (batch.state, batch.state.outer, *batch.g)]
            assert all(ref() is not None for ref in held)
            use()
            assert all(ref() is None for ref in held)
    finally:
        gc.enable()


# --- the head -------------------------------------------------------------------------------------------------------------


def whole_logits(model, inputs):
    """A forward that cannot read out."""
    return model(inputs)


@both
@pytest.mark.parametrize("chunk", [2**30, 1])
@pytest.mark.parametrize("budget", [2**30, 0])
def test_head_by_hand_is_the_generic_path(kind, chunk, budget, monkeypatch):
    """In chunks of one row, and in one; with the softmax kept and made again."""
    monkeypatch.setattr(outer, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(head, "LEAST_ROWS", 1)
    model, batches = case(kind)
    by_hand = CurvatureProducts(model, batches, memory_budget=budget)
    generic = CurvatureProducts(model, batches, forward=whole_logits)
    assert (by_hand.readout, generic.readout) == (True, False)
    agree(by_hand, generic)
    assert float(by_hand.loss()) == pytest.approx(float(generic.loss()), rel=1e-13)


@pytest.mark.parametrize("chosen", ["head", "norm", "embedding", "blocks.1.*", "norm.weight"])
def test_head_by_hand_for_subsets(chosen):
    """The head alone, all but the head, and parameters that only the last hidden state depends on."""
    model, batches = vision()
    agree(
        CurvatureProducts(model, batches, parameters=chosen),
        CurvatureProducts(model, batches, forward=whole_logits, parameters=chosen),
    )


def test_frozen_body_and_frozen_head():
    for frozen in ("head", "body"):
        model, batches = vision()
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("head") != (frozen == "head"))
        agree(CurvatureProducts(model, batches), CurvatureProducts(model, batches, forward=whole_logits))


def test_readout_through_a_matrix_made_from_parameters():
    """The head of a model need not be a parameter of it."""

    class Scaled(TinyReadout):
        def forward(self, tokens, readout=None):
            made = lambda h, weight: (h, 2 * weight + weight.square())  # noqa: E731
            h, weight = super().forward(tokens, readout=made)
            return h @ weight.T if readout is None else readout(h, weight)

    model, batches = make_model(Scaled), [make_batch(ignored=1)]
    agree(CurvatureProducts(model, batches), CurvatureProducts(model, batches, forward=whole_logits))


def test_half_a_float_and_all_targets_ignored_in_one_batch():
    model = decoder(dtype=torch.float32)
    ignored = sentences(2)[0], torch.full((2, 6), IGNORE)
    products = CurvatureProducts(model, [sentences(2), ignored])
    plain = CurvatureProducts(model, [sentences(2)])
    v = directions(products)
    for name in NAMES:
        assert {t.dtype for t in getattr(products, name)(v)} == {torch.float32}
        assert error(getattr(products, name)(v), getattr(plain, name)(v)) < 1e-6


PEAK = """
import resource, torch
from functional_sam.curvature import CurvatureProducts
from functional_sam.models import Decoder

V, B, L = 32_000, 8, 256
model = Decoder(V, width=16, depth=1, heads=2, length=L)
tokens = torch.randint(V, (B, L + 1))
inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
v = [torch.randn_like(p) for p in model.parameters()]
CurvatureProducts(model, [(inputs[:1], targets[:1])], memory_budget=0).split(v)
before = peak()
CurvatureProducts(model, [(inputs, targets)], memory_budget=0).split(v)
print((peak() - before) / (4 * B * L * V))
"""


@pytest.mark.slow
def test_a_large_vocabulary_takes_no_logits():
    """At V = 32,000 the peak above the weights is a part of the size of the logits."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


# --- quick second derivatives ---------------------------------------------------------------------------------------------

X = torch.randn(3, 5, 8, dtype=torch.float64, generator=seeded()) * 2
W, B = (torch.randn(8, dtype=torch.float64, generator=seeded(i)) for i in (1, 2))
QKV = [torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=seeded(i)) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("ours", "reference", "inputs"),
    [
        (functions.gelu, F.gelu, [X]),
        (lambda x: functions.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), [X]),
        (functions.silu, F.silu, [X]),
        (lambda x: functions.layer_norm(x, [8]), lambda x: F.layer_norm(x, [8]), [X]),
        (lambda x, w, b: functions.layer_norm(x, [8], w, b, 0.1), lambda x, w, b: F.layer_norm(x, [8], w, b, 0.1), [X, W, B]),
        (lambda x: functions.layer_norm(x, [5, 8]), lambda x: F.layer_norm(x, [5, 8]), [X]),
        (functions.attention, F.scaled_dot_product_attention, QKV),
        (lambda *a: functions.attention(*a, is_causal=True), lambda *a: F.scaled_dot_product_attention(*a, is_causal=True), QKV),
        (lambda *a: functions.attention(*a, scale=0.3), lambda *a: F.scaled_dot_product_attention(*a, scale=0.3), QKV),
        (
            lambda *a: functions.attention(*a, QKV[0] @ QKV[1].mT),
            lambda *a: F.scaled_dot_product_attention(*a, QKV[0] @ QKV[1].mT),
            QKV,
        ),
    ],
)
def test_quick_functions_are_pytorch_s_to_second_order(ours, reference, inputs):
    results = []
    with sdpa_kernel(SDPBackend.MATH):
        for function in (ours, reference):
            xs = [x.clone().requires_grad_() for x in inputs]
            y = function(*xs)
            c = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
            g = torch.autograd.grad(y, xs, c, create_graph=True)
            r = [torch.sin(3 * torch.arange(x.numel(), dtype=x.dtype)).view_as(x) for x in xs]
            results.append([y, *g, *torch.autograd.grad(g, [*xs, c], r, allow_unused=True, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_central_differences_on_pytorch_s_own_layers():
    """LayerNorm with its scale and shift inside, where jvp(jacrev(f)) is silently wrong; attention and GELU of PyTorch's."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    model = moved(nn.Sequential(layer, nn.LayerNorm(8), nn.Linear(8, 5)).double())
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=seeded())
    products = CurvatureProducts(model, [(x, torch.randint(5, (3, 4), generator=seeded()))])
    v = directions(products)
    reference = central_difference(products.gradient, products.parameters, v, h=1e-4)
    assert error(products.hessian(v), reference) < 1e-8


def test_quick_functions_reach_modules():
    """A model of PyTorch's own layers goes the quick way and gives the same."""
    layer = moved(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True).double())
    model = nn.Sequential(layer, nn.SiLU(), nn.Linear(8, 5).double())
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=seeded())
    batches = [(x, torch.randint(5, (3, 4), generator=seeded()))]
    quick = CurvatureProducts(model, batches)
    v = directions(quick)
    seen = []
    original, functions._FASTER = functions._FASTER, {}
    try:
        plain = CurvatureProducts(model, batches)
        seen = [getattr(plain, name)(v) for name in NAMES]
    finally:
        functions._FASTER = original
    for name, reference in zip(NAMES, seen, strict=True):
        assert error(getattr(quick, name)(v), reference) < 1e-12


class InPlace(nn.Module):
    """A model that changes in place what a quick function returned, or calls it by keywords."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.a(x), self.b(x)))


def silu_ignored(a, b):
    F.silu(a, inplace=True)
    return a * b


@pytest.mark.parametrize("retain", ["auto", True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: F.gelu(a).add_(b),
        lambda a, b: F.silu(a).mul_(b),
        lambda a, b: F.layer_norm(a, (8,)).add_(b),
        lambda a, b: F.layer_norm(a, (8,), torch.full_like(a[0], 1.3)).add_(b),
        lambda a, b: F.gelu(input=a) * b,
        lambda a, b: torch.layer_norm(a, normalized_shape=(8,), cudnn_enable=False) * b,
        lambda a, b: F.scaled_dot_product_attention(query=a, key=b, value=a, is_causal=True),
        silu_ignored,
    ],
)
def test_quick_functions_are_called_and_changed_as_pytorch_s(function, retain):
    model = moved(InPlace(function).double())
    x, y = torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 3
    products = CurvatureProducts(model, [(x, y)], retain=retain)
    gradient = lambda: torch.autograd.grad(F.cross_entropy(model(x), y), products.parameters)  # noqa: E731
    v = directions(products)
    assert error(products.gradient(), gradient()) < 1e-13
    assert error(products.hessian(v), central_difference(gradient, products.parameters, v, h=1e-4)) < 1e-8


@pytest.mark.parametrize("retain", ["auto", True, False])
def test_what_pytorch_refuses_in_place_is_refused(retain):
    def twice(a, b):
        y = a.exp()
        y += b
        return y

    x, y = torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 3
    with pytest.raises(RuntimeError, match="inplace operation"):
        F.cross_entropy(InPlace(twice).double()(x), y).backward()
    with pytest.raises(UserError, match=r"shape \[6, 8\].*in place"):
        CurvatureProducts(InPlace(twice).double(), [(x, y)], retain=retain).gradient()


CHANGES = {
    "inputs": lambda x, y, batches: x.add_(0.1),
    "targets": lambda x, y, batches: y.add_(1).remainder_(3),
    "targets that are ignored": lambda x, y, batches: y[:3].fill_(-100),
    "another batch": lambda x, y, batches: batches.__setitem__(0, (x * 2, y)),
    "one batch more": lambda x, y, batches: batches.append((x * 2, y)),
    "one batch fewer": lambda x, y, batches: batches.pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_batches_that_have_changed_make_graphs_anew(change):
    """Of inputs that no derivative saves, and of targets, autograd tells nothing."""
    x, y = torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 3
    model = moved(InPlace(lambda a, b: (a + 0).tanh() * b).double())
    batches = [(x, y), (x + 1, y.clone())]
    products = CurvatureProducts(model, batches)
    v = directions(products)
    products.hessian(v)
    change(x, y, batches)
    fresh = CurvatureProducts(model, batches)
    for mine, theirs in ((products.hessian, fresh.hessian), (products.gauss_newton, fresh.gauss_newton)):
        assert error(mine(v), theirs(v)) < 1e-13


def test_a_part_that_changes_its_mode_makes_graphs_anew():
    model = moved(InPlace(lambda a, b: a.tanh() * (b * 2 if model.part.training else b)).double().eval())
    model.part = torch.nn.Identity().eval()
    batches = [(torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 3)]
    products = CurvatureProducts(model, batches)
    v = directions(products)
    products.hessian(v)
    model.part.train()
    assert error(products.hessian(v), CurvatureProducts(model, batches).hessian(v)) < 1e-13


def test_a_tensor_of_forward_changed_under_its_graph_is_refused():
    x, y = torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 3
    scale = torch.rand(8, dtype=torch.float64, generator=seeded())
    model = moved(InPlace(lambda a, b: a.tanh() * b * scale).double())
    products = CurvatureProducts(model, [(x, y)])
    v = directions(products)
    products.hessian(v)
    scale.add_(0.1)
    with pytest.raises(UserError, match=r"shape \[8\].*release\(\)"):
        products.hessian(v)
    products.release()
    assert error(products.hessian(v), CurvatureProducts(model, [(x, y)]).hessian(v)) < 1e-13


def test_a_buffer_of_integers_changes_the_graph():
    model = moved(InPlace(lambda a, b: (a * model.power).tanh() * b).double())
    model.register_buffer("power", torch.tensor(1))
    batches = [(torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.arange(6) % 3)]
    products = CurvatureProducts(model, batches)
    v = directions(products)
    products.hessian(v)
    model.power.fill_(3)
    assert error(products.hessian(v), CurvatureProducts(model, batches).hessian(v)) < 1e-13
