"""Calls that torch would answer with an error of its own: they say what was given and the way out."""

import dataclasses

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, make_batch, make_model
from torch.nn import functional as F

from functional_sam import SharpnessAware, UserError


@dataclasses.dataclass
class Inputs:
    x: torch.Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["adamw", "functional-sam", "penalty-sam"])
def test_without_gradients(method, mode):
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), method)
    for call in (sharpness.backward, sharpness.check):
        with mode(), pytest.raises(UserError, match=r"under torch.no_grad\(\) or torch.inference_mode\(\)"):
            call([make_batch()])
    sharpness.backward([make_batch()])


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_class_indices_of_another_type(kind, dtype):
    model = make_model(kind)
    inputs, targets = make_batch()
    with pytest.raises(UserError, match=rf"targets are {dtype}: class indices are int64, targets.long\(\)"):
        SharpnessAware(model, adamw(model), "sam").backward([(inputs, targets.to(dtype))])


@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam"])
def test_a_loss_that_writes_to_its_logits(method):
    def loss_fn(logits, targets):
        return F.cross_entropy(logits.div_(0.5).flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()

    model = make_model()
    with pytest.raises(UserError, match=r"loss_fn changes its logits in place: let it work on a copy"):
        SharpnessAware(model, adamw(model), method, loss_fn=loss_fn).backward([make_batch()])


@pytest.mark.parametrize("forward", [torch.no_grad()(lambda m, x: m(x)), lambda m, x: m(x).detach()])
@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam"])
def test_logits_without_a_graph(method, forward):
    model = make_model()
    with pytest.raises(UserError, match=r"logits that depend on no parameter: it runs under no_grad, or detaches them"):
        SharpnessAware(model, adamw(model), method, forward=forward).backward([make_batch()])


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"parameter weight of Linear was made under torch.inference_mode\(\)"):
        SharpnessAware(model, adamw(model), "sam")


@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam"])
def test_a_loss_whose_cotangent_is_one_number_expanded(method):
    """Of a plain sum autograd gives u in one place of memory, which cannot be scaled in place."""
    model, batches = make_model(), [make_batch(rows) for rows in (2, 3)]
    for loss_fn in (lambda z, t: (z.sum(), t.numel()), lambda z, t: ((z * torch.ones_like(z)).sum(), t.numel())):
        SharpnessAware(model, adamw(model), method, rho=0.3, loss_fn=loss_fn).backward(batches)
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    SharpnessAware(model, adamw(model), method, rho=0.3, loss_fn=lambda z, t: (z.sum(), t.numel())).backward(batches)
    for p, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- what each pass of a step would go through again


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def test_inputs_for_one_pass_are_refused():
    """A second pass over an iterator would be over nothing."""
    model, targets = net(), torch.arange(3)

    def forward(m, parts):
        return torch.cat([m(x) for x in parts] or [m(torch.zeros(3, 4))])

    with pytest.raises(UserError, match=r"inputs are a generator, which the first pass uses up: give list\(inputs\)"):
        SharpnessAware(model, adamw(model), "sam", forward=forward).backward([((torch.ones(1, 4) for _ in range(3)), targets)])
    encoded = {"x": torch.nn.Linear(4, 4)(torch.ones(3, 4))}
    with pytest.raises(UserError, match=r"inputs\['x'\] has a graph of its own"):
        SharpnessAware(model, adamw(model), "sam", forward=lambda m, x: m(x["x"])).backward([(encoded, targets)])


def test_gradients_that_add_up_over_passes_are_warned_of():
    model, x, targets = net(), torch.ones(3, 4), torch.arange(3)
    outside = torch.nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"inputs requires a gradient, and its .grad adds up over all passes"):
        SharpnessAware(model, adamw(model), "sam").backward([(x.clone().requires_grad_(), targets)])
    sharpness = SharpnessAware(model, adamw(model), "sam", forward=lambda m, x: m(outside(x)))
    with pytest.warns(UserWarning, match=r"no parameters of the model \(2, the first of shape \[4, 4\]\), whose .grad adds up"):
        sharpness.backward([(x, targets)])


@pytest.mark.filterwarnings("error")
def test_points_that_forward_differentiates_by_are_no_matter():
    model, targets = net(), torch.arange(3)

    def forward(m, x):
        x = x.clone().requires_grad_()
        y = m(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope[:, :3]

    SharpnessAware(model, adamw(model), "functional-sam", forward=forward).backward([(torch.ones(3, 4), targets)])
    outside = torch.nn.Linear(4, 4)  # one pass, whose gradient is the one expected
    SharpnessAware(model, adamw(model), "adamw", forward=lambda m, x: m(outside(x))).backward([(torch.ones(3, 4), targets)])


def test_inputs_in_a_dataclass_that_forward_changes_are_refused():
    model = net()
    with pytest.raises(UserError, match=r"forward changed inputs\.x"):
        SharpnessAware(model, adamw(model), "sam", forward=lambda m, given: m(given.x.mul_(2))).backward(
            [(Inputs(torch.ones(3, 4)), torch.arange(3))]
        )
