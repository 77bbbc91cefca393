"""What a caller sees: names, options and their errors, radii, micro-batches of any shape, what is kept, what a method costs."""

import typing

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, warmed_up
from test_sharpness_oracle import close, oracle, theta_of

import functional_sam
from functional_sam import METHODS, SharpnessAware, UserError
from functional_sam.sharpness import Options, cost, resolve
from functional_sam.sharpness.options import ASCENT_OPTIONS, FORMER, GENERAL_OPTIONS, MIX_OPTIONS, PATH_OPTIONS


def test_what_is_exported():
    assert set(functional_sam.__all__) == {"METHODS", "SharpnessAware", "UserError"}
    assert issubclass(UserError, ValueError)


def test_plain_is_no_sharpness_by_both_its_names():
    assert METHODS["plain"] is METHODS["adamw"]
    model = make_model()
    for name in ("plain", "adamw"):
        SharpnessAware(model, torch.optim.SGD(model.parameters(), lr=0.1), name).backward([make_batch()], measure_dose=True)
        close(gradients(model), oracle(model, theta_of(model), make_batch())[0], 1e-12)


# ---------------------------------------------------------------------- radius


def test_a_radius_that_is_a_function_of_the_step():
    """Called with 0, 1, 2 ...; the gradient is the one at the radius it returns; a group's own radius stays."""
    model = make_model()
    asked = []

    def rho(step):
        asked.append(step)
        return 0.1 * (step + 1)

    sharpness = SharpnessAware(model, adamw(model), "functional-sam", rho=rho)
    for step in range(3):
        _, expected = oracle(model, theta_of(model), make_batch(seed=step), "gradient", "functional", 0.1 * (step + 1))
        sharpness.backward([make_batch(seed=step)])
        close(gradients(model), expected)
        model.zero_grad()
    assert asked == [0, 1, 2]
    again = SharpnessAware(model, adamw(model), "functional-sam", rho=rho)
    again.load_state_dict(sharpness.state_dict())
    again.backward([make_batch()])
    assert asked[-1] == 3


@pytest.mark.parametrize("value", [-0.1, float("nan"), "0.1", None])
def test_a_function_that_returns_no_radius(value):
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), "sam", rho=lambda step: 0.1 if step < 1 else value)
    sharpness.backward([make_batch()])
    model.zero_grad()
    before = theta_of(model)
    with pytest.raises(UserError, match=r"rho=.* of step 1: the radius is a finite number"):
        sharpness.backward([make_batch()])
    close(theta_of(model), before, 0)
    assert sharpness.steps == 1


# ---------------------------------------------------------------------- micro-batches


class Nested(torch.nn.Module):
    """Takes {"tokens": tokens, "more": (scale, [shift])}."""

    def __init__(self):
        super().__init__()
        self.inner = TinyModel()

    def forward(self, inputs):
        scale, (shift,) = inputs["more"]
        return self.inner(inputs["tokens"]) * scale + shift


@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam", "tram", "penalty-sam"])
def test_inputs_may_be_any_tree(method):
    """The same gradient as of the model on its bare tokens, as a list and as a tuple of micro-batches."""
    results = []
    for nested in (False, True):
        model = make_model(Nested)
        optimizer = warmed_up(model.inner)
        given = model if nested else model.inner
        sharpness = SharpnessAware(given, optimizer, method, rho=0.2)
        for step in range(2):
            batches = [make_batch(seed=step), make_batch(rows=2, seed=9)]
            if nested:
                batches = tuple(({"tokens": x, "more": (1.0, [torch.zeros(())])}, t) for x, t in batches)
            sharpness.backward(batches)
            optimizer.step()
        results.append(gradients(model.inner))
    close(results[0], results[1], 1e-12)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "an empty one"),
        ((), "an empty one"),
        (iter([make_batch()]), "a list_iterator"),
        (make_batch(), "a single micro-batch goes into a list"),
        ([make_batch()[0]], "a single micro-batch goes into a list"),
    ],
)
def test_what_is_no_sequence_of_micro_batches(batches, words):
    model = make_model()
    with pytest.raises(UserError, match=words):
        SharpnessAware(model, adamw(model), "sam").backward(batches)


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("method", "old", "words"),
    [
        ("precond-sam", {"form": "c"}, "option form is called normalize_by now: normalize_by='energy'"),
        ("sam", {"m": "microbatch"}, "option m is called scope now: scope='micro-batch'"),
        ("looksam", {"k": 5}, "option k is called every now: every=5"),
        ("sam", {"interval": 3}, "option interval is called every now: every=3"),
        ("sam", {"only": "norm"}, "option only is called subset now: subset='norm'"),
        ("momentum-sam", {"sign": -1.0}, "option sign is called direction now: direction='descent'"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(method, old, words):
    model = make_model()
    with pytest.raises(UserError, match=words):
        SharpnessAware(model, adamw(model), method, **old)


def test_every_option_is_typed():
    """The keyword types are the options there are, and no former name is one of them."""
    known = set(GENERAL_OPTIONS) | {"ascent", "path"}
    for table in (ASCENT_OPTIONS, PATH_OPTIONS, MIX_OPTIONS):
        known |= {key for options in table.values() for key in options}
    assert set(typing.get_type_hints(Options)) == known
    assert not set(FORMER) & known


def test_resolve_needs_no_model():
    method, options = resolve("looksam", {"every": 4, "path": "functional"})
    assert (method.ascent, method.path, method.mix) == ("gradient", "functional", "looksam")
    assert (options["every"], options["alpha"], options["scope"]) == (4, 0.7, "step")
    with pytest.raises(UserError, match="did you mean 'sam'"):
        resolve("samm")


# ---------------------------------------------------------------------- costs


def test_costs_are_numbers():
    assert cost("sam").gradients == 2
    assert cost("looksam", {"every": 4}).gradients == pytest.approx(1.25)
    assert cost("sam", {"every": 5}).gradients == pytest.approx(1.2)
    assert cost("tram").gradients == pytest.approx(7 / 3)
    assert cost("momentum-sam").gradients == 1
    assert cost("momentum-sam", {"path": "functional"}).gradients == pytest.approx(4 / 3)
    assert cost("angle-sam", {"derivative": "difference"}).gradients == 2
    assert [cost(name).h for name in ("sam", "functional-sam", "logit-sam", "tram")] == [0, 1, 1, 2]
    assert (cost("logit-sam").head, cost("wsam").g, cost("tram").carried) == (1, 1, 1)
    assert cost("plain").memory == "none"


# ---------------------------------------------------------------------- what is kept


def keeps_u(monkeypatch, rows, **options):
    """Whether pass 1 of two steps kept u; and the gradients."""
    model = make_model(TinyReadout, dtype=torch.float32)
    sharpness = SharpnessAware(model, adamw(model), "functional-sam", rho=0.3, **options)
    kept = []
    original = sharpness._passes.gradient
    monkeypatch.setattr(sharpness._passes, "gradient", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1])
    sharpness.backward([make_batch(rows, 3), make_batch(rows, 3, seed=2)])
    memories = [memory for part in kept for memory in part]
    assert {memory.u is None for memory in memories} == {memory.h is not None for memory in memories}
    return memories[0].u is not None, gradients(model)


def test_auto_keeps_u_where_it_is_no_larger_than_the_parameters(monkeypatch):
    """P numbers and N V: with 2 micro-batches of 3 columns and 11 classes, rows up to P / 66; halved in bf16. The same gradient."""
    most = sum(p.numel() for p in make_model(TinyReadout).parameters()) // (2 * 3 * 11)
    assert most >= 1
    for rows, options, expected in [
        (most, {}, True),
        (most + 1, {}, False),
        (2 * most, {"keep_dtype": torch.bfloat16}, True),
        (most + 1, {"keep": "u"}, True),
        (most, {"keep": "hidden"}, False),
    ]:
        kept, grads = keeps_u(monkeypatch, rows, **options)
        assert kept == expected
        if "keep_dtype" not in options:
            close(grads, keeps_u(monkeypatch, rows, keep="hidden")[1], 0)  # bit for bit
