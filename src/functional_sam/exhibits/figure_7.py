"""figure-7: every method and variant in one sorted forest, at equal steps and at equal compute; and what a step costs."""

import math
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from functional_sam.exhibits import style
from functional_sam.exhibits.comparison import label, left_out, of_part, plan, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.table_8 import equal_compute, same_setting
from functional_sam.records.released import results_directory
from functional_sam.study.compare import Estimate
from functional_sam.study.report import difference, frame, judge

__all__ = ["draw", "headline", "plan"]

CASE = "decoder-quick"  # of results/benchmark/time.csv
TIMED_AS = {
    "looksam": "looksam k=5",
    "adaptive-functional-sam": "functional-sam",
    "fisher-functional-sam": "functional-sam",
    "functional-sam-lr": "functional-sam",
    "sam-lr": "sam",
    "sam-warmup": "sam",
}
LINEAR = 0.01  # nats


def draw(plan: Plan) -> Exhibit:
    """A row a method, best at equal steps first: filled at equal steps, hollow at equal compute; right its time over AdamW's."""
    margin = plan.content[0].study.margin
    data = forest(plan, margin)
    style.use()
    figure, (axis, cost) = plt.subplots(
        1, 2, figsize=(style.PAGE, 0.2 * len(data) + 0.9), sharey=True, gridspec_kw={"width_ratios": [3, 1]}
    )
    for place, row in enumerate(data.itertuples()):
        color = style.METHOD_COLOR.get(row.entry, "#666666")
        for key, fill in (("equal_steps", color), ("equal_compute", "none")):
            found = Estimate(getattr(row, key), getattr(row, f"{key}_stderr"), row.n)
            if math.isfinite(found.mean):
                axis.errorbar(
                    found.mean, place, xerr=found.half_width, color=color, marker="o", markerfacecolor=fill, elinewidth=0.8
                )
        cost.plot([row.cost], [place], "o", color=color)
    axis.axvline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    axis.set_xscale("symlog", linthresh=LINEAR)
    axis.set(yticks=range(len(data)), yticklabels=data.name, xlabel="test loss minus AdamW's (nats per token)")
    axis.invert_yaxis()
    cost.set(xlabel="time of a step /\nAdamW's")
    cost.axvline(1.0, color="#bbbbbb", linewidth=0.6, zorder=0)
    figure.tight_layout()
    finding = f"{headline(data)[0].upper()}{headline(data)[1:]}."
    cells = frame(of_part(plan.content, "fixed", "compute", "variants"), plan.source)
    caption = (
        f"{finding} Filled: equal steps; hollow: AdamW given the time that the method takes; linear within {LINEAR:g} nats, "
        f"logarithmic beyond; times are those of results/benchmark/time.csv ({CASE}). {setting(plan, cells)}{left_out(plan)}"
    )
    return Exhibit(plan, {"": data}, caption, finding, figure)


def headline(data: pd.DataFrame) -> str:
    """Which methods are better than AdamW, in a few words."""
    found = {}
    for key in ("verdict", "verdict_compute"):
        found[key] = [row.name for row in data.itertuples() if str(getattr(row, key)).startswith("better")]
    steps, compute = (", ".join(found[key]) or "none" for key in ("verdict", "verdict_compute"))
    return f"better than AdamW at equal steps: {steps}; at equal compute: {compute}"


def forest(plan: Plan, margin: float) -> pd.DataFrame:
    """One row a method: differences at equal steps and at equal compute, verdicts of each (Holm over the rows), time of a step."""
    times = pd.read_csv(results_directory() / "benchmark" / "time.csv")
    times = times[times.case == CASE].set_index("method")
    cells = of_part(plan.content, "compute", "fixed", "variants")
    alone = of_part(plan.content, "compute") or cells[:1]  # the setting that the others are compared in
    cells = [one for one in cells if one.cell.part == "variants" or one in alone or same_setting(one, alone[0])]
    compute = (
        judge(equal_compute(plan.content, plan.source), margin).set_index("entry") if alone[0].cell.part == "compute" else None
    )
    equal = judge(frame(cells, plan.source), margin)
    rows: list[dict[str, Any]] = []
    for row in equal[~equal.method.isin(["adamw"])].itertuples():
        found = difference(row)
        own = compute.loc[row.entry] if compute is not None and row.entry in compute.index else None
        timed = TIMED_AS.get(str(row.entry), str(row.entry))
        rows.append(
            {
                "entry": row.entry,
                "name": label(row.entry, row.label),
                "rho": row.rho,
                "n": found.n,
                "equal_steps": found.mean,
                "equal_steps_stderr": found.stderr,
                "verdict": row.verdict_baseline,
                "equal_compute": math.nan if own is None else own.minus_baseline,
                "equal_compute_stderr": math.nan if own is None else own.minus_baseline_stderr,
                "verdict_compute": "" if own is None else own.verdict_baseline,
                "cost": float(times.ratio[timed]) if timed in times.index else math.nan,
            }
        )
    return pd.DataFrame(rows).sort_values("equal_steps", ignore_index=True)
