"""Where training breaks: the frontier in learning rate and radius, per width and method, and how it moves with width."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits.markdown import significant
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.study.compare import Estimate, Verdict, estimate, judged
from functional_sam.study.dose import dose_of

RISE = 0.1  # nats above the best, from which on a run is broken
SAME = math.log(1.25)  # radii that differ by less coincide
PAIRS = {"functional-sam": "sam", "precond-functional-sam": "precond-sam"}  # the path alone differs
AT_MOST, AT_LEAST, ABOUT, BETWEEN, ADAMW = "at most", "at least", "about", "", "AdamW is broken"
RADIUS, SLOPE = "log radius", "slope in log width"
WORDS = {
    RADIUS: {Verdict.BETTER: "later", Verdict.WORSE: "earlier", Verdict.SAME: "the frontiers coincide"},
    SLOPE: {Verdict.BETTER: "grows with width", Verdict.WORSE: "shrinks with width"},
}


def grid(
    spec: Spec, task: str, seed: int, lrs: Sequence[float], overrides: tuple[str, ...], *layers: dict[str, Any]
) -> list[Config]:
    """AdamW at each learning rate, and each method at each learning rate and radius; layers: settings of all of them."""
    found = []
    for lr in lrs:
        found.append(spec.run(task, "adamw", seed, overrides, *layers, optimizer={"lr": lr}))
        for method in spec.methods:
            for rho in spec.rho:
                own: dict[str, Any] = {"optimizer": {"lr": lr}, "method": {"rho": rho}}
                found.append(spec.run(task, method, seed, overrides, *layers, **own))
    return found


def frame(plan: Plan) -> pd.DataFrame:
    """One row per run: its final validation loss (inf where it diverged), and its dose before that."""
    rows = []
    for config in plan.shown:
        summary = plan.source.summary(config)
        rows.append(
            {
                "precision": config.training.precision,
                "width": config.model.width,
                "method": config.method.name,
                "lr": config.optimizer.lr,
                "rho": config.method.rho or 0.0,
                "seed": config.training.init_seed,
                "loss": math.inf if summary["loss"] is None else summary["loss"],
                "diverged": bool(summary.get("diverged", False)),
                "dose": dose_of(config, plan.source),
            }
        )
    return pd.DataFrame(rows)


def frontier(data: pd.DataFrame) -> pd.DataFrame:
    """A row per width, method, lr and seed: the radius from which on training is broken, and its dose.

    bound: "at most" or "at least" where the grid does not hold it; "AdamW is broken" where there is none, and rho_b is nan: its
    own loss is RISE above the best, or it diverged.
    """
    rows = []
    for (width, seed), part in data.groupby(["width", "seed"], sort=False):
        adamw = part[part.method == "adamw"].set_index("lr").loss
        for method in [name for name in part.method.unique() if name != "adamw"]:
            own = part[part.method == method]
            best = min(own.loss.min(), adamw.min())
            for lr, at in own.groupby("lr"):
                found = (math.nan, math.nan, ADAMW)
                if math.isfinite(adamw[lr]) and adamw[lr] <= best + RISE:
                    at = at.sort_values("rho")
                    found = first_broken(list(at.rho), list(at.loss), list(at.dose), best + RISE)
                row = {"width": width, "method": method, "lr": lr, "seed": seed}
                rows.append(row | dict(zip(("rho_b", "dose_b", "bound"), found, strict=True)))
    return pd.DataFrame(rows)


def first_broken(rhos: list[float], losses: list[float], doses: list[float], limit: float) -> tuple[float, float, str]:
    """(radius, dose, bound) where the loss first passes the limit as the radius rises: loss against log rho."""
    broken = [not loss <= limit for loss in losses]
    if broken[0]:
        return rhos[0], doses[0], AT_MOST
    if not any(broken):
        return rhos[-1], doses[-1], AT_LEAST
    i = broken.index(True)
    part = (limit - losses[i - 1]) / (losses[i] - losses[i - 1]) if math.isfinite(losses[i]) else 0.5
    return _between(rhos[i - 1], rhos[i], part), _between(doses[i - 1], doses[i], part), BETWEEN


def _between(a: float, b: float, part: float) -> float:
    return float(a ** (1 - part) * b**part)


def compared(found: pd.DataFrame) -> pd.DataFrame:
    """F = log rho_b of the functional method minus its plain twin's, at each width, and the slope of F in log width; judged."""
    rows: list[dict[str, Any]] = []
    for name, other in PAIRS.items():
        values = {}  # (width, seed) -> F
        sides: dict[tuple[int, int], set[str]] = {}  # (width, seed) -> on which sides F is only bounded
        for (width, seed), part in found.groupby(["width", "seed"]):
            value, open_sides = log_ratio(part[part.method == name], part[part.method == other])
            if not math.isnan(value):
                values[width, seed], sides[width, seed] = value, open_sides
        widths = sorted({width for width, _ in values})
        for width in widths:
            rows.append(row_of(name, other, RADIUS, width, [value for (at, _), value in values.items() if at == width]))
            rows[-1]["bound"] = together(own for (at, _), own in sides.items() if at == width)
        slopes = [slope({width: value for (width, at), value in values.items() if at == seed}) for seed in found.seed.unique()]
        rows.append(row_of(name, other, SLOPE, math.nan, [one for one in slopes if not math.isnan(one)]))
        by_seed = ({width: own for (width, at), own in sides.items() if at == seed} for seed in found.seed.unique())
        rows[-1]["bound"] = together(sides_of_slope(own) for own in by_seed)
    result = pd.DataFrame(rows)
    result["verdict"] = ""
    for kind, family in result.groupby("what"):
        words = verdicts(family, SAME if kind == RADIUS else 0.0)
        result.loc[family.index, "verdict"] = [WORDS[str(kind)].get(word, str(Verdict.OPEN)) for word in words]
    return result


def log_ratio(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[float, set[str]]:
    """log rho_b of one minus that of the other, mean over the learning rates of both, and on which sides it is only bounded.

    Rows of one width and seed. nan where nothing can be compared: two bounds on one side, or AdamW broken.
    """
    ours, theirs = ours.set_index("lr"), theirs.set_index("lr")
    both = [
        lr
        for lr in ours.index.intersection(theirs.index)
        if not (ours.bound[lr] == theirs.bound[lr] != BETWEEN) and ADAMW not in (ours.bound[lr], theirs.bound[lr])
    ]
    if not both:
        return math.nan, set()
    value = float(np.mean([math.log(ours.rho_b[lr] / theirs.rho_b[lr]) for lr in both]))
    return value, {_side(ours.bound[lr], theirs.bound[lr]) for lr in both} - {BETWEEN}


def verdicts(family: pd.DataFrame, margin: float) -> list[Verdict]:
    """Of log ratios of radii, by Holm over the rows; open where a bound does not warrant it."""
    words = judged([Estimate(r.difference, r.stderr, r.n) for r in family.itertuples()], lower_is_better=False, margin=margin)
    return [word if _warranted(word, str(r.bound)) else Verdict.OPEN for word, r in zip(words, family.itertuples(), strict=True)]


def _warranted(word: Verdict, bound: str) -> bool:
    """Whether the sign that a verdict gives to a log ratio of radii, or to its slope, is that of every one its bound allows.

    The t test itself takes the bound for the value: its spread is that of the grid's end.
    """
    allowed = {AT_MOST: {Verdict.WORSE}, AT_LEAST: {Verdict.BETTER}, ABOUT: set()}
    return bound == BETWEEN or word in allowed[bound]


def together(sides: Iterable[set[str]]) -> str:
    """The side on which all are bounded that are; ABOUT where they differ."""
    every = set().union(*sides)
    return ABOUT if len(every) > 1 else next(iter(every), BETWEEN)


def sides_of_slope(sides: dict[int, set[str]]) -> set[str]:
    """On which sides the slope in log width is bounded by bounded values: below the mean width a larger value is a smaller slope.

    One width has no slope, and so no bound.
    """
    if len(sides) < 2:
        return set()
    arms = {width: math.log(width) - float(np.mean(np.log(list(sides)))) for width in sides}
    turned = {AT_MOST: AT_LEAST, AT_LEAST: AT_MOST}
    return {one if arms[width] > 0 else turned[one] for width, own in sides.items() for one in own if abs(arms[width]) > 1e-12}


def _side(ours: str, theirs: str) -> str:
    """On which side the ratio of two radii is bounded, where one of them is a bound."""
    if ours == AT_MOST or theirs == AT_LEAST:
        return AT_MOST
    return AT_LEAST if ours == AT_LEAST or theirs == AT_MOST else BETWEEN


def row_of(name: str, other: str, what: str, width: float, values: list[float]) -> dict[str, Any]:
    """A comparison of two methods: mean of the values of the seeds, its standard error and 95 % interval."""
    one = estimate(values)
    row = {"method": name, "other": other, "what": what, "width": width, "n": one.n}
    return row | {"difference": one.mean, "stderr": one.stderr, "half_width": one.half_width if one.n else math.nan}


def slope(by_width: dict[int, float]) -> float:
    """Of a value in log width by least squares; nan for less than two widths."""
    known = {width: value for width, value in by_width.items() if not math.isnan(value)}
    if len(known) < 2:
        return math.nan
    return float(np.polyfit(np.log(list(known)), list(known.values()), 1)[0])


def radii(data: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """A row per method, width and seed: the frontier (geometric mean over learning rates), its dose, and the best radius."""
    rows = []
    for (method, width, seed), part in found.groupby(["method", "width", "seed"], sort=False):
        own = data[(data.method == method) & (data.width == width) & (data.seed == seed)]
        best = own.rho[own.loss.idxmin()] if np.isfinite(own.loss).any() else math.nan
        there = part[part.bound != ADAMW]
        row = {"method": method, "width": width, "seed": seed, "best": best, "frontier": _geometric(there.rho_b)}
        rows.append(row | {"dose": _geometric(there.dose_b), "bounded": bool(there.bound.ne(BETWEEN).any())})
    return pd.DataFrame(rows)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """A row per method: the exponents in width of frontier, its dose and best radius, means over seeds."""
    rows = []
    for method, part in table.groupby("method", sort=False):
        for field in ("frontier", "dose", "best"):
            each = [slope(dict(zip(own.width, np.log(own[field]), strict=True))) for _, own in part.groupby("seed")]
            one = estimate([value for value in each if not math.isnan(value)])
            rows.append({"method": method, "of": field, "n": one.n, "exponent": one.mean, "half_width": one.half_width})
    return pd.DataFrame(rows)


def _geometric(values: Iterable[float]) -> float:
    known = [value for value in values if value > 0]
    return math.exp(float(np.mean(np.log(known)))) if known else math.nan


def times(row: Any) -> str:
    """A difference of logarithms as a factor with its interval; a bound has none, for what it bounds is not known."""
    if not row.n:
        return "not compared"
    if row.bound != BETWEEN:
        return f"{row.bound} {significant(math.exp(row.difference), 2)}"
    low, high = (significant(math.exp(row.difference + sign * row.half_width), 2) for sign in (-1, 1))
    ends = f" [{low}, {high}]" if math.isfinite(row.half_width) else ""
    return f"{significant(math.exp(row.difference), 2)}{ends}"


def of_seeds(row: Any, seeds: int) -> str:
    """In how many seeds two radii could be compared, where these are not all."""
    return "" if row.n == seeds else f", in {row.n} of {seeds} seeds"
