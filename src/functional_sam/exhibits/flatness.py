"""What table-4 computes: flatness as trained and at the fitted temperature, what that undoes, and what ranks as the loss does."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy

from functional_sam.config import Config
from functional_sam.exhibits import style
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, estimate, holm, paired_difference, ratio, significant
from functional_sam.study.dose import dose_of

STATES = {"trained": "as trained", "fitted": "at the fitted temperature"}
# Measures that a smaller value of is meant to be better of, by the field of `measures`; the bottom of H_F by its magnitude.
RANKED = {
    "top_hessian": "top eigenvalue of H",
    "top_gauss_newton": "top eigenvalue of H_G",
    "top_functional": "top eigenvalue of H_F",
    "bottom_functional": "bottom eigenvalue of H_F (magnitude)",
    "trace_hessian": "tr H",
    "trace_gauss_newton": "tr H_G",
    "trace_functional": "tr H_F",
    "norm_logit": "|delta_logit|",
    "norm_func": "|delta_func|",
    "share": "share of delta_func",
    "norm_gradient": "|g|",
    "entropy": "entropy",
    "logit_norm": "norm of the logits",
}
EXPLAINED, OWN, FLAT, OPEN = "mostly temperature", "mostly not temperature", "flatness not significant", "inconclusive"
UNKNOWN = "not known, for a run diverged or has no positive tr H"  # the logarithm of a seed is nan
READINGS = ("ranks as the loss", "ranks against the loss")


def measures(config: Config, source: Source, length: float) -> list[dict[str, Any]]:
    """A row per geometry and state of a run's final weights; a diverged run has an infinite loss and nothing else.

    length: its steps in units of the other runs'.
    """
    summary = source.summary(config)
    row = {"method": config.method.name, "rho": config.method.rho, "length": length, "seed": config.training.init_seed}
    row["dose"] = dose_of(config, source)
    rows = []
    record = source.read(config, "curvature.json") if summary["loss"] is not None else {}
    for geometry, state in itertools.product(config.measure.geometries, STATES):
        own: dict[str, Any] = {**row, "geometry": geometry, "state": state, "loss": math.inf}
        if record:
            place = record if state == "trained" else record["temperature"]
            own |= _numbers(place["geometries"][geometry])
            own |= {"logit_norm": place["logits"]["norm"], "entropy": place["logits"]["entropy"]}
            own["scale"] = 1.0 if state == "trained" else place["scale"]
            own["loss"] = summary["loss"] if state == "trained" else place["fitted_loss"]
        rows.append(own)
    return rows


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    own: dict[str, float] = {}
    for matrix in style.MATRIX_LABEL:
        A = found[matrix]
        own |= {
            f"top_{matrix}": A["top"]["value"],
            f"top_{matrix}_residual": A["top"]["residual"],
            f"bottom_{matrix}": A["bottom"]["value"],
            f"bottom_{matrix}_residual": A["bottom"]["residual"],
            f"trace_{matrix}": A["trace"]["mean"],
            f"trace_{matrix}_stderr": A["trace"]["stderr"],
        }
    own |= {"norm_logit": found["gauss_newton"]["norm"], "norm_func": found["functional"]["norm"]}
    return own | {"share": found["share"], "norm_gradient": found["norm_gradient"]}


# ---------------------------------------------------------------------- what a temperature undoes


def undone(data: pd.DataFrame) -> pd.DataFrame:
    """A row per geometry and method: how much flatter than AdamW in log tr H, as trained (b) and at the fitted temperatures (a).

    fraction = (b - a) / b, the part that a temperature undoes, with its interval by Fieller. The verdict tests b < 0, then
    .5 b - a, each with Holm's correction over the methods of a geometry; b is nan where a run diverged or
    its tr H is not positive. matched_...: the same against AdamW's runs of other lengths at the method's own loss, descriptive.
    """
    rows = []
    for geometry, own in data.groupby("geometry", sort=False):
        family = []
        for method in [name for name in own.method.unique() if name != "adamw"]:
            b, a = ([gap for gap, _ in _gaps(own, method, state)] for state in STATES)
            matched = [[gap for _, gap in _gaps(own, method, state)] for state in STATES]
            both = [pair for pair in zip(*matched, strict=True) if not any(map(math.isnan, pair))]
            trained, fitted = estimate(b), estimate(a)
            fraction, low, high = ratio([x - y for x, y in zip(b, a, strict=True)], b)
            row: dict[str, Any] = {
                "geometry": geometry,
                "method": method,
                "n": trained.n,
                "b": trained.mean,
                "b_half": trained.half_width,
            }
            row |= {"a": fitted.mean, "a_half": fitted.half_width, "fraction": fraction, "low": low, "high": high}
            row |= {"matched_n": len(both)} | {
                f"matched_{name}": estimate([pair[i] for pair in both]).mean if both else math.nan for i, name in enumerate("ba")
            }
            contrast = paired_difference([0.5 * x for x in b], a)
            family.append((row, trained, contrast))
        rows += _judged(family)
    return pd.DataFrame(rows)


def _gaps(own: pd.DataFrame, method: str, state: str) -> list[tuple[float, float]]:
    """Seed by seed, log tr H of a method minus AdamW's: of the same length, and interpolated at the method's loss (nan outside)."""
    part = own[own.state == state]
    found = []
    for _, rows in part.groupby("seed"):
        (mine,) = rows[rows.method == method].itertuples()
        curve = rows[(rows.method == "adamw") & np.isfinite(rows.loss)].sort_values("loss")
        logs = np.array([_log(value) for value in curve.trace_hessian])
        same = logs[(curve.length == 1.0).to_numpy()]
        if not math.isfinite(mine.loss) or not len(same):
            found.append((math.nan, math.nan))
            continue
        at = np.interp(mine.loss, curve.loss, logs, left=math.nan, right=math.nan)
        found.append((_log(mine.trace_hessian) - float(same[0]), _log(mine.trace_hessian) - float(at)))
    return found


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _judged(family: list[tuple[dict[str, Any], Estimate, Estimate]]) -> list[dict[str, Any]]:
    ps = holm([trained.p for _, trained, _ in family])
    flatter = [significant(p) and trained.mean < 0 for p, (_, trained, _) in zip(ps, family, strict=True)]
    # Over all methods: which of them pass the first test is itself a result, and would make the second family too small.
    adjusted = holm([contrast.p for _, _, contrast in family])
    rows = []
    for (row, _, contrast), flat, p in zip(family, flatter, adjusted, strict=True):
        word = UNKNOWN if math.isnan(row["b"]) else FLAT
        if flat:
            word = (EXPLAINED if contrast.mean < 0 else OWN) if significant(p) else OPEN
        rows.append(row | {"verdict": word})
    return rows


# ---------------------------------------------------------------------- what ranks the methods as the loss does


def kendall(data: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau-b of each measure with the validation loss over the methods, in each seed, and the mean over seeds.

    Its standard error over seeds, and over methods by the jackknife (each left out of all seeds); the larger p of the two decides,
    Holm's correction over all measures, states and geometries.
    """
    rows = []
    data = data[(data.length == 1.0) & np.isfinite(data.loss)]
    for (geometry, state), part in data.groupby(["geometry", "state"], sort=False):
        methods = list(part.method.unique())
        for field, name in RANKED.items():
            by_seed = estimate(_taus(part, field))
            without = [float(np.mean(_taus(part[part.method != method], field))) for method in methods]
            m = len(methods)
            stderr = math.sqrt((m - 1) / m * sum((tau - np.mean(without)) ** 2 for tau in without))
            row = {"geometry": geometry, "state": state, "measure": name, "field": field, "tau": by_seed.mean}
            row |= {"stderr_seeds": by_seed.stderr, "stderr_methods": stderr, "seeds": by_seed.n, "entries": m}
            # Taus are few: where all seeds have the same, methods decide; without a spread over these either it is a perfect order.
            certain = float(by_seed.mean == 0.0)
            ps = [one.p if one.stderr else certain for one in (by_seed, Estimate(by_seed.mean, stderr, m))]
            rows.append(row | {"p": max(ps)})
    result = pd.DataFrame(rows)
    result["p"] = holm(list(result.p))
    result["reading"] = [READINGS[int(row.tau < 0)] if significant(row.p) else OPEN for row in result.itertuples()]
    return result


def _taus(part: pd.DataFrame, field: str) -> Sequence[float]:
    """In each seed."""
    found = []
    for _, seed in part.groupby("seed"):
        values = seed[field].abs() if field.startswith("bottom") else seed[field]
        found.append(float(scipy.stats.kendalltau(values, seed.loss)[0]))
    return found
