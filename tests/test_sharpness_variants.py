"""Variants of the ascent, each against a loop written out here in float64, over several steps."""

import pytest
import pytorch_optimizer as public
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, parts_of, warmed_up
from test_sharpness_dose import Normalized
from test_sharpness_oracle import close, combine, direction_of, norm, oracle, state_of, theta_of
from torch.func import functional_call, grad, vjp
from torch.nn import functional as F

from functional_sam import SharpnessAware, UserError
from functional_sam.sharpness import cost

KINDS = pytest.mark.parametrize("kind", [TinyModel, TinyReadout])


# ---------------------------------------------------------------------- random direction


def perturbations(model, sharpness, batches):
    """eps of every forward of a step that is not at theta."""
    theta, seen = theta_of(model), []

    def look(*_):
        eps = combine(1.0, theta_of(model), -1.0, theta)
        if norm(eps) > 0:
            seen.append(torch.cat([part.flatten() for part in eps.values()]))

    handle = model.register_forward_pre_hook(look)
    sharpness.backward(batches)
    model.zero_grad()
    handle.remove()
    return seen


def test_random_directions_fill_the_sphere():
    """|eps| = rho; the mean over n steps is rho / sqrt(n) long, and no coordinate is larger than others."""
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), "random-sam", rho=0.3)
    every = torch.stack([perturbations(model, sharpness, [make_batch()])[0] for _ in range(200)])
    torch.testing.assert_close(every.norm(dim=1), torch.full((200,), 0.3, dtype=torch.float64), rtol=1e-9, atol=0)
    assert float(every.mean(0).norm()) == pytest.approx(0.3 / 200**0.5, rel=0.2)
    variances = every.square().mean(0) * every.shape[1] / 0.3**2
    assert float(variances.std()) == pytest.approx((2 / 200) ** 0.5, rel=0.2)


def test_what_a_random_direction_depends_on():
    """Seed and step, and with scope="micro-batch" its number; not the data, nor what else is drawn."""

    def first(seed=0, step=1, data=1, **options):
        model = make_model()
        sharpness = SharpnessAware(model, adamw(model), "random-sam", seed=seed, **options)
        sharpness._perturbation.steps = step - 1
        torch.manual_seed(data)
        return perturbations(model, sharpness, [make_batch(seed=data), make_batch(2, seed=9)])

    base = first()
    assert len(base) == 2  # two forwards at one place
    assert torch.equal(base[0], base[1])
    assert torch.equal(first(data=5)[0], base[0])
    for other in ({"seed": 1}, {"step": 2}):
        assert not torch.equal(first(**other)[0], base[0])
    one, two = first(scope="micro-batch")
    assert torch.equal(one, base[0])
    assert not torch.equal(one, two)


# ---------------------------------------------------------------------- an average of gradients


@KINDS
@pytest.mark.parametrize("path", ["sam", "functional"])
@pytest.mark.parametrize("ascent", ["gradient", "adaptive"])
@pytest.mark.parametrize(
    ("method", "options"), [("friendly-sam", {"sigma": 0.7, "decay": 0.6}), ("vasso", {"decay": 0.3}), ("vasso", {"decay": 0.0})]
)
def test_ascents_along_an_average(method, options, ascent, path, kind):
    """Five steps: d from g - sigma m of before, or from m with g in it; the gradient is the path's at theta + rho d / size."""
    model = make_model(kind)
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.2, ascent=ascent, path=path, **options)
    m = None
    for step in range(5):
        inputs, targets = make_batch(6, seed=step)
        theta = theta_of(model)

        def z_of(values, inputs=inputs):
            return functional_call(model, values, (inputs,))

        def loss(z, targets=targets):
            return F.cross_entropy(z.flatten(0, -2), targets.flatten())

        z, pull = vjp(z_of, theta)
        u = grad(loss)(z)
        g = pull(u)[0]
        given = g if m is None else combine(1.0, g, -options.get("sigma", 0.0), m)
        m = g if m is None else combine(options["decay"], m, 1 - options["decay"], g)
        d, size = direction_of(ascent, theta, given if method == "friendly-sam" else m, None, None)
        there = combine(1.0, theta, 0.2 / size, d)
        _, pull_there = vjp(z_of, there)
        sharpness.backward(parts_of((inputs, targets), [2]))
        close(gradients(model), pull_there(grad(loss)(z_of(there)) if path == "sam" else u)[0])
        close({n: sharpness._mix.average[p] for n, p in model.named_parameters()}, m)
        optimizer.step()


def test_vasso_without_a_past_is_sam():
    for method in ("vasso", "sam"):
        model = make_model()
        optimizer = adamw(model)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.2, **({"decay": 0.0} if method == "vasso" else {}))
        for step in range(3):
            sharpness.backward([make_batch(seed=step)])
            optimizer.step()
        if method == "vasso":
            expected = theta_of(model)
    close(theta_of(model), expected, 1e-12)


def test_friendly_sam_takes_the_steps_of_another_library():
    """pytorch-optimizer's, up to its 1e-12 in the norm."""
    ours, theirs = make_model(), make_model()
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(ours.parameters(), **settings)
    sharpness = SharpnessAware(ours, optimizer, "friendly-sam", rho=0.3, sigma=0.8, decay=0.6)
    other = public.FriendlySAM(theirs.parameters(), torch.optim.AdamW, rho=0.3, sigma=0.8, lmbda=0.6, **settings)
    for step in range(5):
        inputs, targets = make_batch(seed=step)

        def closure(inputs=inputs, targets=targets):
            other.zero_grad()
            F.cross_entropy(theirs(inputs).flatten(0, 1), targets.flatten()).backward()

        closure()
        other.step(closure)
        sharpness.backward([(inputs, targets)])
        optimizer.step()
    close(theta_of(ours), theta_of(theirs), 1e-7)


# ---------------------------------------------------------------------- several steps, and a part


def climbed(model, theta, batch, k, ascent, rho, m, P, **options):
    """theta_k by the loop: theta_j = theta_{j-1} + rho / k d_j / size_j, d_j at theta_{j-1}; rho a number or {name: number}."""
    there = theta
    for _ in range(k):
        g, _ = oracle(model, there, batch)
        d, size = direction_of(ascent, there, g, m, P, **options)
        there = {n: there[n] + (rho[n] if isinstance(rho, dict) else rho) / k * d[n] / size for n in there}
    return there


def by_path(path, model, theta, there, batch):
    inputs, targets = batch

    def z_of(values):
        return functional_call(model, values, (inputs,))

    def loss(z):
        return F.cross_entropy(z.flatten(0, -2), targets.flatten())

    z, pull = vjp(z_of, theta)
    z_there, pull_there = vjp(z_of, there)
    u, u_there = grad(loss)(z), grad(loss)(z_there)
    return {"sam": pull_there(u_there), "functional": pull_there(u), "logit": pull(u_there)}[path][0]


@KINDS
@pytest.mark.parametrize("path", ["sam", "functional", "logit"])
@pytest.mark.parametrize("ascent", ["gradient", "adam", "adaptive", "fisher"])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_several_steps_and_a_part(part, ascent, path, kind):
    """Three steps of a third each, of all or of the first half of four uneven micro-batches; two gradients of the method."""
    model = make_model(kind)
    optimizer = warmed_up(model)
    sharpness = SharpnessAware(model, optimizer, "sam", rho=0.4, ascent=ascent, path=path, ascent_steps=3, ascent_part=part)
    for step in range(2):
        inputs, targets = make_batch(8, seed=step)
        targets[0, 1:] = targets[6] = -100
        theta, (m, P) = theta_of(model), state_of(model, optimizer)
        rows = 5 if part < 1 else 8
        there = climbed(model, theta, (inputs[:rows], targets[:rows]), 3, ascent, 0.4, m, P)
        assert norm(combine(1.0, there, -1.0, theta)) <= 0.4 * (1 + 1e-9) or ascent in ("adaptive", "fisher")
        sharpness.backward(parts_of((inputs, targets), [2, 5, 6]))
        close(gradients(model), by_path(path, model, theta, there, (inputs, targets)))
        model.zero_grad()


@pytest.mark.parametrize("method", ["sam", "gnp", "tram", "functional-sam"])
def test_one_step_is_the_method_itself(method):
    thetas = []
    for options in ({}, {"ascent_steps": 1, "ascent_part": 1.0}):
        model = make_model(TinyReadout, dtype=torch.float32)
        optimizer = adamw(model)
        sharpness = SharpnessAware(model, optimizer, method, **options)
        for step in range(3):
            sharpness.backward([make_batch(seed=step)])
            optimizer.step()
        thetas.append(theta_of(model))
    close(*thetas, 0)


def test_several_steps_by_group_and_under_a_mix():
    """A radius per group; gnp of g and the g' of two steps."""
    model = make_model()
    groups = [{"params": [model.embedding.weight], "rho": 0.4}, {"params": [*model.up.parameters()], "rho": 0.0}]
    groups.append({"params": [*model.down.parameters(), *model.norm.parameters()]})
    rho = {n: 0.4 if n.startswith("emb") else 0.0 if n.startswith("up") else 0.1 for n, _ in model.named_parameters()}
    theta, batch = theta_of(model), make_batch()
    there = climbed(model, theta, batch, 2, "gradient", rho, None, None)
    g, expected = oracle(model, theta, batch)[0], by_path("sam", model, theta, there, batch)
    SharpnessAware(model, torch.optim.AdamW(groups), "gnp", rho=0.1, alpha=0.7, ascent_steps=2).backward([batch])
    close(gradients(model), combine(0.3, g, 0.7, expected))


@pytest.mark.parametrize("options", [{"ascent_steps": 3}, {"ascent_part": 0.5}, {"ascent_part": 0.5, "ascent_steps": 2}])
@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam"])
def test_passes_of_the_ascent_leave_no_trace(method, options):
    """Masks, running statistics and random numbers drawn are those of the method itself at a radius that moves nothing."""
    results = []
    for given in ({}, options):
        model = make_model(Normalized, dropout=0.4, dtype=torch.float32)
        optimizer = adamw(model)
        torch.manual_seed(2)
        sharpness = SharpnessAware(model, optimizer, method, rho=1e-30, **given)
        for step in range(3):
            sharpness.backward(parts_of(make_batch(6, seed=step), [3]))
            optimizer.step()
        results.append((theta_of(model), [b.clone() for b in model.buffers()], torch.get_rng_state()))
    close(results[1][0], results[0][0], 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert torch.equal(results[0][2], results[1][2])


def test_what_they_cost():
    """Counted on real steps; in gradients and memory."""
    for method, options, expected in [
        ("sam", {"ascent_steps": 3}, 4),
        ("functional-sam", {"ascent_steps": 3}, 4),
        ("sam", {"ascent_part": 0.25}, 1.25),
        ("functional-sam", {"ascent_part": 0.25}, 1.25 + 1 / 3),
        ("logit-sam", {"ascent_part": 0.25}, 1.25 + 1 / 3),
        ("sam", {"ascent_part": 0.25, "ascent_steps": 2}, 1.5),
        ("gnp", {"ascent_steps": 2}, 3),
    ]:
        calls = {"forward": 0, "backward": 0}
        model = make_model()

        def look(_, __, z, calls=calls):
            calls["forward"] += 1
            if z.requires_grad:
                z.register_hook(lambda _: calls.update(backward=calls["backward"] + 1))

        model.register_forward_hook(look)
        SharpnessAware(model, adamw(model), method, **options).backward(parts_of(make_batch(8), [2, 4, 6]))
        assert (calls["forward"] + 2 * calls["backward"]) / 12 == pytest.approx(expected), (method, options)
        assert cost(method, options).gradients == pytest.approx(expected), (method, options)
    assert (cost("sam", {"ascent_steps": 2}).g, cost("gnp", {"ascent_steps": 2}).g, cost("sam").g) == (1, 2, 0)
    assert cost("sam", {"ascent_steps": 3, "every": 2}).gradients == pytest.approx(2.5)
    assert (cost("friendly-sam").carried, cost("vasso").g, cost("vasso").gradients) == (1, 1, 2)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("sam", {"ascent_steps": 0}, "ascent_steps=0"),
        ("sam", {"ascent_steps": 1.5}, "ascent_steps=1.5"),
        ("sam", {"ascent_part": 0.0}, "ascent_part=0.0"),
        ("sam", {"ascent_part": 1.5}, "ascent_part=1.5"),
        ("friendly-sam", {"decay": 1.0}, "decay=1.0"),
        ("momentum-sam", {"ascent_steps": 2}, "'momentum', which takes no gradient"),
        ("random-sam", {"ascent_part": 0.5}, "'random', which takes no gradient"),
        ("penalty-sam", {"ascent_steps": 2}, "the penalty path"),
        ("plain", {"ascent_steps": 2}, "has no ascent"),
        ("gnp", {"ascent_part": 0.5}, "needs g of the whole step"),
        ("vasso", {"ascent_steps": 2}, "one g a step"),
        ("sam", {"ascent_steps": 2, "scope": "rank"}, "scope='rank'"),
        ("sam", {"ascent_part": 0.5, "scope": "micro-batch"}, "scope='micro-batch'"),
        ("sam", {"normalize_by": "none", "scope": "micro-batch"}, 'normalize_by="none"'),
        ("vasso", {"scope": "rank"}, "averages g"),
        ("asam", {"per": "layers"}, "did you mean 'layer'"),
    ],
)
def test_what_makes_no_sense_is_refused(method, options, words):
    model = make_model()
    with pytest.raises(UserError, match=words):
        SharpnessAware(model, adamw(model), method, **options)


def test_a_part_is_a_whole_number_of_microbatches():
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), "sam", ascent_part=0.25)
    for cuts in ([], [4], [2, 4, 6, 7]):
        with pytest.raises(UserError, match=rf"ascent_part=0.25 of {len(cuts) + 1} micro-batches .* into 4 or a multiple"):
            sharpness.backward(parts_of(make_batch(8), cuts))
    sharpness.backward(parts_of(make_batch(8), [2, 4, 6]))


# ---------------------------------------------------------------------- J-SAM


@KINDS
def test_j_sam_is_the_functional_path_of_each_example(kind):
    """The mean over examples of J_i(theta + rho g_i / |g_i|)^T u_i(theta), u_i = dL_i/dz: the Jacobian alone is perturbed."""
    model = make_model(kind)
    inputs, targets = make_batch(5)
    theta, terms = theta_of(model), []
    for x, t in zip(inputs, targets, strict=True):

        def z_of(values, x=x):
            return functional_call(model, values, (x[None],))

        z, pull = vjp(z_of, theta)
        u = grad(lambda z, t=t: F.cross_entropy(z.flatten(0, 1), t))(z)
        g = pull(u)[0]
        there = combine(1.0, theta, 0.3 / norm(g), g)
        terms.append(vjp(z_of, there)[1](u)[0])
    expected = {n: sum(term[n] for term in terms) / len(terms) for n in theta}
    sharpness = SharpnessAware(model, adamw(model), "functional-sam", rho=0.3, scope="micro-batch")
    sharpness.backward(parts_of((inputs, targets), [1, 2, 3, 4]))
    close(gradients(model), expected)
    SharpnessAware(model, adamw(model), "functional-sam", rho=0.3).backward([(inputs, targets)])
    assert not torch.allclose(gradients(model)["up.weight"], expected["up.weight"])  # one eps for all is another gradient
