"""The dose of a run, |g_method - g| / |g|: how much the method changes the gradient, over the steps of training."""

import math
from collections.abc import Sequence

import numpy as np

from functional_sam.config import Config
from functional_sam.records import Source


def dose_of(config: Config, source: Source) -> float:
    """Average the dose over the steps of a run, linear between the measured ones; nan where no finite dose was measured.

    Measurements are log-spaced. Their plain mean would give half of its weight to the first thirtieth of the run, in warm-up.
    """
    found = sorted(_measured(config, source))
    if not found:
        return math.nan
    steps, doses = zip(*found, strict=True)
    return float(np.interp(np.arange(steps[0], steps[-1] + 1), steps, doses).mean())


def dose_at_measured_steps(config: Config, source: Source) -> float:
    """Average the measurements, whatever their steps: what the protocol called the dose at first."""
    doses = [dose for _, dose in _measured(config, source)]
    return sum(doses) / len(doses) if doses else math.nan


def mean_dose(configs: Sequence[Config], source: Source) -> float:
    """Average dose_of over the runs that have one; nan where none has."""
    doses = [dose for config in configs if not math.isnan(dose := dose_of(config, source))]
    return sum(doses) / len(doses) if doses else math.nan


def _measured(config: Config, source: Source) -> list[tuple[int, float]]:
    """List (step, dose) of the measurements that are finite numbers: a run that diverges has others at its end."""
    lines = source.metrics(config, "dose")
    return [(line["step"], float(line["dose"])) for line in lines if line["dose"] is not None and math.isfinite(line["dose"])]
