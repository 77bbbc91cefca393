"""One step: any cut into micro-batches, m, dropout, BatchNorm, activation checkpointing."""

import copy

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, parts_of, run, warmed_up
from test_sharpness_oracle import close, combine, norm, oracle, state_of, theta_of
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from functional_sam import METHODS, SharpnessAware

KINDS = pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
ALL = pytest.mark.parametrize("method", METHODS)
PERTURBED = [name for name in METHODS if METHODS[name].path != "plain"]


def uneven_batch(rows=8):
    inputs, targets = make_batch(rows)
    targets[0, :4] = targets[5] = -100
    return inputs, targets


def relative(a, b):
    return norm(combine(1.0, a, -1.0, b)) / norm(b)


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
        # Only down.weight moves, and is seen only through its cast.
        options = {"subset": lambda name, p: name == "down.weight"} if method == "sam" else {}
        with torch.autocast("cpu", torch.bfloat16):
            SharpnessAware(model, adamw(model), method, rho=3.0, **options).backward([uneven_batch()])
        grads[method] = gradients(model)
    assert relative(grads["sam"], grads["adamw"]) > 0.02


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
    SharpnessAware(model, optimizer, "sam", rho=0.2, ascent=ascent, path=path, scope="micro-batch").backward(parts)
    close(gradients(model), expected)

    def loss_fn(z, t):
        return F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum"), int((t != -100).sum())

    own = SharpnessAware(model, optimizer, "sam", rho=0.2, ascent=ascent, path=path, scope="micro-batch", loss_fn=loss_fn)
    own.backward(parts)
    close(gradients(model), expected)


def test_m_microbatch_with_a_micro_batch_of_no_target():
    model = make_model()
    inputs, targets = make_batch(4)
    targets[:2] = -100
    sharpness = SharpnessAware(model, adamw(model), "sam", rho=0.2, scope="micro-batch")
    sharpness.backward(parts_of((inputs, targets), [2]))
    _, expected = oracle(model, theta_of(model), (inputs[2:], targets[2:]), rho=0.2)
    close(gradients(model), expected)


def test_m_rank_is_global_in_one_process():
    model = make_model()
    parts = parts_of(uneven_batch(), [3])
    SharpnessAware(model, adamw(model), "sam", rho=0.2).backward(parts)
    expected = gradients(model)
    SharpnessAware(model, adamw(model), "sam", rho=0.2, scope="rank").backward(parts)
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
        sharpness._mix.old = {p: old[n] for n, p in model.named_parameters()}
        log_p, log_q = forward(old).log_softmax(-1), forward(theta_of(model)).log_softmax(-1)
    torch.manual_seed(7)
    sharpness.backward([(inputs, targets)])
    after = torch.get_rng_state()
    result = gradients(model)

    named = METHODS[method]
    rho = 0.2 * float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) if named.mix == "tram" else 0.2
    options = {k: v for k, v in named.options.items() if k in ("direction", "preconditioned", "phi")}
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
        "plain": g,
        "wsam": g,
        "gnp": combine(0.2, g, 0.8, there),
        "gsam": combine(2.0, there, -1.0, g),
    }.get(method, there)
    if method == "gsam":
        parallel = sum(float((g[n] * there[n]).sum()) for n in g) / norm(there) ** 2
        expected = combine(1.0 + parallel, there, -1.0, g)
    if method == "wsam":
        close({n: sharpness._mix.pending[p] for n, p in model.named_parameters()}, combine(1.0, there, -1.0, g))
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


@pytest.mark.parametrize("keep", ["auto", "u", "cotangent"])
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
