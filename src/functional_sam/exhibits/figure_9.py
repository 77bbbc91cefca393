"""figure-9: where training breaks: the frontier in learning rate and radius, per width and method, and how it moves with width."""

import math
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from functional_sam.config import compose
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import significant
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, firsts
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, estimate, judged
from functional_sam.tasks import TASKS

RISE = 0.1  # nats above the best, from which on a run is broken
SAME = math.log(1.25)  # radii that differ by less coincide
UNMOVED = "none that this grid of radii shows"  # of an exponent that is the same in every seed
PAIRS = {"functional-sam": "sam", "precond-functional-sam": "precond-sam"}  # the path alone differs
AT_MOST, AT_LEAST, BETWEEN, ADAMW = "at most", "at least", "", "AdamW is broken"
LEVEL, SLOPE = "log radius", "slope in log width"
WORDS = {
    LEVEL: {Verdict.BETTER: "later", Verdict.WORSE: "earlier", Verdict.SAME: "the frontiers coincide"},
    SLOPE: {Verdict.BETTER: "grows with width", Verdict.WORSE: "shrinks with width"},
}


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW at each learning rate, each method at each learning rate and radius, on each width and seed; seeds first."""
    configs = []
    for seed in spec.seeds:
        for task in spec.tasks:
            for lr in spec.lr:
                layers = spec.layers(task, seed, optimizer={"lr": lr})
                configs.append(compose(task, "adamw", spec.scale, layers, overrides))
                for method in spec.methods:
                    for rho in spec.rho:
                        layers = spec.layers(task, seed, optimizer={"lr": lr}, method={"rho": rho})
                        configs.append(compose(task, method, spec.scale, layers, overrides))
    return Plan.of_known_runs(spec, configs, source)


def frame(plan: Plan) -> pd.DataFrame:
    """One row per run: its final validation loss (inf where it diverged), and the mean of its doses before that."""
    rows = []
    for config in plan.configs:
        summary = plan.source.summary(config)
        doses = [line["dose"] for line in plan.source.metrics(config, "dose")]
        doses = [dose for dose in doses if dose is not None and math.isfinite(dose)]
        rows.append(
            {
                "width": config.model.width,
                "method": config.method.name,
                "lr": config.optimizer.lr,
                "rho": config.method.rho or 0.0,
                "seed": config.training.init_seed,
                "loss": math.inf if summary["loss"] is None else summary["loss"],
                "diverged": bool(summary.get("diverged", False)),
                "dose": float(np.mean(doses)) if doses else math.nan,
            }
        )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- the frontier


def frontier(data: pd.DataFrame) -> pd.DataFrame:
    """A row per width, method, lr and seed: the radius from which on training is broken, and its dose.

    bound: "at most" or "at least" where the grid does not hold it; "AdamW is broken" where there is none, and rho_b is nan.
    """
    rows = []
    for (width, seed), part in data.groupby(["width", "seed"], sort=False):
        adamw = part[part.method == "adamw"].set_index("lr").loss
        for method in [name for name in part.method.unique() if name != "adamw"]:
            own = part[part.method == method]
            best = min(own.loss.min(), adamw.min())
            for lr, at in own.groupby("lr"):
                found = (math.nan, math.nan, ADAMW)
                if adamw[lr] <= best + RISE:
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
        sides: dict[int, set[str]] = {}  # width -> on which sides F is only bounded
        for (width, seed), part in found.groupby(["width", "seed"]):
            ours, theirs = (part[part.method == method].set_index("lr") for method in (name, other))
            both = [
                lr
                for lr in ours.index
                if not (ours.bound[lr] == theirs.bound[lr] != BETWEEN) and ADAMW not in (ours.bound[lr], theirs.bound[lr])
            ]
            if both:
                values[width, seed] = float(np.mean([math.log(ours.rho_b[lr] / theirs.rho_b[lr]) for lr in both]))
                sides.setdefault(width, set()).update(_side(ours.bound[lr], theirs.bound[lr]) for lr in both)
        widths = sorted({width for width, _ in values})
        for width in widths:
            rows.append(_row(name, other, LEVEL, width, [value for (at, _), value in values.items() if at == width]))
            open_sides = sides[width] - {BETWEEN}
            rows[-1]["bound"] = "about" if len(open_sides) > 1 else next(iter(open_sides), BETWEEN)
        slopes = [slope({width: value for (width, at), value in values.items() if at == seed}) for seed in found.seed.unique()]
        rows.append(_row(name, other, SLOPE, math.nan, [one for one in slopes if not math.isnan(one)]))
    result = pd.DataFrame(rows)
    result["verdict"] = ""
    for kind, family in result.groupby("what"):
        margin = SAME if kind == LEVEL else 0.0
        words = judged([Estimate(r.difference, r.stderr, r.n) for r in family.itertuples()], lower_is_better=False, margin=margin)
        words = [
            word if _warranted(word, getattr(r, "bound", "")) else Verdict.OPEN
            for word, r in zip(words, family.itertuples(), strict=True)
        ]
        result.loc[family.index, "verdict"] = [WORDS[str(kind)].get(word, str(Verdict.OPEN)) for word in words]
    return result


def _warranted(word: Verdict, bound: object) -> bool:
    """Whether the sign that a verdict gives to a log ratio of radii is that of every ratio its bound allows.

    The t test itself takes the bound for the value: its spread is that of the grid's end.
    """
    allowed = {AT_MOST: {Verdict.WORSE}, AT_LEAST: {Verdict.BETTER}, "about": set()}
    return not isinstance(bound, str) or not bound or word in allowed[bound]


def _side(ours: str, theirs: str) -> str:
    """On which side the ratio of two radii is bounded, where one of them is a bound."""
    if ours == AT_MOST or theirs == AT_LEAST:
        return AT_MOST
    return AT_LEAST if ours == AT_LEAST or theirs == AT_MOST else BETWEEN


def _row(name: str, other: str, what: str, width: float, values: list[float]) -> dict[str, Any]:
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


# ---------------------------------------------------------------------- the figure


def draw(plan: Plan) -> Exhibit:
    """Above the frontier against lr, a panel a width; below frontier, its dose and the best radius against width."""
    data = frame(plan)
    found = frontier(data)
    pairs, table = compared(found), radii(data, found)
    slopes = exponents(table)
    style.use()
    figure = plt.figure(figsize=(style.PAGE, 4.3), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    top, bottom = parts
    widths = sorted(data.width.unique())
    above = top.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axis, width in zip(above, widths, strict=True):
        _against_lr(axis, found[found.width == width], plan.spec)
        axis.set_title(f"width {width}")
    above[0].set_ylabel("radius $\\rho$ that\nbreaks training")
    labels = {
        "frontier": "radius $\\rho$ that\nbreaks training",
        "dose": "dose there,\n|correction| / |g|",
        "best": "radius $\\rho$ of\nthe lowest loss",
    }
    for axis, (field, label) in zip(bottom.subplots(1, len(labels)), labels.items(), strict=True):
        _against_width(axis, table, field, widths)
        axis.set_ylabel(label)
    figure.legend(
        handles=_legend(plan.spec.methods, bool((found.bound == ADAMW).any())),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncol=3,
    )
    finding = _finding(pairs)
    style.finding_above(figure, finding)
    frames = {"": data, "frontier": found, "pairs": pairs, "radii": table, "exponents": slopes}
    largest = pairs[(pairs.what == LEVEL) & (pairs.width == pairs.width.max())]
    meant = {word: verdict for verdict, word in WORDS[LEVEL].items()}
    said = answer([meant.get(word, word) for word in largest.verdict], Verdict.BETTER)
    return Exhibit(plan, frames, _caption(plan, data, finding), _verdict(data, pairs, slopes), figure, answer=said)


def headline(data: pd.DataFrame) -> str:
    """The radius that breaks training at the largest width, of the functional over the plain path, in a few words."""
    pairs = compared(frontier(data))
    own = pairs[(pairs.what == LEVEL) & (pairs.width == pairs.width.max())]
    found = [f"{style.METHOD_LABEL[row.method]} / {style.METHOD_LABEL[row.other]} {_times(row)}" for row in own.itertuples()]
    return f"radius that costs {RISE:g} nats, functional over plain path: {', '.join(found)}"


def _against_lr(axis: Axes, found: pd.DataFrame, spec: Spec) -> None:
    for number, method in enumerate(spec.methods):
        own = found[found.method == method]
        points = [(lr, own[own.lr == lr]) for lr in spec.lr]
        points = [(lr, at[at.bound != ADAMW]) for lr, at in points]
        beside = 1.03 ** (number - (len(spec.methods) - 1) / 2)
        _line(axis, [(lr * beside, at.rho_b, at.bound.ne(BETWEEN).any()) for lr, at in points if len(at)], method)
    gone = [lr for lr in spec.lr if (found[found.lr == lr].bound == ADAMW).all()]
    for lr in gone:
        axis.axvspan(lr / 1.15, lr * 1.15, color="#bbbbbb", alpha=0.5, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(min(spec.rho) / 2, max(spec.rho) * 2))
    style.plain_log(axis)
    axis.set_xlim(min(spec.lr) / 1.3, max(spec.lr) * 1.3)
    axis.set_xticks(spec.lr, [f"{lr:g}" for lr in spec.lr])
    axis.xaxis.set_minor_locator(NullLocator())


def _against_width(axis: Axes, table: pd.DataFrame, field: str, widths: list[int]) -> None:
    methods = list(table.method.unique())
    for number, method in enumerate(methods):
        beside = 1.03 ** (number - (len(methods) - 1) / 2)
        points = []
        for width in widths:
            at = table[(table.method == method) & (table.width == width)]
            points.append((width * beside, at[field].dropna(), field != "best" and bool(at.bounded.any())))
        _line(axis, [point for point in points if len(point[1])], method)
    values = table[field].dropna()
    axis.set(xscale="log", yscale="log", xlabel="width", ylim=(values.min() / 2, values.max() * 2))
    style.plain_log(axis)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.xaxis.set_minor_locator(NullLocator())


def _line(axis: Axes, points: list[tuple[float, pd.Series, bool]], method: str) -> None:
    """Geometric means over seeds with 95 % t intervals; hollow where a seed's is only a bound."""
    color = style.METHOD_COLOR[method]
    found = [estimate(list(np.log(values))) for _, values, _ in points]
    xs, ys = [x for x, _, _ in points], [math.exp(one.mean) for one in found]
    halves = [one.half_width if math.isfinite(one.half_width) else 0.0 for one in found]
    errors = [[y - y * math.exp(-half) for y, half in zip(ys, halves, strict=True)]]
    errors.append([y * math.exp(min(half, 50.0)) - y for y, half in zip(ys, halves, strict=True)])
    axis.errorbar(xs, ys, errors, color=color, elinewidth=0.7)
    for x, y, (_, _, bounded) in zip(xs, ys, points, strict=True):
        axis.plot([x], [y], "o", color=color, markerfacecolor="white" if bounded else color, zorder=3)


def _legend(methods: list[str], adamw: bool) -> list[Line2D]:
    grey: dict[str, Any] = {"color": "#777777", "linestyle": "none"}
    marks = [
        *(Line2D([], [], color=style.METHOD_COLOR[name], marker="o", label=style.METHOD_LABEL[name]) for name in methods),
        Line2D([], [], marker="o", markerfacecolor="white", label="of some seeds a bound, the end of the grid", **grey),
    ]
    return [*marks, Line2D([], [], marker="s", markersize=7, alpha=0.5, label="AdamW itself breaks", **grey)] if adamw else marks


# ---------------------------------------------------------------------- words


def _times(row: Any) -> str:
    """A difference of logarithms as a factor with its interval; a bound has none, for what it bounds is not known."""
    if not row.n:
        return "not compared"
    if isinstance(row.bound, str) and row.bound:
        return f"{row.bound} {significant(math.exp(row.difference), 2)}"
    low, high = (significant(math.exp(row.difference + sign * row.half_width), 2) for sign in (-1, 1))
    ends = f" [{low}, {high}]" if math.isfinite(row.half_width) else ""
    return f"{significant(math.exp(row.difference), 2)}{ends}"


def _finding(pairs: pd.DataFrame) -> str:
    parts = []
    for name, other in PAIRS.items():
        own = pairs[(pairs.method == name) & (pairs.what == LEVEL)]
        label = f"{style.METHOD_LABEL[name]} / {style.METHOD_LABEL[other]}"
        if own.empty:
            parts.append(f"{label} not compared, both beyond the grid")
            continue
        row = own.loc[own.width.idxmax()]
        parts.append(f"{label} {_times(row)} at width {row.width:.0f} ({row.verdict})")
    return f"Radius that breaks training, functional over plain: {'; '.join(parts)}"


def _caption(plan: Plan, data: pd.DataFrame, finding: str) -> str:
    spec, config = plan.spec, next(iter(firsts(plan.configs).values()))
    gone = data[data.diverged].groupby("method").size()
    lost = ", ".join(f"{style.METHOD_LABEL[name]} {count}" for name, count in gone.items()) or "none"
    lrs, rhos = (", ".join(f"{value:g}" for value in values) for values in (spec.lr, spec.rho))
    size = f"{config.training.batch} rows, {config.training.steps} steps in {config.training.precision}"
    return (
        f"{finding}. A run is broken where it diverged or ended more than {RISE:g} nats above the best of its width, seed and "
        "method; the frontier is interpolated in log rho, and the end of the grid counts where it lies beyond; decoders of depth "
        f"{config.model.depth} on {TASKS[config.kind].data_name(config)}, {size}, scale {spec.scale}, not the paper's models; lr "
        f"{lrs}, rho {rhos}; diverged of {len(data)} runs: {lost}. Geometric means over n={len(spec.seeds)} seeds, below over "
        "learning rates too, 95 % t intervals, verdicts by Holm over pairs and widths."
    )


def _verdict(data: pd.DataFrame, pairs: pd.DataFrame, slopes: pd.DataFrame) -> str:
    label = style.METHOD_LABEL
    at = [
        f"{label[row.method]} over {label[row.other]} at width {row.width:.0f}: {_times(row)}, {row.verdict}"
        for row in pairs[pairs.what == LEVEL].itertuples()
    ]
    turns = [
        f"{label[row.method]} {row.difference:+.2f} \N{PLUS-MINUS SIGN} {row.half_width:.2f} ({row.verdict})"
        for row in pairs[(pairs.what == SLOPE) & (pairs.n > 0)].itertuples()
    ]
    grows = [
        f"{label[row.method]} "
        + (f"{row.exponent:+.2f} \N{PLUS-MINUS SIGN} {row.half_width:.2f}" if row.half_width > 1e-6 else UNMOVED)
        for row in slopes[(slopes.of == "best") & (slopes.n > 0)].itertuples()
    ]
    return (
        f"{'; '.join(at)}. Slope of the logarithm in log width: {'; '.join(turns) or 'not known'}. Exponent of the best radius in "
        f"width: {'; '.join(grows) or 'not known'}. {int(data.diverged.sum())} of {len(data)} runs diverged."
    )
