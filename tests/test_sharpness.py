"""SharpnessAware against the reference page, closed forms, and what an optimizer owes."""

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, warmed_up
from torch.nn import functional as F

from functional_sam import METHODS, SharpnessAware
from functional_sam.errors import UserError
from functional_sam.sharpness import reference

REFERENCE = {
    "sam": (reference.sam, False),
    "functional-sam": (reference.functional_sam, False),
    "logit-sam": (reference.logit_sam, False),
    "precond-sam": (reference.sam, True),
    "precond-functional-sam": (reference.functional_sam, True),
}
FIVE = ["adamw", "sam", "functional-sam", "precond-sam", "precond-functional-sam"]


def close(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def preconditioner(model, optimizer):
    """P of the page from AdamW's state; the page's formula is held to one number by hand below."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    (steps,) = {int(state["step"]) for state in states.values()}
    return reference.adam_preconditioner({name: state["exp_avg_sq"] for name, state in states.items()}, steps, 0.98, 1e-9)


def test_the_preconditioner_of_the_page_by_hand():
    """Two steps whose g is 3: v = (1 - .9) 9 (1 + .9) = 1.71, v_hat = 9, P = 1 / (3 + 1); and theta' = theta + rho P g / |P g|.

    An element that no gradient has reached stays where it is, whatever its gradient is now.
    """
    P = reference.adam_preconditioner({"w": torch.tensor([1.71, 0.19, 0.0])}, 2, 0.9, 1.0)
    torch.testing.assert_close(P["w"], torch.tensor([0.25, 0.5, 0.0]))
    theta = reference.ascend({"w": torch.zeros(3)}, {"w": torch.tensor([12.0, 8.0, 100.0])}, 0.5, P)  # P g = (3, 4, 0)
    torch.testing.assert_close(theta["w"], torch.tensor([0.3, 0.4, 0.0]))


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("method", [name for name in REFERENCE if name.startswith("precond")])
def test_words_that_were_not_met_do_not_take_the_whole_ascent(method, kind):
    """An embedding's rows that no gradient has reached have v = 0: their P is unknown, not 1 / e = 1e9."""
    model = make_model(kind)
    optimizer = warmed_up(model)
    inputs, targets = make_batch(ignored=1)
    vs = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    next(iter(vs.values()))[:2] = 0.0  # as of rows of an embedding that is not the head too
    (steps,) = {int(state["step"]) for state in optimizer.state.values()}
    SharpnessAware(model, optimizer, method, rho=0.3).backward([(inputs, targets)])
    function, _ = REFERENCE[method]
    theta = {name: p.detach() for name, p in model.named_parameters()}
    P = {name: (v > 0) / ((v / (1 - 0.98**steps)).sqrt() + 1e-9) for name, v in vs.items()}
    close(gradients(model), function(model, theta, inputs, targets, 0.3, P))


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("method", REFERENCE)
def test_equals_the_reference_page(method, kind):
    model = make_model(kind)
    optimizer = warmed_up(model)
    inputs, targets = make_batch(ignored=1)
    loss = SharpnessAware(model, optimizer, method, rho=0.3).backward([(inputs, targets)])
    function, preconditioned = REFERENCE[method]
    theta = {name: p.detach() for name, p in model.named_parameters()}
    expected = function(model, theta, inputs, targets, 0.3, preconditioner(model, optimizer) if preconditioned else None)
    close(gradients(model), expected)
    torch.testing.assert_close(loss, F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).detach())


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("method", REFERENCE)
def test_micro_batches_equal_one_batch(method, kind):
    model = make_model(kind)
    optimizer = warmed_up(model)
    inputs, targets = make_batch(rows=8)
    targets[0, :4] = targets[5] = -100  # uneven counts, one micro-batch with a row of none
    sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
    loss = sharpness.backward([(inputs, targets)])
    expected = gradients(model)
    parts = [(inputs[a:b], targets[a:b]) for a, b in [(0, 1), (1, 5), (5, 6), (6, 8)]]
    optimizer.zero_grad()
    torch.testing.assert_close(sharpness.backward(parts), loss, rtol=1e-12, atol=1e-12)
    close(gradients(model), expected)


@pytest.mark.parametrize("method", REFERENCE)
def test_a_loss_of_the_callers_own(method):
    """Uneven counts that only the loss_fn knows: the same gradient as the default, whose counts are known beforehand."""
    model = make_model()
    optimizer = warmed_up(model)
    inputs, targets = make_batch(rows=8)
    targets[0, :4] = -100
    parts = [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]
    SharpnessAware(model, optimizer, method, rho=0.3).backward(parts)
    expected = gradients(model)

    def loss_fn(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), int((targets != -100).sum())

    SharpnessAware(model, optimizer, method, rho=0.3, loss_fn=loss_fn).backward(parts)
    close(gradients(model), expected)


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_bit_identical_after_backward(method, kind):
    model = make_model(kind, dtype=torch.float32)
    optimizer = warmed_up(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharpness = SharpnessAware(model, optimizer, method, rho=0.7)
    for seed in range(3):
        optimizer.zero_grad()
        sharpness.backward([make_batch(seed=seed)])
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("method", [m for m in FIVE if m != "adamw"])
def test_rho_zero_is_adamw_bit_for_bit(method):
    results = []
    for name, rho in [("adamw", None), (method, 0.0)]:
        model = make_model(TinyReadout, dtype=torch.float32)
        optimizer = adamw(model)
        sharpness = SharpnessAware(model, optimizer, name, rho=rho)
        for step in range(20):
            sharpness.backward([make_batch(seed=step), make_batch(rows=2, seed=50 + step)])
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("method", [m for m in FIVE if m != "adamw"])
def test_a_radius_too_small_to_move_a_weight_leaves_the_plain_gradient(method, kind):
    """Both passes do run here (unlike at rho = 0), at the same weights, so they agree bit for bit."""
    model = make_model(kind, dtype=torch.float32)
    optimizer = warmed_up(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.where(p == 0, 1.0, p))
    SharpnessAware(model, optimizer, "adamw").backward([make_batch()])
    expected = gradients(model)
    SharpnessAware(model, optimizer, method, rho=1e-12).backward([make_batch()])
    close(gradients(model), expected, tolerance=0)


def test_adamw_is_the_plain_gradient():
    model = make_model(dtype=torch.float64)
    inputs, targets = make_batch()
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    expected = gradients(model)
    SharpnessAware(model, adamw(model), "adamw").backward([(inputs, targets)])
    close(gradients(model), expected)


@pytest.mark.parametrize("method", ["functional-sam", "precond-functional-sam"])
def test_functional_path_is_the_plain_gradient_of_a_model_linear_in_theta(method):
    """H_F = 0 for such a model: the Jacobian does not move."""
    model = torch.nn.Linear(7, 5).double()
    batch = (torch.randn(6, 7, dtype=torch.float64), torch.randint(5, (6,)))
    optimizer = adamw(model)
    SharpnessAware(model, optimizer, "adamw").backward([batch])
    optimizer.step()
    SharpnessAware(model, optimizer, "adamw").backward([batch])
    expected = gradients(model)
    SharpnessAware(model, optimizer, method, rho=0.5).backward([batch])
    close(gradients(model), expected)
    SharpnessAware(model, optimizer, "sam", rho=0.5).backward([batch])
    assert not torch.allclose(model.weight.grad, expected["weight"])


def test_quadratic_by_hand():
    """L = w^T A w / 2 with A = diag(1, 4), w = (3, 1): g = (3, 4), |g| = 5, w' = w + rho (0.6, 0.8), g' = A w'."""

    class Quadratic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))

        def forward(self, _):
            return self.w

    def loss_fn(z, _):
        return 0.5 * (torch.tensor([1.0, 4.0], dtype=torch.float64) * z * z).sum(), 1

    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.zeros(1), torch.zeros(1))
    loss = SharpnessAware(model, optimizer, "sam", rho=0.5, loss_fn=loss_fn).backward([batch])
    assert float(loss) == 6.5
    torch.testing.assert_close(model.w.grad, torch.tensor([3.3, 5.6], dtype=torch.float64))
    SharpnessAware(model, optimizer, "functional-sam", rho=0.5, loss_fn=loss_fn).backward([batch])
    torch.testing.assert_close(model.w.grad, torch.tensor([3.0, 4.0], dtype=torch.float64))  # z is linear in w
    SharpnessAware(model, optimizer, "logit-sam", rho=0.5, loss_fn=loss_fn).backward([batch])
    torch.testing.assert_close(model.w.grad, torch.tensor([3.3, 5.6], dtype=torch.float64))


def test_first_step_of_an_adam_ascent_takes_the_plain_gradient():
    model = make_model()
    optimizer = adamw(model)
    SharpnessAware(model, optimizer, "precond-functional-sam", rho=0.3).backward([make_batch()])
    first = gradients(model)
    SharpnessAware(model, optimizer, "functional-sam", rho=0.3).backward([make_batch()])
    close(first, gradients(model))


@pytest.mark.parametrize("method", FIVE)
def test_learning_rate_zero_leaves_theta(method):
    model = make_model(dtype=torch.float32)
    optimizer = adamw(model, lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    sharpness = SharpnessAware(model, optimizer, method, rho=0.1)
    for step in range(3):
        sharpness.backward([make_batch(seed=step)])
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "functional"}, "functional-sam"),
        ({"method": "sam", "rho": -0.1}, "rho=-0.1"),
        ({"method": "sam", "rho": float("nan")}, "rho=nan"),
        ({"method": "sam", "forms": "a"}, "unknown option of sam 'forms'"),
        ({"method": "precond-sam", "normalize_by": "length"}, "unknown value of normalize_by 'length'"),
        ({"method": "sam", "scope": "micro"}, "'micro-batch'"),
        ({"method": "sam", "every": 0}, "every=0"),
        ({"method": "sam", "keep": "hidden"}, "has_readout"),
    ],
)
def test_wrong_options_say_what_is_wrong(options, words):
    model = make_model()
    with pytest.raises(UserError, match=words):
        SharpnessAware(model, adamw(model), **options)


def test_wrong_use_says_what_is_wrong():
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="second moment, which SGD does not keep"):
        SharpnessAware(model, sgd, "precond-sam")
    with pytest.raises(UserError, match="first moment"):
        SharpnessAware(model, sgd, "momentum-sam")
    sharpness = SharpnessAware(model, sgd, "sam")
    with pytest.raises(UserError, match="an empty one"):
        sharpness.backward([])
    with pytest.raises(UserError, match="a single micro-batch goes into a list"):
        sharpness.backward(make_batch())
    inputs, targets = make_batch()
    with pytest.raises(UserError, match="no valid target"):
        sharpness.backward([(inputs, torch.full_like(targets, -100))])
    mean = SharpnessAware(model, sgd, "sam", loss_fn=lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()))
    with pytest.raises(UserError, match="sum over valid targets"):
        mean.backward([make_batch()])
