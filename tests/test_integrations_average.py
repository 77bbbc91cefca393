"""Averages of weights (EMA) beside SharpnessAware: they see the weights of the steps, never the perturbed ones."""

import pytest
import torch
from conftest import adamw, make_batch, make_model, parts_of
from test_sharpness_dose import Normalized
from test_sharpness_oracle import close, theta_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from functional_sam import SharpnessAware


@pytest.mark.parametrize("how", ["by hand", "by a hook"])
@pytest.mark.parametrize("method", ["sam", "functional-sam", "wsam", "looksam", "tram"])
def test_an_average_is_the_one_of_the_weights_after_steps(method, how):
    """0.9 average + 0.1 theta over the weights of a run that has no average; BatchNorm's statistics are of one pass."""
    runs = []
    for averages in (False, True):
        model = make_model(Normalized)
        optimizer = adamw(model)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if averages and how == "by a hook":  # made after SharpnessAware: a decoupled wsam adds to the step by a hook of its own
            optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))  # noqa: B023
        record = []
        for step in range(4):
            sharpness.backward(parts_of(make_batch(6, seed=step), [2]))
            optimizer.step()
            optimizer.zero_grad()
            if averages and how == "by hand":
                average.update_parameters(model)
            record.append(theta_of(model))
        runs.append((record, theta_of(average.module)))
    (record, _), (same, found) = runs
    close(same[-1], record[-1], 0)
    expected = record[0]
    for theta in record[1:]:
        expected = {name: 0.9 * expected[name] + 0.1 * theta[name] for name in expected}
    close(found, expected, 1e-12)
    assert all(not torch.equal(found[name], record[-1][name]) for name in found)
