"""Buffers that forward re-assigns (self.mean = ...) are treated as those that it writes to: one update a step, none that fails."""

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
