"""Frozen, tied, unused parameters, zero gradients, odd heads."""

import math

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, warmed_up
from test_sharpness_oracle import close, combine, norm, oracle, state_of, theta_of
from torch.nn import functional as F

from functional_sam import METHODS, SharpnessAware
from functional_sam.errors import UserError

KINDS = pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
ALL = pytest.mark.parametrize("method", METHODS)
PERTURBED = [name for name in METHODS if METHODS[name].path != "plain"]


def uneven_batch(rows=8):
    inputs, targets = make_batch(rows)
    targets[0, :4] = targets[5] = -100
    return inputs, targets


def relative(a, b):
    return norm(combine(1.0, a, -1.0, b)) / norm(b)


# ---------------------------------------------------------------------- odd parameters


class Odd(TinyReadout):
    """A tied head (as ever), a frozen bias, a parameter that is never used, one used every other call, one out of the optimizer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.sometimes = torch.nn.Parameter(torch.ones(1))
        self.stranger = torch.nn.Parameter(torch.ones(1))
        self.up.bias.requires_grad_(False)
        self.used = False

    def forward(self, tokens, readout=None):
        scale = self.sometimes if self.used else 1.0
        if readout is None:
            return super().forward(tokens) * self.stranger * scale
        return super().forward(tokens, lambda h, weight: readout(h * self.stranger * scale, weight))


@pytest.mark.parametrize("keep", ["auto", "u", "cotangent"])
@ALL
def test_frozen_tied_unused_and_unknown_parameters(method, keep):
    model = make_model(Odd)
    optimizer = adamw(model)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p is not model.stranger]
    sharpness = SharpnessAware(model, optimizer, method, rho=0.2, keep=keep)
    model.unused.grad = torch.full_like(model.unused, 3.0)  # stale: replaced, not accumulated
    for step in range(4):
        model.used = step % 2 == 1
        before = theta_of(model)
        sharpness.backward([make_batch(seed=step)])
        assert all(torch.equal(before[n], p) for n, p in theta_of(model).items())
        assert model.unused.grad is None or not model.unused.grad.any()
        assert model.up.bias.grad is None
        assert model.stranger.grad is not None
        if METHODS[method].mix is None and METHODS[method].ascent == "gradient" and method != "sam-on":
            # The parameter outside of the optimizer stays where it is and counts for no norm.
            trained = {n: p.detach() for n, p in model.named_parameters() if n not in ("stranger", "up.bias")}
            _, expected = oracle(
                model, trained, make_batch(seed=step), "gradient", METHODS[method].path, 0.2, phi=sharpness.options.get("phi", 0)
            )
            close(
                {n: g for n, g in gradients(model).items() if n in expected},
                {n: expected[n] for n in gradients(model) if n in expected},
            )
        optimizer.step()
        assert torch.equal(before["up.bias"], model.up.bias)


@KINDS
@pytest.mark.parametrize("method", [name for name in PERTURBED if METHODS[name].ascent != "random"])
def test_a_zero_gradient_is_left_alone(method, kind):
    """|g| = 0: no perturbation, no NaN. Zero embeddings and norm make every logit 0 and every gradient but the bias's 0."""
    model = make_model(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    sharpness = SharpnessAware(model, adamw(model), method, rho=0.3)
    for _ in range(2):
        loss = sharpness.backward([make_batch()])
        assert float(loss) == pytest.approx(math.log(11))
        assert all(not g.any() for g in gradients(model).values())
        assert all(not p.any() for p in model.parameters())


@pytest.mark.parametrize("method", ["gnp", "gsam", "wsam", "sam", "functional-sam", "penalty-sam"])
@pytest.mark.parametrize("options", [{"subset": lambda name, p: name == "unused"}, {"ascent": "momentum"}])
def test_a_zero_direction_leaves_the_plain_gradient(method, options):
    """Size 0 though g is not: nothing to perturb, or no momentum yet."""

    class Unused(TinyModel):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.ones(3))

        def forward(self, tokens):
            return super().forward(tokens) + 0.0 * self.unused.sum()

    model = make_model(Unused)
    SharpnessAware(model, adamw(model), "adamw").backward([make_batch()])
    expected = gradients(model)
    SharpnessAware(model, adamw(model), method, rho=0.3, **options).backward([make_batch()])
    close(gradients(model), expected, 0)


def test_a_head_that_is_a_view_of_a_parameter():
    """The kept head must not move with the parameter it is a slice of."""

    class Padded(TinyReadout):
        def forward(self, tokens, readout=None):
            h = self.norm(self.embedding(tokens) + self.down(F.gelu(self.up(self.embedding(tokens)))))
            weight = self.embedding.weight[:11]
            return h @ weight.T if readout is None else readout(h, weight)

    model = make_model(Padded, vocab=16)
    optimizer = warmed_up(model)
    m, P = state_of(model, optimizer)
    for ascent in ("gradient", "momentum"):
        for path in ("sam", "functional", "logit"):
            _, expected = oracle(model, theta_of(model), make_batch(), ascent, path, 0.3, m, P)
            SharpnessAware(model, optimizer, "sam", rho=0.3, ascent=ascent, path=path).backward([make_batch()])
            close(gradients(model), expected)


@pytest.mark.parametrize("method", ["adamw", "functional-sam", "momentum-functional-sam"])
def test_a_model_that_changes_what_readout_returned(method):
    """A temperature after the head: right without readout, refused with it."""

    class Tempered(TinyReadout):
        def forward(self, tokens, readout=None):
            return super().forward(tokens, readout) / 2.0

    model = make_model(Tempered)
    optimizer = warmed_up(model)
    with pytest.raises(UserError, match="returns what readout returned"):
        SharpnessAware(model, optimizer, method).backward([make_batch()])
    SharpnessAware(model, optimizer, method, keep="cotangent").backward([make_batch()])


def test_the_kept_cotangent_may_be_bf16():
    model = make_model(dtype=torch.float32, width=16)
    SharpnessAware(model, adamw(model), "functional-sam", rho=0.3).backward([make_batch()])
    expected = gradients(model)
    sharpness = SharpnessAware(model, adamw(model), "functional-sam", rho=0.3, keep_dtype=torch.bfloat16)
    sharpness.backward([make_batch()])
    assert 0 < relative(gradients(model), expected) < 0.01


@pytest.mark.parametrize("options", [{"per": "layer"}, {"per": "element", "eta": 0.0}])
def test_adaptive_ascents_of_adapters_at_their_start(options):
    """B = 0, and so A has no gradient: T g = 0 everywhere, and what is left is the plain gradient, B's."""

    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = torch.nn.Parameter(torch.randn(2, 4)), torch.nn.Parameter(torch.zeros(3, 2))

        def forward(self, x):
            return x.tanh()[..., :3] + x @ self.A.T @ self.B.T

    model = make_model(Adapter)
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    expected = torch.autograd.grad(F.cross_entropy(model(inputs), targets), [model.A, model.B])
    SharpnessAware(model, adamw(model), "asam", rho=0.3, **options).backward([(inputs, targets)])
    assert expected[1].norm() > 0.1
    close(gradients(model), dict(zip("AB", expected, strict=True)))


# ---------------------------------------------------------------------- a model that changes between steps


def step_of(sharpness, optimizer, seed):
    sharpness.backward([make_batch(seed=seed)])
    optimizer.step()


@pytest.mark.parametrize("subset", [None, lambda name, p: "weight" in name])
@pytest.mark.parametrize("method", ["sam", "functional-sam", "momentum-sam", "random-sam", "precond-sam"])
def test_a_head_that_is_replaced(method, subset):
    """The new one is perturbed, where the subset says so; what the optimizer still holds of the old one counts for no norm."""
    found = []
    for keeps_old in (False, True):
        model = make_model()
        optimizer = adamw(model)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.3, subset=subset)
        step_of(sharpness, optimizer, 0)
        torch.manual_seed(5)
        old, model.up = model.up, torch.nn.Linear(model.up.in_features, model.up.out_features).double()
        held = optimizer.param_groups[0]["params"]
        if not keeps_old:  # as it should be
            held[:] = [p for p in held if all(p is not q for q in old.parameters())]
        held += list(model.up.parameters())
        step_of(sharpness, optimizer, 1)
        sharpness.backward([make_batch(seed=2)])
        found.append(gradients(model))
        if not keeps_old:
            anew = SharpnessAware(model, optimizer, method, rho=0.3, subset=subset)
            anew._perturbation.steps = sharpness.steps - 1  # of which random directions are a function
            optimizer.zero_grad()
            anew.backward([make_batch(seed=2)])
            close(gradients(model), found[0])
    close(found[1], found[0])


def test_the_earlier_weights_of_what_is_frozen_by_now():
    """TRAM's theta_{t-1} of a parameter that was frozen on the way is where it stays, not where it was before its last step."""
    model = make_model()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "tram", rho=0.3)
    for seed in range(3):
        step_of(sharpness, optimizer, seed)
    model.up.requires_grad_(False)
    step_of(sharpness, optimizer, 3)
    assert torch.equal(sharpness._mix.old[model.up.weight], model.up.weight)


@pytest.mark.parametrize("method", ["sam", "functional-sam", "precond-sam"])
def test_a_model_whose_parameters_are_all_others_is_refused(method):
    model = make_model()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
    step_of(sharpness, optimizer, 0)
    model.load_state_dict(make_model(seed=1).state_dict(), assign=True)
    with pytest.raises(UserError, match=r"none of the optimizer's parameters is in the model any more"):
        sharpness.backward([make_batch(seed=1)])
