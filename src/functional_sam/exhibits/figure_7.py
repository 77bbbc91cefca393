"""figure-7: every method and variant in one sorted forest, at equal steps and at equal compute; and what a step costs."""

import math
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from functional_sam.errors import UserError
from functional_sam.exhibits import style
from functional_sam.exhibits.comparison import label, left_out, of_part, setting, would_have_seen
from functional_sam.exhibits.cost import cost_figure
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.table_8 import equal_compute, has_a_place, plan, same_setting
from functional_sam.exhibits.words import answer, sentence, tally
from functional_sam.records.released import results_directory
from functional_sam.study.compare import Estimate, Verdict
from functional_sam.study.report import difference, frame, judge

__all__ = ["draw", "has_a_place", "headline", "plan"]

CASE = "decoder-quick"  # of results/benchmark/time.csv
TIMED_AS = {
    "looksam": "looksam k=5",
    "adaptive-functional-sam": "functional-sam",
    "fisher-functional-sam": "functional-sam",
    "functional-sam-lr": "functional-sam",
    "sam-after-warmup": "sam",
    "sam-lr": "sam",
    "sam-warmup": "sam",
}
LINEAR = 0.01  # nats


def draw(plan: Plan) -> Exhibit:
    """Two marks a method, best first: filled at equal steps, hollow at equal compute; right its time over AdamW's."""
    margin = plan.content[0].study.margin
    data = forest(plan, margin)
    style.use()
    figure, (axis, cost) = plt.subplots(
        1, 2, figsize=(style.PAGE, 0.3 * len(data) + 1.1), sharey=True, gridspec_kw={"width_ratios": [4, 1]}
    )
    sides = (("equal_steps", True, -0.16), ("equal_compute", False, 0.16))
    for place, row in enumerate(data.itertuples()):
        for key, filled, aside in sides:
            found = Estimate(getattr(row, key), getattr(row, f"{key}_stderr"), row.n)
            style.marks(axis, [place + aside], [found], row.entry, horizontal=True, filled=filled)
        cost.plot([row.cost], [place], style.marker(row.entry), color=style.color(row.entry))
    for filled, words in ((True, "at equal steps"), (False, "against AdamW given the same time")):
        face = style.OTHER_COLOR if filled else "white"
        axis.plot([], [], "o", color=style.OTHER_COLOR, markerfacecolor=face, label=words)
    axis.axvline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    axis.set(yticks=range(len(data)), yticklabels=data.name, xlabel="test loss minus AdamW's (nats per token)")
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    style.signed_log(axis, LINEAR, "x")
    cost.set(xlabel="time of a step /\nAdamW's", xlim=(0.9, 1.05 * data.cost.max()))
    cost.axvline(1.0, color="#bbbbbb", linewidth=0.6, zorder=0)
    cost.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.legend(*axis.get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    style.finding_above(figure, sentence(headline(data)))
    cells = frame(of_part(plan.content, "fixed", "compute", "variants"), plan.source)
    caption = (
        f"{sentence(headline(data))} Bars are 95 % intervals of paired differences, linear within {LINEAR:g} nats, logarithmic "
        f"beyond; times are those of results/benchmark/time.csv ({CASE}), which figure-7-cost shows. "
        f"{setting(plan, cells)}{_seen(data)}{left_out(plan)}"
    )
    finding = f"Against AdamW at equal steps: {tally(data.verdict)}; at equal compute: {tally(data.verdict_compute)}."
    said = answer(data.verdict_compute, Verdict.WORSE)
    more = {"cost": cost_figure(pd.read_csv(results_directory() / "benchmark" / "time.csv"))}
    return Exhibit(plan, {"": data}, caption, finding, figure, answer=said, more=more)


def _seen(data: pd.DataFrame) -> str:
    sides = (("equal_steps", "verdict"), ("equal_compute", "verdict_compute"))
    found = [
        (Estimate(getattr(row, key), getattr(row, f"{key}_stderr"), row.n), getattr(row, word))
        for key, word in sides
        for row in data.itertuples()
    ]
    return would_have_seen(one.detectable for one, word in found if word == Verdict.OPEN)


def _require_one_row_each(data: pd.DataFrame) -> None:
    """Raise UserError where an entry would stand twice in the forest, such as in two cells: its row would have two values."""
    twice = data[data.entry.duplicated(keep=False)]
    if len(twice):
        own = twice[twice.entry == twice.entry.iloc[0]]
        raise UserError(
            f"figure-7: {own.entry.iloc[0]} is reported {len(own)} times (cells {', '.join(dict.fromkeys(own.cell))}), and has one "
            "row: let one cell of the study alone report it, one trial of it"
        )


def headline(data: pd.DataFrame) -> str:
    """How many methods are better than AdamW at equal steps, and how AdamW given their time compares, in a few words."""
    steps, compute = ([word for word in data[key] if isinstance(word, str) and word] for key in ("verdict", "verdict_compute"))
    better, worse = (sum(word.startswith(verdict) for word in compute) for verdict in ("worse", "better"))
    ahead = sum(word.startswith("better") for word in steps)
    given = f"; AdamW given the time: better than {better} of {len(compute)}, worse than {worse}" if compute else ""
    return f"better than AdamW at equal steps: {ahead} of {len(steps)}{given}"


def forest(plan: Plan, margin: float) -> pd.DataFrame:
    """One row a method: differences at equal steps and at equal compute, their verdicts (Holm over all shown), time of a step."""
    times = pd.read_csv(results_directory() / "benchmark" / "time.csv")
    times = times[times.case == CASE].set_index("method")
    cells = of_part(plan.content, "compute", "fixed", "variants")
    alone = of_part(plan.content, "compute") or cells[:1]  # the setting that the others are compared in
    cells = [one for one in cells if one.cell.part == "variants" or one in alone or same_setting(one.cell, alone[0].cell)]
    steps = frame(cells, plan.source)
    steps = steps[steps.method.ne("adamw")]
    given = equal_compute(plan.content, plan.source) if alone[0].cell.part == "compute" else steps[:0]
    for shown in (steps, given):
        _require_one_row_each(shown)
    both = judge(pd.concat([steps, given], ignore_index=True), margin)
    equal, compute = both[: len(steps)], both[len(steps) :].set_index("entry")
    rows: list[dict[str, Any]] = []
    for row in equal.itertuples():
        found = difference(row)
        own = compute.loc[row.entry] if row.entry in compute.index else None
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
