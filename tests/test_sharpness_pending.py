"""What outlives a backward: a decoupled wsam's correction goes with its own .grad or not at all, also of copies."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import make_batch, make_model
from test_sharpness_oracle import close, combine, oracle, theta_of
from torch.nn import functional as F

from functional_sam import METHODS, SharpnessAware

W = 0.9 / (1 - 0.9)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def stepped(theta, g):
    return combine(1.0, theta, -0.1, g)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("following", ["sam", "loop", "nothing"])
def test_an_abandoned_correction_is_not_applied(following, kept):
    """The dose recipe: a trial's gradient is dropped by zero_grad, and a step of something else follows."""
    model = make_model()
    optimizer, theta = sgd(model), theta_of(model)
    trial = SharpnessAware(model, optimizer, "wsam", rho=0.3)
    trial.backward([make_batch()], measure_dose=True)
    optimizer.zero_grad()
    if not kept:
        del trial
    g, there = oracle(model, theta, make_batch(seed=2), rho=0.05)
    if following == "sam":
        SharpnessAware(model, optimizer, "sam", rho=0.05).backward([make_batch(seed=2)])
    elif following == "loop":
        inputs, targets = make_batch(seed=2)
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    said = [str(w.message) for w in caught if "wsam" in str(w.message)]
    assert len(said) == (kept and following != "nothing"), said
    used = {"sam": there, "loop": g, "nothing": combine(0.0, g, 0.0, g)}[following]
    close(theta_of(model), stepped(stepped(theta, used), used))


def test_a_gradient_that_was_clipped_in_place_is_still_its_own():
    model = make_model()
    optimizer, theta = sgd(model), theta_of(model)
    g, there = oracle(model, theta, make_batch(), rho=0.3)
    SharpnessAware(model, optimizer, "wsam", rho=0.3).backward([make_batch()])  # held by nobody: there is nothing left to apply
    optimizer.step()
    close(theta_of(model), stepped(theta, g))
    model.load_state_dict(theta)
    sharpness = SharpnessAware(model, optimizer, "wsam", rho=0.3)
    sharpness.backward([make_batch()])
    for p in model.parameters():
        p.grad.mul_(0.5)
    optimizer.step()
    close(theta_of(model), stepped(theta, combine(1.0, combine(0.5 - W, g, W, there), 0.0, g)))


def test_a_step_that_takes_its_gradient_by_a_closure():
    """As Lightning does: the hook before the step comes before the gradient."""
    model = make_model()
    optimizer = sgd(model)
    sharpness = SharpnessAware(model, optimizer, "wsam", rho=0.3)
    for step in range(2):
        theta = theta_of(model)
        g, there = oracle(model, theta, make_batch(seed=step), rho=0.3)
        optimizer.step(lambda step=step: sharpness.backward([make_batch(seed=step)]))
        close(theta_of(model), stepped(theta, combine(1.0 - W, g, W, there)))
        optimizer.zero_grad()


def test_a_failed_step_leaves_no_correction():
    model = make_model()
    optimizer = sgd(model)
    sharpness = SharpnessAware(model, optimizer, "wsam", rho=0.3)
    inputs, targets = make_batch()
    with pytest.raises(FloatingPointError):
        SharpnessAware(model, optimizer, "wsam", rho=1e300).backward([(inputs, targets)])
    sharpness.backward([(inputs, targets)])
    optimizer.zero_grad()
    sharpness.check([(inputs, targets)])
    assert not sharpness.state_dict()["mix"]["pending"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_trains_as_the_original_does(method, how):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.2)
    sharpness.backward([make_batch()])
    optimizer.step()
    optimizer.zero_grad()
    results = []
    for m, o, s in (how((model, optimizer, sharpness)), (model, optimizer, sharpness)):
        for step in range(2):
            s.backward([make_batch(seed=step)])
            o.step()
            o.zero_grad()
        assert s._seen.steps == 3
        results.append(theta_of(m))
    close(results[1], results[0], 0)
