"""The dose of a step against plain gradients taken here; and that asking for it changes nothing, bit for bit."""

import math

import pytest
import torch
from conftest import TinyModel, TinyReadout, make_batch, make_model, parts_of, warmed_up
from test_sharpness_edges import Complex
from test_sharpness_oracle import theta_of
from torch.nn import functional as F

from functional_sam import METHODS, SharpnessAware
from functional_sam.vectors import dot, norm


class Normalized(torch.nn.Module):
    """BatchNorm and dropout between an embedding and a head, no readout."""

    def __init__(self, vocab=11, width=6, dropout=0.0):
        super().__init__()
        self.embedding, self.up = torch.nn.Embedding(vocab, width), torch.nn.Linear(width, width)
        self.norm, self.dropout = torch.nn.BatchNorm1d(width), torch.nn.Dropout(dropout)

    def forward(self, tokens):
        x = self.up(self.embedding(tokens))
        x = self.dropout(self.norm(x.flatten(0, 1)).view(x.shape).relu())
        return x @ self.embedding.weight.T


KINDS = pytest.mark.parametrize("kind", [TinyModel, TinyReadout, Normalized])


def parts_at(step):
    """Two micro-batches with uneven numbers of valid targets."""
    inputs, targets = make_batch(6, seed=step)
    targets[0, 1:] = targets[4] = -100
    return parts_of((inputs, targets), [2])


def plain_gradient(model, parts):
    """Mean over the valid targets of all parts, one forward a part in their order; random state and buffers put back."""
    rng, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    total = sum(int((t != -100).sum()) for _, t in parts)
    losses = [F.cross_entropy(model(x).flatten(0, 1), t.flatten(), reduction="sum") / total for x, t in parts]
    grads = torch.autograd.grad(sum(losses), list(model.parameters()))
    torch.set_rng_state(rng)
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    return torch.cat([g.flatten() for g in grads])


def build(kind, method, optimizer_of=warmed_up, dtype=torch.float64, **options):
    model = make_model(kind, dtype=dtype, dropout=0.3)
    optimizer = optimizer_of(model)
    torch.manual_seed(5)
    return model, optimizer, SharpnessAware(model, optimizer, method, rho=0.2, **options)


@KINDS
@pytest.mark.parametrize("method", METHODS)
def test_dose_is_the_change_of_the_gradient(method, kind):
    """|.grad - g| / |g| with g taken by autograd here; a decoupled wsam through the weights that its optimizer leaves."""
    options = {"every": 2} if method == "looksam" else {}
    if method == "wsam":
        model, optimizer, sharpness = build(kind, method, lambda model: torch.optim.SGD(model.parameters(), lr=0.5))
    else:
        model, optimizer, sharpness = build(kind, method, **options)
    for step in range(4):
        g = plain_gradient(model, parts_at(step))
        sharpness.backward(parts_at(step), measure_dose=True)
        taken = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer.step()
        if method == "wsam":
            taken = (before - torch.cat([p.detach().flatten() for p in model.parameters()])) / 0.5
        assert sharpness.dose == pytest.approx(float((taken - g).norm() / g.norm()), rel=1e-8, abs=1e-14)
        plain = METHODS[method].path == "plain" or (method == "tram" and step == 0)
        assert (sharpness.dose < 1e-12) == plain
    sharpness.backward(parts_at(9))
    assert sharpness.dose is None


@pytest.mark.parametrize("options", [{"scope": "micro-batch"}, {"every": 3}, {"keep": "cotangent"}, {"ascent": "momentum"}])
def test_dose_with_options(options):
    model, optimizer, sharpness = build(TinyReadout, "functional-sam", **options)
    for step in range(4):
        g = plain_gradient(model, parts_at(step))
        sharpness.backward(parts_at(step), measure_dose=True)
        taken = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert sharpness.dose == pytest.approx(float((taken - g).norm() / g.norm()), rel=1e-8, abs=1e-14)
        optimizer.step()


def test_dose_of_a_loss_that_counts_its_targets_itself():
    """The divisor is known only after the first pass."""

    def loss_fn(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), int((targets != -100).sum())

    for method in ("sam", "functional-sam"):
        doses = []
        for options in ({}, {"loss_fn": loss_fn}):
            _, _, sharpness = build(TinyModel, method, **options)
            sharpness.backward(parts_at(0), measure_dose=True)
            doses.append(sharpness.dose)
        assert doses[0] == pytest.approx(doses[1], rel=1e-10)


@KINDS
@pytest.mark.parametrize("method", METHODS)
def test_asking_changes_nothing(method, kind):
    """Weights, gradients, losses, buffers and random state are those of the run that never asked, bit for bit."""
    runs = []
    for asks in (False, True):
        model, optimizer, sharpness = build(kind, method, dtype=torch.float32, **({"every": 2} if method == "looksam" else {}))
        record = []
        for step in range(4):
            loss = sharpness.backward(parts_at(step), measure_dose=asks and step != 1)
            record.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
        runs.append((record, theta_of(model), [b.clone() for b in model.buffers()], torch.get_rng_state()))
    (record, theta, buffers, rng), (record_, theta_, buffers_, rng_) = runs
    for (loss, grads), (loss_, grads_) in zip(record, record_, strict=True):
        assert torch.equal(loss, loss_)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_, strict=True))
    assert all(torch.equal(theta[name], theta_[name]) for name in theta)
    assert all(torch.equal(a, b) for a, b in zip(buffers, buffers_, strict=True))
    assert torch.equal(rng, rng_)


def test_a_failed_step_has_no_dose():
    model, _, sharpness = build(TinyModel, "sam")
    sharpness.backward(parts_at(0), measure_dose=True)
    assert 0 < sharpness.dose < math.inf
    with torch.no_grad():
        model.up.weight[0, 0] = math.nan
    before, rng = theta_of(model), torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="step 2, pass 1"):
        sharpness.backward(parts_at(1), measure_dose=True)
    assert sharpness.dose is None
    assert sharpness.steps == 1
    assert not torch.equal(rng, torch.get_rng_state())  # the step itself has drawn
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in theta_of(model).items())


@pytest.mark.parametrize("method", ["sam", "functional-sam", "gnp", "wsam", "momentum-sam"])
def test_the_dose_of_complex_parameters_is_that_of_their_pairs(method):
    batches = [(torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(3)]
    doses = []
    for pairs in (True, False):
        model = Complex(pairs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
        sharpness.check(batches[:1])
        for batch in batches:
            sharpness.backward([batch], measure_dose=True)
            doses.append(sharpness.dose)
            optimizer.step()
    assert doses[2] > 0.01
    assert doses[3:] == pytest.approx(doses[:3], rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("fast", [False, True])
def test_the_inner_product_of_complex_tensors_is_that_of_their_pairs(fast):
    x, y = torch.randn(3, 4, dtype=torch.complex128), torch.randn(4, 3, dtype=torch.complex128).T.conj()
    expected = float((x.real * y.real + x.imag * y.imag).sum())
    assert dot([x], [y], fast=fast) == pytest.approx(expected)
    assert dot([x], [x], fast=fast) == pytest.approx(norm([x], fast=fast) ** 2)


def test_a_dose_that_fails_is_a_step_that_fails(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    model, _, sharpness = build(TinyModel, "sam")
    monkeypatch.setattr("functional_sam.sharpness.backward.dose_of_step", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        sharpness.backward(parts_at(0), measure_dose=True)
    assert sharpness.steps == 0
    assert all(p.grad is None for p in model.parameters())
    sharpness.backward(parts_at(0))
