"""The dose of a run from doses at known steps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from functional_sam.log_spaced import measure_steps
from functional_sam.study.dose import dose_at_measured_steps, dose_of, mean_dose


def a_source(**runs):
    """Run name -> (step, dose) of its lines."""
    lines = {name: [{"step": step, "dose": dose} for step, dose in own] for name, own in runs.items()}
    return SimpleNamespace(metrics=lambda config, kind: lines[config] if kind == "dose" else [])


def test_a_dose_that_falls_early_counts_by_its_steps():
    """Of 400 steps the first 13 have half of the measurements and a thirtieth of the run."""
    steps = sorted(measure_steps(8, 400))
    source = a_source(run=[(step, 1.0 if step <= 13 else 0.1) for step in steps])
    assert dose_at_measured_steps("run", source) == pytest.approx((4 * 1.0 + 4 * 0.1) / 8)
    assert dose_of("run", source) == pytest.approx(0.1 + 0.9 * (13 + sum((31 - s) / 18 for s in range(14, 31))) / 400)


def test_a_dose_that_is_linear_in_the_step_has_the_mean_of_its_ends():
    source = a_source(run=[(step, 0.2 + 0.01 * step) for step in (1, 3, 20, 64, 101)])
    assert dose_of("run", source) == pytest.approx(0.2 + 0.01 * 51)
    assert dose_of("run", source) == pytest.approx(np.mean([0.2 + 0.01 * step for step in range(1, 102)]))


@pytest.mark.parametrize("gone", [None, math.inf, math.nan])
def test_what_is_no_number_is_left_out(gone):
    source = a_source(lost=[(1, 0.5), (10, 0.5), (100, gone)], whole=[(1, 0.1), (100, 0.1)], none=[(1, gone)], plain=[])
    assert dose_of("lost", source) == dose_at_measured_steps("lost", source) == 0.5
    assert math.isnan(dose_of("none", source))
    assert math.isnan(dose_at_measured_steps("plain", source))
    assert mean_dose(["lost", "whole", "plain"], source) == pytest.approx(0.3)
    assert math.isnan(mean_dose(["plain"], source))
