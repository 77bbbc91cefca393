"""Variants of the ascent, each against a loop written out here in float64, over several steps."""

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, make_batch, make_model
from test_sharpness_oracle import combine, norm, theta_of

from functional_sam import SharpnessAware
from functional_sam.training.loop import _seeded

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


def test_a_run_draws_by_its_data_seed():
    from functional_sam.config import compose

    assert _seeded(compose("language", "random-sam", overrides=["training.data_seed=7"]))["seed"] == 7
    assert _seeded(compose("language", "random-sam", overrides=["training.data_seed=7", "method.options.seed=3"]))["seed"] == 3
    assert "seed" not in _seeded(compose("language", "sam", overrides=["training.data_seed=7"]))
