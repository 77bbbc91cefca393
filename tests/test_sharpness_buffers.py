"""Buffers that forward re-assigns (self.mean = ...) are treated as those that it writes to: one update a step, none that fails."""

import copy
import functools

import pytest
import torch
from conftest import adamw
from test_sharpness_oracle import close

from functional_sam import METHODS, SharpnessAware


class Running(torch.nn.Module):
    """Running statistics that training writes and does not read, in place or anew; one is made by the first call."""

    def __init__(self, reassigns):
        super().__init__()
        torch.manual_seed(0)
        self.reassigns, self.up, self.head = reassigns, torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("first", None)
        self.double()

    def forward(self, x):
        h = self.up(x).tanh()
        if self.training:
            mean = h.detach().mean(0)
            self.first = mean if self.first is None else self.first
            if self.reassigns:
                self.mean, self.calls = 0.9 * self.mean + 0.1 * mean, self.calls + 1
            else:
                self.mean.mul_(0.9).add_(0.1 * mean)
                self.calls.add_(1)
        if x.isnan().any():
            raise RuntimeError("the caller's")
        return self.head(h)


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)


def buffers(model):
    return {name: None if b is None else b.clone() for name, b in model._buffers.items()}


@pytest.mark.parametrize("reassigns", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_update_a_step_by_the_unperturbed_pass(method, reassigns):
    model = Running(reassigns)
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.3, **({"subset": None} if method == "sam-on" else {}))
    for step in range(3):
        before = buffers(model)
        inputs, _ = batch = batch_of(step)
        with torch.no_grad():
            mean = model.up(inputs).tanh().mean(0)
        sharpness.check([batch])
        after = buffers(model)
        assert all(before[n] is after[n] is None or torch.equal(before[n], after[n]) for n in before)
        sharpness.backward([batch], measure_dose=True)
        assert model.calls == step + 1
        if sharpness._has_first_pass or method == "momentum-functional-sam" or (method == "momentum-sam" and step == 0):
            expected = {"mean": 0.9 * before["mean"] + 0.1 * mean, "calls": before["calls"] + 1, "first": before["first"]}
            expected["first"] = mean if expected["first"] is None else expected["first"]
            close(buffers(model), expected, 1e-12)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("reassigns", [False, True])
def test_after_an_error_they_are_as_they_were_in_the_same_tensors(reassigns):
    model = Running(reassigns)
    held, before = dict(model._buffers), buffers(model)
    inputs, targets = batch_of(0)
    with pytest.raises(RuntimeError, match="the caller's"):
        SharpnessAware(model, adamw(model), "sam").backward([(inputs, targets), (inputs * float("nan"), targets)])
    assert all(model._buffers[name] is b for name, b in held.items())
    assert all(b is None or torch.equal(b, before[name]) for name, b in held.items())


class Codes(torch.nn.Module):
    """As an EMA codebook, MoCo's queue or spectral norm: forward reads a buffer, and then moves it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
        self.register_buffer("mean", torch.linspace(-1.0, 1.0, 6))
        self.double()

    def forward(self, x):
        h = (self.up(x) - self.mean).tanh()
        self.mean.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return self.head(h)


class Outside(torch.nn.Module):
    """The same, of which forward= knows the codes and the model does not."""

    def __init__(self):
        super().__init__()
        inner = Codes()
        self.up, self.head = inner.up, inner.head


def at(model, theta, batches, us=None):
    """(u, J^T u) of micro-batches one after the other at weights theta, buffers as they are now; `us`: cotangents of elsewhere."""
    model, kept, number = copy.deepcopy(model), [], sum(len(t) for _, t in batches)
    for p, value in zip(model.parameters(), theta, strict=True):
        p.data.copy_(value)
    for i, (x, t) in enumerate(batches):
        z = model(x)
        leaf = z.detach().requires_grad_()
        (u,) = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, t, reduction="sum") / number, leaf)
        kept.append(u)
        z.backward(u if us is None else us[i])
    return kept, [p.grad for p in model.parameters()]


def expected(method, model, batches, rho):
    """The gradient by its formula, every pass from the same buffers."""
    theta = [p.detach().clone() for p in model.parameters()]
    u, g = at(model, theta, batches)
    size = torch.nn.utils.get_total_norm(g)
    there = [p + rho * d / size for p, d in zip(theta, g, strict=True)]
    if method == "sam":
        return at(model, there, batches)[1]
    if method == "functional-sam":
        return at(model, there, batches, u)[1]
    return at(model, theta, batches, at(model, there, batches)[0])[1]


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("scope", ["step", "micro-batch"])
@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam"])
def test_all_passes_have_the_buffers_of_the_first(method, scope, outside):
    model, codes, batches = Outside() if outside else Codes(), Codes(), [batch_of(0), batch_of(1)]
    codes.up, codes.head = model.up, model.head
    held, forward = (codes, lambda model, x: codes(x)) if outside else (model, None)
    wanted = expected(method, held, batches, 0.3)
    if scope == "micro-batch":
        after = copy.deepcopy(held)
        after(batches[0][0])
        both = expected(method, held, batches[:1], 0.3), expected(method, after, batches[1:], 0.3)
        wanted = [(a + b) / 2 for a, b in zip(*both, strict=True)]
    moved = copy.deepcopy(held)
    for x, _ in batches:
        moved(x)
    sharpness = SharpnessAware(model, adamw(model), method, rho=0.3, scope=scope, forward=forward)
    sharpness.check(batches)
    sharpness.backward(batches, measure_dose=True)
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-13)
    assert torch.equal(held.mean, moved.mean)


class Centre(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, z, t):
        total = torch.nn.functional.cross_entropy(z - self.mean, t, reduction="sum")
        self.mean.mul_(0.5).add_(z.detach().mean(0), alpha=0.5)
        return total, len(t)


@pytest.mark.parametrize("how", ["closure", "partial", "attribute", "list"])
def test_a_state_of_the_loss_is_found_behind_a_function(how):
    centre, inner, losses = Centre(), Centre(), {"centre": [Centre()]}

    class Holder:
        loss = inner

        def __init__(self):
            self.mine = inner

        def __call__(self, z, t):
            return self.mine(z, t)

    loss_fn, held = {
        "closure": (lambda z, t: centre(z, t), centre),
        "partial": (functools.partial(lambda loss, z, t: loss(z, t), centre), centre),
        "attribute": (Holder(), inner),
        "list": (lambda z, t: losses["centre"][0](z, t), losses["centre"][0]),
    }[how]
    grads = []
    for loss, its in ((held.forward, held), (loss_fn, held)):
        its.mean.zero_()
        model = Running(False)
        SharpnessAware(model, adamw(model), "sam", rho=0.3, loss_fn=loss).backward([batch_of(0)])
        grads.append([*(p.grad for p in model.parameters()), its.mean.clone()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam"])
def test_buffers_of_a_scripted_module(method):
    """Its buffers are held by something that is almost a dictionary."""
    found = []
    for scripted in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)).double()
        model = torch.jit.script(model) if scripted else model
        SharpnessAware(model, adamw(model), method, rho=0.3).backward([batch_of(0), batch_of(1)])
        found.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])
