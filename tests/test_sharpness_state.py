"""Failures, schedules, state and exact resume, wrong use."""

import contextlib
import io

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, parts_of, run, warmed_up
from test_sharpness_oracle import close, oracle, theta_of
from torch.nn import functional as F

from functional_sam import METHODS, SharpnessAware
from functional_sam.errors import UserError

KINDS = pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
ALL = pytest.mark.parametrize("method", METHODS)
PERTURBED = [name for name in METHODS if METHODS[name].path != "plain"]


# ---------------------------------------------------------------------- failures


class Faulty(TinyReadout):
    """Does something at a certain call of forward."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls, self.faults = 0, {}

    def forward(self, tokens, readout=None):
        self.calls += 1
        fault = self.faults.get(self.calls, lambda x: x)
        x = self.embedding(tokens)
        h = fault(self.norm(x + self.down(F.gelu(self.up(x)))))
        return h @ self.embedding.weight.T if readout is None else readout(h, self.embedding.weight)


def raising(error):
    def fault(_):
        raise error

    return fault


@pytest.mark.parametrize("keep", ["auto", "u", "cotangent"])
@pytest.mark.parametrize("error", [RuntimeError("the caller's"), KeyboardInterrupt()])
@ALL
def test_whatever_the_model_raises_the_weights_are_back(method, error, keep):
    """At every call of a step; and the step can be taken again as if nothing had happened."""
    model = make_model(Faulty, dtype=torch.float32)
    optimizer = warmed_up(model)
    twin = make_model(Faulty, dtype=torch.float32)
    twin_optimizer = warmed_up(twin)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.5, keep=keep)
    undisturbed = SharpnessAware(twin, twin_optimizer, method, rho=0.5, keep=keep)
    for step in range(3):
        twin.calls = 0
        undisturbed.backward([make_batch(seed=step)])
        for call in range(1, twin.calls + 1):
            before = theta_of(model)
            model.calls, model.faults = 0, {call: raising(error)}
            with pytest.raises(type(error)):
                sharpness.backward([make_batch(seed=step)])
            assert all(torch.equal(before[n], p) for n, p in theta_of(model).items())
            assert sharpness.steps == step
        model.faults = {}
        sharpness.backward([make_batch(seed=step)])
        close(gradients(model), gradients(twin), 0)
        optimizer.step()
        twin_optimizer.step()


@pytest.mark.parametrize("keep", ["auto", "u", "cotangent"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_named(method, keep):
    """Step and pass, weights restored before it is raised."""
    for call, where in [(1, "pass 1"), (2, "pass 2")]:
        model = make_model(Faulty, dtype=torch.float32)
        optimizer = warmed_up(model)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.5, keep=keep)
        if method != "looksam":
            sharpness.backward([make_batch(seed=3)])
            optimizer.step()
        step = sharpness.steps + 1
        before = theta_of(model)
        faults = {call: lambda h: h * float("nan")}
        if method == "tram":  # its first forward is at the old weights
            faults = {call + 1: faults[call]}
        if call == 2 and method in ("adamw", "plain", "momentum-sam", "random-sam"):
            continue
        if call == 1 and method in ("momentum-sam", "random-sam"):
            where = "pass 2"  # their only pass is at theta + eps
        model.calls, model.faults = 0, faults
        with pytest.raises(FloatingPointError, match=f"step {step}, {where}.*not finite.*rho"):
            sharpness.backward([make_batch()])
        assert all(torch.equal(before[n], p) for n, p in theta_of(model).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_after_a_failed_one(method):
    """A FloatingPointError that the caller catches leaves nothing behind in the state of the method."""
    thetas = []
    for fails in (False, True):
        model = make_model(Faulty, dtype=torch.float32)
        optimizer = warmed_up(model)
        sharpness = SharpnessAware(model, optimizer, method, **({"every": 2} if method == "looksam" else {}))
        for step in range(5):
            if fails:
                calls = 2 + (method == "tram") if step else 1
                model.calls, model.faults = 0, {calls: lambda h: h * float("nan")}
                with contextlib.suppress(FloatingPointError):
                    sharpness.backward([make_batch(seed=step)])
                    assert model.calls < calls  # not reached: no such pass in this step
                    sharpness._perturbation.steps -= 1
                    model.zero_grad()
                model.faults = {}
                if method == "wsam":
                    assert not sharpness._mix.pending
            sharpness.backward([make_batch(seed=step)])
            optimizer.step()
        thetas.append(theta_of(model))
    assert all(torch.equal(thetas[0][n], thetas[1][n]) for n in thetas[0])


def test_an_infinite_gradient_is_named():
    model = make_model(Faulty, dtype=torch.float32)
    optimizer = warmed_up(model)
    optimizer.state[model.up.weight]["exp_avg"][0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="step 1, pass 1"):
        SharpnessAware(model, optimizer, "momentum-functional-sam").backward([make_batch()])


# ---------------------------------------------------------------------- schedules, state, resume


def radius_of(sharpness):
    (value,) = set(sharpness._perturbation.radii().values())
    return value


@KINDS
@pytest.mark.parametrize("method", PERTURBED)
def test_radius_zero_is_adamw_bit_for_bit(method, kind):
    results = []
    for name, rho in [("adamw", None), (method, 0.0)]:
        model = make_model(kind, dtype=torch.float32, dropout=0.2)
        optimizer = adamw(model)
        torch.manual_seed(1)
        run(SharpnessAware(model, optimizer, name, rho=rho), optimizer, 4, cuts=[2])
        results.append(theta_of(model))
    close(results[0], results[1], 0)


def test_radius_schedules():
    model = make_model()
    optimizer = adamw(model, lr=0.1)
    warm = SharpnessAware(model, optimizer, "sam", rho=0.4, rho_schedule="warmup", warmup_steps=4)
    seen = []
    for step in range(6):
        model.zero_grad()
        warm.backward([make_batch(seed=step)])
        seen.append(radius_of(warm))
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    follows = SharpnessAware(model, optimizer, "sam", rho=0.5, rho_schedule="lr", lr_min=0.02, rho_min=0.1)
    for lr, rho in [(0.1, 0.5), (0.06, 0.3), (0.02, 0.1), (0.01, 0.1), (0.2, 0.5)]:
        optimizer.param_groups[0]["lr"] = lr
        assert radius_of(follows) == pytest.approx(rho)
    optimizer.param_groups[0]["lr"] = 0.05
    assert radius_of(SharpnessAware(model, optimizer, "sam", rho=0.5, rho_schedule="lr", lr_max=0.1)) == pytest.approx(0.25)
    optimizer.param_groups[0]["rho"] = 0.8
    assert radius_of(follows) == pytest.approx(0.1 + 0.7 * 0.03 / 0.08)


def test_a_scheduled_radius_reaches_the_gradient():
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), "functional-sam", rho=0.4, rho_schedule="warmup", warmup_steps=2)
    for rho in (0.2, 0.4, 0.4):
        _, expected = oracle(model, theta_of(model), make_batch(), "gradient", "functional", rho)
        sharpness.backward([make_batch()])
        close(gradients(model), expected)
        model.zero_grad()


@pytest.mark.parametrize(("schedule", "radii"), [("after-warmup", (0.0, 0.0, 0.4, 0.4)), ("in-warmup", (0.4, 0.4, 0.0, 0.0))])
def test_a_radius_that_is_off_in_warm_up_or_after_it(schedule, radii):
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), "functional-sam", rho=0.4, rho_schedule=schedule, warmup_steps=2)
    for rho in radii:
        sharpness.backward([make_batch()])
        assert radius_of(sharpness) == rho
        expected = oracle(model, theta_of(model), make_batch(), "gradient", "functional", rho)[1]
        close(gradients(model), expected)
        model.zero_grad()


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize(("stop", "options"), [(1, {}), (4, {}), (4, {"every": 3}), (3, {"rho_schedule": "lr"})])
@ALL
def test_resume_is_exact(method, stop, options):
    """Stop, save through a file, build everything anew, load, go on: bit for bit the uninterrupted run. With dropout."""
    results = []
    for interrupted in (False, True):
        model = make_model(TinyReadout, dtype=torch.float32, dropout=0.2)
        optimizer = adamw(model)
        sharpness = SharpnessAware(model, optimizer, method, **options)
        torch.manual_seed(3)
        for step in range(8):
            if interrupted and step == stop:
                parts = {"model": model, "optimizer": optimizer, "sharpness": sharpness}
                state = through_a_file({"rng": torch.get_rng_state(), **{k: v.state_dict() for k, v in parts.items()}})
                model = make_model(TinyReadout, seed=9, dtype=torch.float32, dropout=0.2)
                optimizer = adamw(model, lr=0.5)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                sharpness = SharpnessAware(model, optimizer, method, **options)
                sharpness.load_state_dict(state["sharpness"])
                torch.set_rng_state(state["rng"])
            optimizer.param_groups[0]["lr"] = 1e-2 * (8 - step) / 8  # set by hand, as a training loop does
            sharpness.backward(parts_of(make_batch(5, seed=step), [2]))
            optimizer.step()
            optimizer.zero_grad()
        results.append(theta_of(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_wsam_state_between_backward_and_step():
    """Taken there, it holds the correction that the step will apply."""
    results = []
    for interrupted in (False, True):
        model = make_model(dtype=torch.float32)
        optimizer = warmed_up(model)
        sharpness = SharpnessAware(model, optimizer, "wsam", rho=0.2)
        sharpness.backward([make_batch()])
        if interrupted:
            state = through_a_file(sharpness.state_dict())
            sharpness._mix.pending = {}
            sharpness.load_state_dict(state)
        optimizer.step()
        assert not sharpness.state_dict()["mix"]["pending"]
        results.append(theta_of(model))
    close(results[0], results[1], 0)


def test_state_is_named_by_parameter_and_checked():
    model = make_model()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "tram")
    assert sharpness.state_dict() == {"method": "gradient-sam-tram", "steps": 0, "lr_max": 1e-2, "mix": {"old": {}}}
    sharpness.backward([make_batch()])
    state = sharpness.state_dict()
    assert set(state["mix"]["old"]) == {name for name, _ in model.named_parameters()}
    with pytest.raises(UserError, match="not one of mix None"):
        SharpnessAware(model, optimizer, "sam").load_state_dict(state)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"another model.*embedding"):
        SharpnessAware(other, adamw(other), "tram").load_state_dict(state)


# ---------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gsam", "rho_schedule": "lr", "lr_min": 1.0}, "lr_max=0.01 is not above lr_min=1"),
        ({"method": "wsam", "gamma": 1.0}, "gamma=1.0"),
        ({"method": "looksam", "every": 0}, "every=0"),
        ({"method": "angle-sam", "derivative": "difference", "step": 0.0}, "step=0.0"),
        ({"method": "angle-sam", "derivative": "differenc"}, "'difference'"),
        ({"method": "angle-sam", "dose": 0.0}, "dose=0.0: .*between 0 and 1"),
        ({"method": "angle-sam", "dose": True}, "dose=True"),
        ({"method": "angle-sam", "dose": float("nan")}, "dose=nan"),
        ({"method": "angle-sam", "dose": 0.1, "scope": "rank"}, "does not combine"),
        ({"method": "angle-sam", "dose": 0.1, "rho_schedule": "warmup", "warmup_steps": 3}, "'warmup' would do nothing"),
        ({"method": "gnp", "path": "penalty", "dose": 0.1}, "does not combine with gnp"),
        ({"method": "sam", "dose": 0.1}, "unknown option of sam 'dose'"),
        ({"method": "tram", "divergence": "last"}, "divergence"),
        ({"method": "gsam", "scope": "rank"}, "mixes both gradients"),
        ({"method": "penalty-sam", "scope": "micro-batch"}, "does not combine"),
        ({"method": "momentum-sam", "direction": "up"}, "direction"),
        ({"method": "sam", "path": "plain"}, "give both"),
        ({"method": "adamw", "path": "sam"}, "give both"),
        ({"method": "sam", "path": "funktional"}, "'functional'"),
        ({"method": "sam", "ascent": "grad"}, "'gradient'"),
        ({"method": "sam", "rho_schedule": "warmup"}, "warmup_steps"),
        ({"method": "sam", "rho_schedule": "after-warmup"}, 'rho_schedule="after-warmup" needs warmup_steps >= 1'),
        ({"method": "sam", "rho_schedule": "in-warmup"}, 'rho_schedule="in-warmup" needs warmup_steps >= 1'),
        ({"method": "sam", "subset": lambda name, p: False}, "selects no parameter"),
        ({"method": "sam", "subset": "bias"}, "subset='bias'"),
        ({"method": "fisher-sam", "scope": "micro-batch"}, "fisher"),
        ({"method": "sam", "keep": "all"}, "unknown value of keep 'all'"),
        ({"method": "random-sam", "seed": 0.5}, "seed=0.5"),
        ({"method": "sam", "phi": 3.0}, "unknown option of sam 'phi'"),
    ],
)
def test_wrong_options_say_what_is_wrong(options, words):
    model = make_model()
    with pytest.raises(UserError, match=words):
        SharpnessAware(model, adamw(model), **options)


def test_a_wrong_radius_of_a_group():
    model = make_model()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "rho": -1.0}])
    with pytest.raises(UserError, match=r"rho=-1.0 in a parameter group"):
        SharpnessAware(model, optimizer, "sam")


def test_a_loss_fn_that_counts_nothing():
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), "sam", loss_fn=lambda z, t: (z.sum(), 0))
    with pytest.raises(UserError, match="counted no valid target"):
        sharpness.backward([make_batch()])


def test_a_radius_that_follows_a_cycle_of_learning_rates():
    """OneCycleLR starts at a 25th of its highest rate: not the rate at which rho is whole."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    sharpness = SharpnessAware(model, optimizer, "gsam", rho=0.5)
    for _ in range(9):
        assert radius_of(sharpness) == pytest.approx(5.0 * optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.warns(UserWarning, match=r'rho_schedule="lr": a learning rate is above lr_max=0.1'):
        assert radius_of(sharpness) == pytest.approx(0.5)
