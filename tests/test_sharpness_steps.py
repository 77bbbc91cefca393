"""What SharpnessAware owes in training: accumulation, m, dropout, BatchNorm, odd parameters, failures, schedules, resume."""

import contextlib
import copy
import io
import math

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, warmed_up
from test_sharpness_methods import close, combine, norm, oracle, state_of, theta_of
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from functional_sam import METHODS, SharpnessAware
from functional_sam.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
ALL = pytest.mark.parametrize("method", METHODS)
PERTURBED = [name for name in METHODS if name != "adamw"]
MIXED = ("gsam", "wsam", "gnp", "looksam", "tram")


def parts_of(batch, cuts):
    inputs, targets = batch
    return [(inputs[a:b], targets[a:b]) for a, b in zip([0, *cuts], [*cuts, len(inputs)], strict=True)]


def uneven_batch(rows=8):
    inputs, targets = make_batch(rows)
    targets[0, :4] = targets[5] = -100
    return inputs, targets


def relative(a, b):
    return norm(combine(1.0, a, -1.0, b)) / norm(b)


def run(sharpness, optimizer, steps, cuts=(), seed=0):
    """Train; the gradients of the last step."""
    for step in range(steps):
        optimizer.zero_grad()
        loss = sharpness.backward(parts_of(make_batch(6, seed=seed + step), list(cuts)))
        last = gradients(sharpness.model)
        optimizer.step()
    return loss, last


# ---------------------------------------------------------------------- accumulation and m


@KINDS
@ALL
def test_any_cut_into_micro_batches(method, kind):
    """Uneven counts, one micro-batch with a single valid target, one with a row of none; two steps, so that mixes have state."""
    results = []
    for cuts in ([], [1, 5, 6], [3]):
        model = make_model(kind)
        optimizer = warmed_up(model)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
        run(sharpness, optimizer, 2)
        loss = sharpness.backward(parts_of(uneven_batch(), cuts))
        optimizer.step()
        results.append((loss, gradients(model), theta_of(model)))
    for loss, grads, theta in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-12, atol=1e-12)
        close(grads, results[0][1], 1e-11)
        close(theta, results[0][2], 1e-9)  # AdamW divides by sqrt(v), which may be tiny


@pytest.mark.parametrize("method", PERTURBED)
def test_any_cut_with_a_loss_of_the_callers_own(method):
    """The counts are known only after pass 1, and still everything (fisher's F, wsam's correction) is that of one batch."""
    thetas = []
    for cuts, own in [([], False), ([1, 5, 6], True)]:
        model = make_model()
        optimizer = warmed_up(model)

        def loss_fn(z, t):
            return F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum"), int((t != -100).sum())

        sharpness = SharpnessAware(model, optimizer, method, rho=0.3, **({"loss_fn": loss_fn} if own else {}))
        for _ in range(3):
            sharpness.backward(parts_of(uneven_batch(), cuts))
            optimizer.step()
        thetas.append(theta_of(model))
    close(thetas[1], thetas[0], 1e-9)


@KINDS
@pytest.mark.parametrize("method", PERTURBED)
def test_accumulation_under_bf16_autocast(method, kind):
    """The stated tolerance: 2 % of the gradient's norm (5 % of what the penalty, a difference or second derivative, adds to it)."""

    def forward(model, inputs, readout=None):
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs) if readout is None else model(inputs, readout=readout)

    results = []
    for cuts in ([], [1, 5, 6]):
        model = make_model(kind, dtype=torch.float32, vocab=31, width=16)
        optimizer = warmed_up(model)
        forward_ = forward if kind is TinyReadout else lambda model, inputs: forward(model, inputs)
        SharpnessAware(model, optimizer, method, rho=0.1, forward=forward_).backward(parts_of(uneven_batch(), cuts))
        results.append(gradients(model))
    assert relative(results[1], results[0]) < (0.05 if METHODS[method].path == "penalty" else 0.02)


@pytest.mark.parametrize("method", ["sam", "functional-sam", "precond-functional-sam"])
def test_accumulation_in_bf16_parameters(method):
    """Stated tolerance 3 %: gradients are summed in bf16 (8 bits)."""
    results = []
    for cuts in ([], [1, 5, 6]):
        model = make_model(dtype=torch.bfloat16, vocab=31, width=16)
        optimizer = warmed_up(model)
        before = theta_of(model)
        SharpnessAware(model, optimizer, method, rho=1.0).backward(parts_of(uneven_batch(), cuts))
        assert all(torch.equal(before[n], p) for n, p in theta_of(model).items())
        results.append({n: g.float() for n, g in gradients(model).items()})
    assert relative(results[1], results[0]) < 0.03


def test_autocast_around_the_whole_step():
    """Its cache of cast weights is emptied when the weights move; a stale one would make pass 2 a second pass 1."""
    grads = {}
    for method in ("adamw", "sam"):
        model = make_model(dtype=torch.float32, vocab=31, width=16)
        optimizer = adamw(model)
        with torch.autocast("cpu", torch.bfloat16):
            SharpnessAware(model, optimizer, method, rho=1.0).backward([uneven_batch()])
        grads[method] = gradients(model)
    g, there = grads["adamw"]["up.weight"], grads["sam"]["up.weight"]
    assert (g - there).norm() > 0.05 * g.norm()


@KINDS
@pytest.mark.parametrize(
    ("ascent", "path"), [("gradient", "sam"), ("adam", "functional"), ("adaptive", "logit"), ("momentum", "sam")]
)
def test_m_microbatch(ascent, path, kind):
    """Each micro-batch perturbed by its own direction, its part of the mean loss pulled back there."""
    model = make_model(kind)
    optimizer = warmed_up(model)
    m, P = state_of(model, optimizer)
    parts = parts_of(uneven_batch(), [1, 4])
    total = sum(int((t != -100).sum()) for _, t in parts)
    expected = {n: torch.zeros_like(p) for n, p in theta_of(model).items()}
    for part in parts:
        _, its = oracle(model, theta_of(model), part, ascent, path, 0.2, m, P)
        expected = combine(1.0, expected, int((part[1] != -100).sum()) / total, its)
    SharpnessAware(model, optimizer, "sam", rho=0.2, ascent=ascent, path=path, m="microbatch").backward(parts)
    close(gradients(model), expected)

    def loss_fn(z, t):
        return F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum"), int((t != -100).sum())

    own = SharpnessAware(model, optimizer, "sam", rho=0.2, ascent=ascent, path=path, m="microbatch", loss_fn=loss_fn)
    own.backward(parts)
    close(gradients(model), expected)


def test_m_microbatch_with_a_micro_batch_of_no_target():
    model = make_model()
    inputs, targets = make_batch(4)
    targets[:2] = -100
    sharpness = SharpnessAware(model, adamw(model), "sam", rho=0.2, m="microbatch")
    sharpness.backward(parts_of((inputs, targets), [2]))
    _, expected = oracle(model, theta_of(model), (inputs[2:], targets[2:]), rho=0.2)
    close(gradients(model), expected)


def test_m_rank_is_global_in_one_process():
    model = make_model()
    parts = parts_of(uneven_batch(), [3])
    SharpnessAware(model, adamw(model), "sam", rho=0.2).backward(parts)
    expected = gradients(model)
    SharpnessAware(model, adamw(model), "sam", rho=0.2, m="rank").backward(parts)
    close(gradients(model), expected, 0)


# ---------------------------------------------------------------------- randomness and buffers


@KINDS
@ALL
def test_both_passes_see_the_same_dropout_mask(method, kind):
    """Against the formula on a model that draws the same mask at every forward; and no more random numbers than AdamW draws."""
    model = make_model(kind, dropout=0.5)
    optimizer = warmed_up(model)
    inputs, targets = make_batch()
    m, P = state_of(model, optimizer)

    def forward(theta):
        torch.manual_seed(7)
        return functional_call(model, theta, (inputs,))

    sharpness = SharpnessAware(model, optimizer, method, rho=0.2)
    if METHODS[method].mix == "tram":
        run(sharpness, adamw(model, lr=0.01), 1)
        old = theta_of(model)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)
        sharpness.mix.old = {p: old[n] for n, p in model.named_parameters()}
        log_p, log_q = forward(old).log_softmax(-1), forward(theta_of(model)).log_softmax(-1)
    torch.manual_seed(7)
    sharpness.backward([(inputs, targets)])
    after = torch.get_rng_state()
    result = gradients(model)

    named = METHODS[method]
    rho = 0.2 * float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) if named.mix == "tram" else 0.2
    options = {k: v for k, v in named.options.items() if k in ("sign", "preconditioned", "phi")}
    g, there = oracle(
        model,
        theta_of(model),
        (inputs, targets),
        named.ascent or "gradient",
        "sam" if named.path == "plain" else named.path,
        rho,
        m,
        P,
        forward=forward,
        **options,
    )
    expected = {
        "adamw": g,
        "wsam": g,
        "gnp": combine(0.2, g, 0.8, there),
        "gsam": combine(2.0, there, -1.0, g),
    }.get(method, there)
    if method == "gsam":
        parallel = sum(float((g[n] * there[n]).sum()) for n in g) / norm(there) ** 2
        expected = combine(1.0 + parallel, there, -1.0, g)
    if method == "wsam":
        close({n: sharpness.mix.pending[p] for n, p in model.named_parameters()}, combine(1.0, there, -1.0, g))
    if method != "sam-on":
        close(result, expected)

    torch.manual_seed(7)
    SharpnessAware(model, optimizer, "adamw").backward([(inputs, targets)])
    assert torch.equal(after, torch.get_rng_state())


class Normalized(torch.nn.Module):
    """BatchNorm between two layers."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.down(self.norm(self.up(x)).relu())


@ALL
def test_running_statistics_are_updated_once(method):
    """By the unperturbed pass; momentum-sam has no such pass and updates them once at theta'."""
    torch.manual_seed(0)
    model = Normalized().double()
    optimizer = adamw(model)
    batches = [(torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(2)]
    sharpness = SharpnessAware(model, optimizer, method, rho=0.5)
    for _ in range(2):
        twin = copy.deepcopy(model)
        sharpness.backward(batches)
        for inputs, _ in batches:
            twin(inputs)
        for (name, buffer), (_, expected) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
            if method == "momentum-sam" and name != "norm.num_batches_tracked" and optimizer.state:
                assert not torch.equal(buffer, expected)
            else:
                assert torch.equal(buffer, expected), name
        optimizer.step()


class Checkpointed(TinyReadout):
    """The MLP recomputed in backward, dropout mask and all."""

    def forward(self, tokens, readout=None):
        x = self.embedding(tokens)
        x = x + checkpoint(lambda y: self.down(self.dropout(F.gelu(self.up(y)))), x, use_reentrant=False)
        h = self.norm(x)
        return h @ self.embedding.weight.T if readout is None else readout(h, self.embedding.weight)


@pytest.mark.parametrize("keep", ["auto", "cotangent"])
@ALL
def test_activation_checkpointing(method, keep):
    results = []
    for kind in (TinyReadout, Checkpointed):
        model = make_model(kind, dropout=0.3)
        optimizer = warmed_up(model)
        torch.manual_seed(5)
        run(SharpnessAware(model, optimizer, method, rho=0.2, keep=keep), optimizer, 3, cuts=[2])
        results.append(theta_of(model))
    close(results[1], results[0], 1e-9)


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


@pytest.mark.parametrize("keep", ["auto", "cotangent"])
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
@pytest.mark.parametrize("method", PERTURBED)
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
@pytest.mark.parametrize("options", [{"only": lambda name, p: name == "unused"}, {"ascent": "momentum"}])
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


@pytest.mark.parametrize("keep", ["auto", "cotangent"])
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


@pytest.mark.parametrize("keep", ["auto", "cotangent"])
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
        if call == 2 and method in ("adamw", "momentum-sam"):
            continue
        if call == 1 and method == "momentum-sam":
            where = "pass 2"  # its only pass is at theta + eps
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
        sharpness = SharpnessAware(model, optimizer, method, **({"k": 2} if method == "looksam" else {}))
        for step in range(5):
            if fails:
                calls = 2 + (method == "tram") if step else 1
                model.calls, model.faults = 0, {calls: lambda h: h * float("nan")}
                with contextlib.suppress(FloatingPointError):
                    sharpness.backward([make_batch(seed=step)])
                    assert model.calls < calls  # not reached: no such pass in this step
                    sharpness.steps -= 1
                model.faults = {}
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
    (value,) = set(sharpness.radii().values())
    return value


def test_radius_schedules():
    model = make_model()
    optimizer = adamw(model, lr=0.1)
    warm = SharpnessAware(model, optimizer, "sam", rho=0.4, rho_schedule="warmup", warmup_steps=4)
    seen = []
    for step in range(6):
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


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize(("stop", "options"), [(1, {}), (4, {}), (4, {"interval": 3}), (3, {"rho_schedule": "lr"})])
@ALL
def test_resume_is_exact(method, stop, options):
    """Stop, save through a file, build everything anew, load, go on: bit for bit the uninterrupted run. With dropout."""
    if method == "looksam" and "interval" in options:
        options = {"k": 3}
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
            sharpness.mix.pending = {}
            sharpness.load_state_dict(state)
        optimizer.step()
        assert not sharpness.state_dict()["mix"]["pending"]
        results.append(theta_of(model))
    close(results[0], results[1], 0)


def test_state_is_named_by_parameter_and_checked():
    model = make_model()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "tram")
    assert sharpness.state_dict() == {"steps": 0, "lr_max": 1e-2, "mix": {"old": {}}}
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
        ({"method": "looksam", "k": 0}, "k=0"),
        ({"method": "looksam", "interval": 2}, "set k"),
        ({"method": "angle-sam", "derivative": "difference", "step": 0.0}, "step=0.0"),
        ({"method": "angle-sam", "derivative": "differenc"}, "'difference'"),
        ({"method": "tram", "divergence": "last"}, "divergence"),
        ({"method": "gsam", "m": "rank"}, "mixes both gradients"),
        ({"method": "penalty-sam", "m": "microbatch"}, "does not combine"),
        ({"method": "momentum-sam", "sign": 2.0}, "sign"),
        ({"method": "sam", "path": "plain"}, "give both"),
        ({"method": "adamw", "path": "sam"}, "give both"),
        ({"method": "sam", "path": "funktional"}, "'functional'"),
        ({"method": "sam", "ascent": "grad"}, "'gradient'"),
        ({"method": "sam", "rho_schedule": "warmup"}, "warmup_steps"),
        ({"method": "sam", "only": lambda name, p: False}, "selects no parameter"),
        ({"method": "sam", "only": "bias"}, "only='bias'"),
        ({"method": "fisher-sam", "m": "microbatch"}, "fisher"),
        ({"method": "sam", "keep": "all"}, "keep='all'"),
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
