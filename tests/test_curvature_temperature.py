"""The temperature that fits best against scipy's minimum, and curvature with scaled logits against a model that scales its own."""

import pytest
import torch
from conftest import TinyModel, TinyReadout, make_batch, make_model
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from functional_sam.curvature import CurvatureProducts, fit_scale, scaled
from functional_sam.errors import UserError


def called(model, inputs, readout=None):
    return model(inputs) if readout is None else model(inputs, readout=readout)


@pytest.mark.parametrize("times", [0.03, 1.0, 20.0])
def test_the_minimum_is_that_of_scipy(times):
    """Also from a start where Newton's step leaves the bracket, with uneven batches and targets that do not count."""
    model = make_model(vocab=11)
    batches = [make_batch(rows=6, ignored=1), make_batch(rows=3, seed=2)]
    with torch.no_grad():
        z = torch.cat([model(x)[t >= 0] for x, t in batches])
        y = torch.cat([t[t >= 0] for _, t in batches])
        y[::2] = z[::2].argmax(-1)  # half of the targets are those that the model expects
        kept = iter(y.split([int((t >= 0).sum()) for _, t in batches]))
        for _, t in batches:
            t[t >= 0] = next(kept)
    found = fit_scale(model, batches, scaled(called, times))
    best = minimize_scalar(
        lambda s: float(F.cross_entropy(s * times * z, y)), bounds=(1e-3, 300), method="bounded", options={"xatol": 1e-10}
    )
    assert found.scale == pytest.approx(best.x, rel=1e-6)
    assert found.fitted_loss == pytest.approx(best.fun, rel=1e-12)
    assert found.loss == pytest.approx(float(F.cross_entropy(times * z, y)), rel=1e-12)
    assert fit_scale(model, batches, scaled(called, times * found.scale)).scale == pytest.approx(1.0, rel=1e-7)


def test_without_a_minimum_the_bound_is_taken():
    model = make_model()
    inputs, targets = make_batch()
    with torch.no_grad():
        right, wrong = model(inputs).argmax(-1), model(inputs).argmin(-1)
    assert fit_scale(model, [(inputs, right)]).scale == pytest.approx(64, rel=1e-6)
    assert fit_scale(model, [(inputs, wrong)]).scale == pytest.approx(1 / 64, rel=1e-6)
    with pytest.raises(FloatingPointError, match="no temperature"):
        fit_scale(model, [(inputs, targets)], lambda module, x: module(x) * float("nan"))


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
def test_products_with_scaled_logits(kind):
    """Those of a model that multiplies its own logits, which has no readout."""

    class Times(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 1.7 * self.inner(x)

    model = make_model(kind)
    batches = [make_batch(ignored=1)]
    forward = scaled(called if kind is TinyReadout else lambda module, x: module(x), 1.7)
    ours, theirs = CurvatureProducts(model, batches, forward=forward), CurvatureProducts(Times(model), batches)
    v = [torch.randn_like(p) for p in model.parameters()]
    for name in ("hessian", "gauss_newton", "functional"):
        for a, b in zip(getattr(ours, name)(v), getattr(theirs, name)(v), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_masked_vocabulary_is_a_smaller_one():
    """Logits of -inf add nothing, against the same logits without their columns."""
    model, (inputs, targets) = make_model(vocab=11), make_batch()
    targets = targets % 8
    mask = torch.zeros(11, dtype=torch.float64).index_fill(0, torch.arange(8, 11), -torch.inf)
    masked = fit_scale(model, [(inputs, targets)], lambda module, x: 0.3 * module(x) + mask)
    smaller = fit_scale(model, [(inputs, targets)], lambda module, x: 0.3 * module(x)[..., :8])
    assert masked.scale == pytest.approx(smaller.scale, rel=1e-9)
    assert masked.fitted_loss == pytest.approx(smaller.fitted_loss, rel=1e-12)
    with pytest.raises(FloatingPointError, match="no temperature"):
        fit_scale(model, [(inputs, targets + 3)], lambda module, x: module(x) + mask)


def test_training_mode_and_other_logits_are_refused():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    with pytest.raises(UserError, match=r"BatchNorm1d.*model\.eval\(\)"):
        fit_scale(model, [(x, y)])
    assert model[1].num_batches_tracked == 0
    with pytest.raises(UserError, match="random numbers"):
        fit_scale(model.eval(), [(x, y)], lambda module, x: F.dropout(module(x), 0.1))
    with pytest.raises(UserError, match="one class index a row"):
        fit_scale(model, [(x, y[:3])])
    with pytest.raises(UserError, match="no valid target"):
        fit_scale(model, [(x, torch.full_like(y, -100))])
