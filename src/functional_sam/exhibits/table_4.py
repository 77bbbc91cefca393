"""table-4: is the flatness spurious? Curvature of each method's final weights as trained, and at the temperature that fits best."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits import markdown, style
from functional_sam.exhibits.flatness import (
    EXPLAINED,
    FLAT,
    OPEN,
    OWN,
    RANKED,
    READINGS,
    STATES,
    UNKNOWN,
    kendall,
    measures,
    undone,
)
from functional_sam.exhibits.markdown import interval, number
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, estimate

GEOMETRIES = {"plain": "", "adam": " in Adam's geometry"}
SHOWN = {
    "loss": "validation loss",
    "top_hessian": "top of H",
    "top_gauss_newton": "top of H_G",
    "top_functional": "top of H_F",
    "trace_hessian": "tr H",
    "trace_gauss_newton": "tr H_G",
    "trace_functional": "tr H_F",
    "norm_func": "|delta_func|",
}
OUTLYING = 8  # times the median of a column: GSAM at a radius that broke it had 700 times
CLAIMS = {"sam": EXPLAINED, "functional-sam": OWN}  # of the paper
SAYS = {Verdict.BETTER: "as the paper says", Verdict.WORSE: "against the paper", Verdict.OPEN: "open"}


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """Every method at one radius (in its own unit, spec.rho_scale) on every seed, and AdamW of other lengths; seeds first."""
    (task,), configs, lengths = spec.tasks, [], []
    for seed in spec.seeds:
        for method in spec.methods:
            for rho in spec.rho if method != "adamw" else [None]:
                radius = None if rho is None else rho * spec.rho_scale.get(method, 1.0)
                configs.append(spec.run(task, method, seed, overrides, method={"rho": radius}))
                lengths.append(1.0)
        base = spec.run(task, "adamw", seed, overrides)
        for length in spec.lengths:
            configs.append(spec.run(task, "adamw", seed, (*overrides, *_longer(base, length))))
            lengths.append(length)
    done = all(source.done(config) for config in configs)
    return Plan(spec, configs, lengths, source, done)


def _longer(base: Config, length: float) -> tuple[str, str]:
    """The same schedule over more or fewer steps, as overrides: over those of the command line, which `base` has."""
    steps, warmup = base.training.steps, base.optimizer.warmup_steps
    return f"training.steps={round(length * steps)}", f"optimizer.warmup_steps={round(length * warmup)}"


def draw(plan: Plan) -> Exhibit:
    """CSV of all runs, of what a temperature undoes, and of the taus, and a Markdown table of each."""
    pairs = zip(plan.configs, plan.content, strict=True)
    data = pd.DataFrame([row for config, length in pairs for row in measures(config, plan.source, length)])
    found, taus = undone(data), kendall(data)
    frames = {"": data, "temperature": found, "kendall": taus}
    own = found[found.geometry == "plain"].set_index("method").verdict
    words = [_as_claimed(own[method], claim) for method, claim in CLAIMS.items()]
    said, tables = answer(words, Verdict.BETTER), _tables(plan, data, found, taus)
    return Exhibit(plan, frames, _caption(plan, data, found), _verdict(found, taus), markdown=tables, answer=said)


def _as_claimed(verdict: str, claim: str) -> Verdict:
    """What a verdict of `undone` says to a claim of the paper: better is yes, worse the opposite."""
    if verdict == claim:
        return Verdict.BETTER
    return Verdict.WORSE if verdict in (EXPLAINED, OWN) else Verdict.OPEN


def headline(data: pd.DataFrame) -> str:
    """What table and CSV say, in a few words."""
    own = undone(data).query("geometry == 'plain'").set_index("method")
    parts = [
        f"{style.METHOD_LABEL[name]} {interval(own.b[name], own.b_half[name], 2, sign=True) or 'not known'}" for name in CLAIMS
    ]
    sam = own.loc["sam"]
    undoes = f"; temperature undoes {number(sam.fraction, 2)} of SAM's" if sam.b < 0 else ""  # else there is no flatness to undo
    return f"log tr H minus AdamW's: {', '.join(parts)}{undoes}"


def _flatness(row: Any) -> str:
    words = f", {_fraction(row)} undone" if row.b < 0 else ""
    return f"{interval(row.b, row.b_half, 3, sign=True)}{words} ({row.verdict})".strip()


def _fraction(row: Any) -> str:
    """With its interval; a fraction of next to nothing has none."""
    if math.isnan(row.low):
        return f"{number(row.fraction, 2)} (no interval)"
    return f"{number(row.fraction, 2)} [{number(row.low, 2)}, {number(row.high, 2)}]"


def _finding(found: pd.DataFrame) -> str:
    own = found[found.geometry == "plain"].set_index("method")
    parts = []
    for name, claim in CLAIMS.items():
        row = own.loc[name]
        parts.append(f"{style.METHOD_LABEL[name]} {_flatness(row)}: {SAYS[_as_claimed(row.verdict, claim)]}")
    return f"Log tr H minus AdamW's and the fraction of it that a fitted temperature undoes: {'; '.join(parts)}"


def _caption(plan: Plan, data: pd.DataFrame, found: pd.DataFrame) -> str:
    spec, configs = plan.spec, plan.configs
    units = ", ".join(f"times {value:g} for {style.METHOD_LABEL[method]}" for method, value in spec.rho_scale.items())
    diverged = data[(data.loss == math.inf) & (data.geometry == "plain") & (data.state == "trained")]
    names = ", ".join(dict.fromkeys(style.METHOD_LABEL[name] for name in diverged.method))
    lost = f", {len(diverged)} of {len(configs)} runs diverged, of methods of whose flatness nothing is told: {names}"
    setting = [
        f"Final weights on {configs[0].measure.rows} held-out rows, scale {spec.scale}, not the paper's: {sizes(configs[:1])}",
        f"rho {', '.join(f'{rho:g}' for rho in spec.rho)}{f' ({units})' if units else ''}, fixed, not tuned",
        "the scale of the logits, 1 / temperature, minimizes the validation loss",
        f"matched: AdamW of {', '.join(f'{one:g}' for one in spec.lengths)} times the steps, interpolated at the method's loss",
        f"Lanczos residuals at most {_worst(data, 'top_hessian_residual', 'top_hessian'):.1e} of the top of H, standard errors of "
        f"{configs[0].measure.probes} probes at most {_worst(data, 'trace_hessian_stderr', 'trace_hessian'):.0%} of tr H",
    ]
    return (
        f"{_finding(found)}. {'; '.join(setting)}. Means and halves of 95 % t intervals, n={len(spec.seeds)} seeds, paired, the "
        f"interval of a fraction by Fieller, verdicts by Holm over methods{lost if len(diverged) else ''}."
    )


def _worst(data: pd.DataFrame, error: str, of: str) -> float:
    return float((data[error] / data[of].abs()).max())


def _verdict(found: pd.DataFrame, taus: pd.DataFrame) -> str:
    own = found[found.geometry == "plain"]
    words = [
        f"{word}: {', '.join(style.METHOD_LABEL[name] for name in own[own.verdict == word].method)}"
        for word in (EXPLAINED, OWN, OPEN, FLAT, UNKNOWN)
        if (own.verdict == word).any()
    ]
    ranks = []
    for word in READINGS:
        some = taus[taus.reading == word].sort_values("tau", ascending=word != READINGS[0])
        shown = ", ".join(f"{row.measure} {STATES[row.state]} {number(row.tau, 2, sign=True)}" for row in some.head(4).itertuples())
        ranks += [f"{word}: {shown}{f' and {len(some) - 4} more' if len(some) > 4 else ''}"] if len(some) else []
    n, m = int(taus.seeds.iloc[0]), int(taus.entries.max())
    return (
        f"{_finding(found)}. All methods: {'; '.join(words)}. Of {len(taus)} Kendall's taus with the loss, {m} methods, n={n} "
        f"seeds, by the wider of the two errors and Holm: {'; '.join(ranks) or 'none is significant'}."
    )


# ---------------------------------------------------------------------- tables

# dL/ds = sum_k (p_k - y_k) z_k, zero on average where s is fitted, makes -sum_k p_k log p_k and -log p_y the same on average.
IDENTITY = (
    "*Entropy at the fitted temperature is the loss itself, on the rows that the temperature is fitted on: that it ranks as the "
    "loss there is no finding.*\n"
)


def _tables(plan: Plan, data: pd.DataFrame, found: pd.DataFrame, taus: pd.DataFrame) -> str:
    blocks = []
    for geometry in dict.fromkeys(data.geometry):
        own = data[(data.geometry == geometry) & (data.length == 1.0)]
        for state, title in STATES.items():
            blocks.append(f"**{title.capitalize()}{GEOMETRIES[geometry]}**\n\n{_measured(own[own.state == state])}")
        blocks.append(f"**What a temperature undoes{GEOMETRIES[geometry]}**\n\n{_undone(own, found[found.geometry == geometry])}")
        blocks.append(f"**The same at matched loss{GEOMETRIES[geometry]}**\n\n{_matched(found[found.geometry == geometry])}")
    for geometry in dict.fromkeys(data.geometry):
        title = f"**Which measure ranks the methods as the validation loss does{GEOMETRIES[geometry]}**"
        blocks.append(f"{title}\n\n{_ranking(taus[taus.geometry == geometry])}")
    blocks.append(IDENTITY)
    return "\n".join(blocks)


def _measured(own: pd.DataFrame) -> str:
    methods = list(dict.fromkeys(own.method))
    columns, cells = ["method"], [[style.METHOD_LABEL[name] for name in methods]]
    for field, name in SHOWN.items():
        head, column = _scaled(name, [estimate(list(own[own.method == method][field])) for method in methods])
        columns.append(head)
        cells.append(column)
    return markdown.table(columns, zip(*cells, strict=True))


def _scaled(name: str, values: Sequence[Estimate]) -> tuple[str, list[str]]:
    """A column in a unit of 1000^k in which its largest mean has one to three digits before the point, and three in all.

    A mean over OUTLYING times the median, of a method that broke, does not choose the unit; it has no digit after the point.
    """
    sizes = [abs(one.mean) for one in values if math.isfinite(one.mean) and one.mean]
    limit = OUTLYING * statistics.median(sizes) if sizes else math.inf
    power = math.floor(math.log10(max(size for size in sizes if size <= limit))) if sizes else 0
    unit = 3 * (power // 3)
    digits = 4 if name == SHOWN["loss"] else 2 - (power - unit)
    head = name if not unit else f"{name} (1e{unit})"
    return head, [
        interval(one.mean / 10**unit, one.half_width / 10**unit, 0 if abs(one.mean) > limit else digits) for one in values
    ]


def _undone(own: pd.DataFrame, found: pd.DataFrame) -> str:
    columns = ["method", "rho", "dose", "scale of the logits", "entropy", "norm of the logits", "log tr H minus AdamW's"]
    columns += ["fitted", "undone"]
    rows = []
    by = found.set_index("method")
    for method, part in own.groupby("method", sort=False):
        trained, fitted = (part[part.state == state].sort_values("seed") for state in STATES)
        scale = estimate(list(fitted.scale))
        rho, dose = trained.rho.iloc[0], trained.dose.mean()
        cells = [style.METHOD_LABEL[str(method)], "" if pd.isna(rho) else f"{rho:g}", "" if math.isnan(dose) else f"{dose:.2g}"]
        cells += [interval(scale.mean, scale.half_width, 3)]
        cells += [
            f"{number(trained[field].mean(), 3)}, fitted {number(fitted[field].mean(), 3)}" for field in ("entropy", "logit_norm")
        ]
        if method in by.index:
            row = by.loc[method]
            cells += [interval(row.b, row.b_half, 3, sign=True), interval(row.a, row.a_half, 3, sign=True)]
            cells += [f"{_fraction(row)}, {row.verdict}" if row.b < 0 else row.verdict]
        else:
            cells += ["", "", ""]
        rows.append(cells)
    return markdown.table(columns, rows, text=["undone"])


def _matched(found: pd.DataFrame) -> str:
    rows = []
    for row in found.itertuples():
        b, a = row.matched_b, row.matched_a
        undone = number((b - a) / b, 2) if row.matched_n and b else ""
        rows.append([style.METHOD_LABEL[row.method], row.matched_n, number(b, 3, sign=True), number(a, 3, sign=True), undone])
    columns = ["method", "seeds matched", "log tr H minus AdamW's at the same loss", "fitted, at the same fitted loss", "undone"]
    return markdown.table(columns, rows)


def _ranking(taus: pd.DataFrame) -> str:
    columns = ["measure"]
    for title in STATES.values():
        columns += [f"tau {title}", "error (seeds)", "error (methods)", "reading"]
    by = taus.set_index(["field", "state"])
    rows = []
    for field, name in RANKED.items():
        cells = [name]
        for state in STATES:
            row = by.loc[(field, state)]
            cells += [number(row.tau, 2, sign=True), number(row.stderr_seeds, 2), number(row.stderr_methods, 2), row.reading]
        rows.append(cells)
    return markdown.table(columns, rows, text=["reading"])
