"""Every method against its formula (test_sharpness_oracle.py), in float64."""

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, warmed_up
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharpness_oracle import close, combine, dot, norm, oracle, state_of, theta_of
from torch.func import functional_call
from torch.nn import functional as F

from functional_sam import METHODS, SharpnessAware
from functional_sam.sharpness import cost
from functional_sam.sharpness.methods import table
from functional_sam.sharpness.options import ASCENT_OPTIONS

# ---------------------------------------------------------------------- the grid

ASCENTS = [
    ("gradient", {}),
    ("adam", {"normalize_by": "direction"}),
    ("adam", {"normalize_by": "gradient"}),
    ("adam", {"normalize_by": "energy"}),
    ("adaptive", {"eta": 0.1}),
    ("fisher", {"eta": 3.0}),
    ("momentum", {"direction": "ascent"}),
    ("momentum", {"direction": "descent"}),
    ("momentum", {"direction": "ascent", "preconditioned": True}),
    ("momentum", {"direction": "descent", "preconditioned": True}),
]


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("path", ["sam", "functional", "logit", "penalty"])
@pytest.mark.parametrize(("ascent", "options"), ASCENTS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())))
def test_any_ascent_with_any_path(ascent, options, path, kind):
    model = make_model(kind)
    optimizer = warmed_up(model)
    moments = {
        n: s.clone() for n, s in zip("mv", [optimizer.state[model.up.weight][k] for k in ("exp_avg", "exp_avg_sq")], strict=True)
    }
    batch = make_batch(ignored=1)
    m, P = state_of(model, optimizer)
    _, expected = oracle(model, theta_of(model), batch, ascent, path, 0.2, m, P, **options)
    SharpnessAware(model, optimizer, "sam", rho=0.2, ascent=ascent, path=path, **options).backward([batch])
    close(gradients(model), expected)
    assert torch.equal(optimizer.state[model.up.weight]["exp_avg"], moments["m"])  # the optimizer's own is not used up
    assert torch.equal(optimizer.state[model.up.weight]["exp_avg_sq"], moments["v"])


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("phi", [0.0, 30.0, 45.0, 90.0, 135.0, 180.0, 225.0, 300.0])
def test_angle(phi, kind):
    """At every angle both ways; with two micro-batches. The finite difference is of first order in its step."""
    model = make_model(kind)
    optimizer = warmed_up(model)
    inputs, targets = make_batch(rows=6, ignored=2)
    parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    _, expected = oracle(model, theta_of(model), (inputs, targets), "gradient", "penalty", 0.2, phi=phi)
    SharpnessAware(model, optimizer, "angle-sam", rho=0.2, phi=phi).backward(parts)
    close(gradients(model), expected)
    errors = []
    for h in (1e-3, 1e-4):
        SharpnessAware(model, optimizer, "angle-sam", rho=0.2, phi=phi, derivative="difference", step=h).backward(parts)
        errors.append(norm(combine(1.0, gradients(model), -1.0, expected)) / norm(expected))
    assert errors[0] < 2e-2
    assert 5 < errors[0] / errors[1] < 20


def test_angle_of_the_callers_own_loss():
    """A loss whose curvature has no closed form here: the generic double backward, with an uneven count that only it knows."""
    model = make_model()
    optimizer = warmed_up(model)
    inputs, targets = make_batch(rows=6)
    targets[:2, 1:] = -100
    parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]

    def loss_fn(z, t):
        return F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum"), int((t != -100).sum())

    for phi in (20.0, 45.0, 90.0):
        _, expected = oracle(model, theta_of(model), (inputs, targets), "gradient", "penalty", 0.2, phi=phi)
        SharpnessAware(model, optimizer, "angle-sam", rho=0.2, phi=phi, loss_fn=loss_fn).backward(parts)
        close(gradients(model), expected)


def test_penalty_sam_is_the_gradient_of_its_penalty():
    """d/dtheta (L + rho |g|), by double backward through the norm itself."""
    model = make_model()
    inputs, targets = make_batch()
    params = list(model.parameters())
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    g = torch.autograd.grad(loss, params, create_graph=True)
    size = torch.stack([x.square().sum() for x in g]).sum().sqrt()
    expected = torch.autograd.grad(loss + 0.2 * size, params)
    SharpnessAware(model, adamw(model), "penalty-sam", rho=0.2).backward([(inputs, targets)])
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", ["sam", "functional", "logit", "penalty"])
def test_a_radius_per_group(path):
    """eps_p = rho_p d_p / size, with the size of the whole direction; groups without a radius of their own take rho."""
    model = make_model()
    groups = [
        {"params": [model.embedding.weight], "rho": 0.4},
        {"params": list(model.up.parameters()), "rho": 0.0},
        {"params": [*model.down.parameters(), *model.norm.parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    rho = {n: 0.4 if n.startswith("emb") else 0.0 if n.startswith("up") else 0.1 for n, _ in model.named_parameters()}
    batch = make_batch()
    _, expected = oracle(model, theta_of(model), batch, "gradient", path, rho, phi=30.0)
    options = {"phi": 30.0} if path == "penalty" else {}
    SharpnessAware(model, optimizer, "sam", rho=0.1, path=path, **options).backward([batch])
    close(gradients(model), expected)
    if path == "penalty":
        SharpnessAware(model, optimizer, "sam", 0.1, path=path, derivative="difference", step=1e-6, **options).backward([batch])
        close(gradients(model), expected, 1e-4)


def test_sam_on_perturbs_normalization_parameters_alone():
    model = make_model()
    batch = make_batch()
    theta = theta_of(model)
    g, _ = oracle(model, theta, batch)
    norms = ("norm.weight", "norm.bias")
    size = norm({n: g[n] for n in norms})
    there = {n: theta[n] + (0.3 * g[n] / size if n in norms else 0.0) for n in theta}
    expected, _ = oracle(model, there, batch)
    SharpnessAware(model, adamw(model), "sam-on", rho=0.3).backward([batch])
    close(gradients(model), expected)
    SharpnessAware(model, adamw(model), "sam", rho=0.3, subset=lambda name, p: "norm" in name).backward([batch])
    close(gradients(model), expected)


# ---------------------------------------------------------------------- mixes, over several steps


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("path", ["sam", "functional", "logit", "penalty"])
@pytest.mark.parametrize("ascent", ["gradient", "adam", "momentum"])
def test_mixes_of_both_gradients(ascent, path, kind):
    """gnp, gsam and wsam in .grad, from the same g and g'."""
    model = make_model(kind)
    optimizer = warmed_up(model)
    batch = make_batch(ignored=1)
    m, P = state_of(model, optimizer)
    g, there = oracle(model, theta_of(model), batch, ascent, path, 0.2, m, P)
    common = {"rho": 0.2, "ascent": ascent, "path": path}

    SharpnessAware(model, optimizer, "gnp", alpha=0.7, **common).backward([batch])
    close(gradients(model), combine(0.3, g, 0.7, there))

    parallel = dot(g, there) / dot(there, there)
    orthogonal = combine(1.0, g, -parallel, there)
    assert abs(dot(orthogonal, there)) < 1e-12
    SharpnessAware(model, optimizer, "gsam", alpha=0.4, rho_schedule="constant", **common).backward([batch])
    close(gradients(model), combine(1.0, there, -0.4, orthogonal))

    SharpnessAware(model, optimizer, "wsam", gamma=0.8, decoupled=False, **common).backward([batch])
    close(gradients(model), combine(1.0, g, 4.0, combine(1.0, there, -1.0, g)))


@pytest.mark.parametrize("clip", [False, True])
def test_wsam_decoupled(clip):
    """AdamW steps on g (clipped or not), then theta moves by -lr gamma/(1-gamma) (g' - g), with each group's own lr."""
    model, twin = make_model(), make_model()

    def optimizer_of(model):
        embedding = [model.embedding.weight]
        rest = [p for p in model.parameters() if p is not model.embedding.weight]
        return torch.optim.AdamW([{"params": embedding, "lr": 0.03}, {"params": rest}], lr=0.01, weight_decay=0.1)

    optimizer, twin_optimizer = optimizer_of(model), optimizer_of(twin)
    sharpness = SharpnessAware(model, optimizer, "wsam", rho=0.2)
    for step in range(3):
        batch = make_batch(seed=step)
        g, there = oracle(twin, theta_of(twin), batch, rho=0.2)
        for name, p in twin.named_parameters():
            p.grad = g[name].clone()
        sharpness.backward([batch])
        close(gradients(model), g)
        for who, its in [(model, optimizer), (twin, twin_optimizer)]:
            if clip:
                torch.nn.utils.clip_grad_norm_(who.parameters(), 0.1)
            its.step()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p -= (0.03 if p is twin.embedding.weight else 0.01) * 9.0 * (there[name] - g[name])
        close(theta_of(model), theta_of(twin))
    optimizer.step()  # without a backward of ours before it: no correction a second time
    twin_optimizer.step()
    close(theta_of(model), theta_of(twin))


@pytest.mark.parametrize("path", ["sam", "functional"])
def test_looksam(path):
    model = make_model()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "looksam", rho=0.2, every=3, alpha=0.5, path=path)
    orthogonal = None
    for step in range(7):
        batch = make_batch(seed=step)
        g, there = oracle(model, theta_of(model), batch, "gradient", path, 0.2)
        sharpness.backward([batch])
        if step % 3 == 0:
            orthogonal = combine(1.0, there, -dot(g, there) / dot(g, g), g)
            close(gradients(model), there)
        else:
            close(gradients(model), combine(1.0, g, 0.5 * norm(g) / norm(orthogonal), orthogonal))
        optimizer.step()


def test_looksam_where_the_two_gradients_are_parallel():
    """On a model linear in theta the functional path's g' is g: what rounding leaves of g_v must not be blown up."""
    model = torch.nn.Linear(7, 5).double()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "looksam", rho=0.5, every=3, path="functional")
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        batch = (torch.randn(6, 7, dtype=torch.float64, generator=generator), torch.randint(5, (6,), generator=generator))
        SharpnessAware(model, optimizer, "adamw").backward([batch])
        expected = gradients(model)
        sharpness.backward([batch])
        close(gradients(model), expected)
        optimizer.step()


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("divergence", ["previous", "initial"])
@pytest.mark.parametrize("path", ["sam", "functional"])
def test_tram(path, divergence, kind):
    model = make_model(kind)
    optimizer = adamw(model, lr=0.05)
    sharpness = SharpnessAware(model, optimizer, "tram", rho=2.0, divergence=divergence, path=path)
    old = None
    for step in range(4):
        inputs, targets = make_batch(rows=6, seed=step)
        targets[:3, :2] = -100
        theta = theta_of(model)
        if old is None:
            expected, _ = oracle(model, theta, (inputs, targets))
            old = theta
        else:
            log_p = functional_call(model, old, (inputs,)).log_softmax(-1)[targets != -100]
            log_q = functional_call(model, theta, (inputs,)).log_softmax(-1)[targets != -100]
            kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            assert kl > 1e-4
            _, expected = oracle(model, theta, (inputs, targets), "gradient", path, 2.0 * kl)
        sharpness.backward([(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])
        close(gradients(model), expected)
        if divergence == "previous":
            old = theta
        optimizer.step()


def test_an_interval_leaves_plain_steps_between():
    model = make_model()
    optimizer = warmed_up(model)
    m, P = state_of(model, optimizer)
    for method, options in [("functional-sam", {}), ("momentum-functional-sam", {}), ("gnp", {"alpha": 1.0})]:
        sharpness = SharpnessAware(model, optimizer, method, rho=0.2, every=3, **options)
        for step in range(5):
            batch = make_batch(seed=step)
            path, ascent = METHODS[method].path, METHODS[method].ascent
            g, there = oracle(model, theta_of(model), batch, ascent, path, 0.2, m, P)
            sharpness.backward([batch])
            close(gradients(model), there if step % 3 == 0 else g)
            model.zero_grad()


# ---------------------------------------------------------------------- generated models and splits

WITHOUT_STATE = [name for name in METHODS if name not in ("looksam", "tram", "wsam", "gsam", "gnp")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(WITHOUT_STATE),
    readout=st.booleans(),
    vocab=st.integers(2, 9),
    width=st.integers(2, 7),
    rows=st.integers(1, 7),
    length=st.integers(1, 4),
    rho=st.floats(1e-3, 0.5),
    data=st.data(),
)
def test_generated_models_and_splits(method, readout, vocab, width, rows, length, rho, data):
    """However the step's rows are cut and whichever targets are valid, the gradient is the formula's on the whole."""
    model = make_model(TinyReadout if readout else TinyModel, vocab=vocab, width=width)
    inputs, targets = make_batch(rows, length, vocab)
    mask = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    mask = torch.tensor(mask).view(rows, length)
    mask[rows // 2, length // 2] = False
    targets[mask] = -100
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1), max_size=rows - 1))) if rows > 1 else []
    parts = [(inputs[a:b], targets[a:b]) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    optimizer = adamw(model)
    warm_inputs, warm_targets = make_batch(3, 2, vocab, seed=9)
    F.cross_entropy(model(warm_inputs).flatten(0, 1), warm_targets.flatten()).backward()
    optimizer.step()
    m, P = state_of(model, optimizer)
    named = METHODS[method]
    options = {k: v for k, v in named.options.items() if k in {**ASCENT_OPTIONS[named.ascent], "phi": 0}}
    loss = SharpnessAware(model, optimizer, method, rho=rho).backward(parts)
    result = gradients(model)
    g, expected = oracle(
        model,
        theta_of(model),
        (inputs, targets),
        named.ascent or "gradient",
        named.path if named.ascent else "sam",
        rho,
        m,
        P,
        **options,
    )
    if METHODS[method].path == "plain":
        expected = g
    elif method == "sam-on":
        size = norm({n: g[n] for n in g if "norm" in n})
        if size < 1e-8:
            return
        there = {n: p + (rho * g[n] / size if "norm" in n else 0.0) for n, p in theta_of(model).items()}
        expected, _ = oracle(model, there, (inputs, targets))
    if norm(g) < 1e-8:  # the direction is rounding
        return
    close(result, expected, 1e-8)
    if method != "momentum-sam":
        plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).detach()
        torch.testing.assert_close(loss, plain, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_knows_its_number_of_passes(method, kind):
    """A forward counts 1/3 and a backward 2/3; by difference the penalty takes two passes."""
    calls = {"forward": 0, "backward": 0}

    class Counted(kind):
        def forward(self, *arguments, **options):
            calls["forward"] += 1
            result = super().forward(*arguments, **options)
            if result.requires_grad:
                result.register_hook(lambda _: calls.update(backward=calls["backward"] + 1))
            return result

    model = make_model(Counted)
    optimizer = warmed_up(model)
    options = {"derivative": "difference"} if METHODS[method].path == "penalty" else {"every": 4} if method == "looksam" else {}
    sharpness = SharpnessAware(model, optimizer, method, **options)
    sharpness.backward([make_batch(seed=0)])
    optimizer.step()
    if method != "looksam":  # the step after the first, which for tram has something to compare with
        calls.update(forward=0, backward=0)
        sharpness.backward([make_batch(seed=1)])
        expected = cost(method, options).gradients
    else:
        for step in range(1, 4):
            model.zero_grad()
            sharpness.backward([make_batch(seed=step)])
        expected = 4 * cost(method, options).gradients
        calls["forward"] -= 3  # of warmed_up
        calls["backward"] -= 3
    if method == "momentum-functional-sam":
        assert calls == {"forward": 2, "backward": 1}  # pass 1 is a forward alone
    assert calls["forward"] / 3 + calls["backward"] * 2 / 3 == pytest.approx(expected, rel=1e-12)


def test_table_rows():
    rows = table()
    assert [row[0] for row in rows] == ["plain (adamw)", *[name for name in METHODS if METHODS[name].path != "plain"]]
    assert all(len(row) == 8 and all(value != "" for value in row) for row in rows)
    assert ("momentum-functional-sam", "momentum", "functional", "-", "1.33", "theta, h", 0.05, "ours") in rows
