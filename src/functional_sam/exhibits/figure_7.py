"""figure-7: gain against measured cost: test loss minus AdamW's at equal steps, over time per step as a ratio to AdamW's."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits import style, table_8
from functional_sam.exhibits.comparison import label, rows
from functional_sam.exhibits.output import Exhibit, save_figure, save_frame
from functional_sam.exhibits.regime_table import opening
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.study import Study, load_study
from functional_sam.records.released import results_directory

CASE = "decoder-quick"  # of results/benchmark/time.csv
TIMED_AS = {"looksam": "looksam k=5", "adaptive-functional-sam": "functional-sam", "fisher-functional-sam": "functional-sam"}

MARKERS = ("s", "^", "v", "D", "P", "X", "<", ">", "p", "h")  # of the methods without a colour of their own


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The runs of table-8."""
    return table_8.plan(spec, overrides)


def frame(study: Study, found: table_8.Parts) -> pd.DataFrame:
    """One row a method: gain at equal steps (minus_adamw, negative is better), and cost; AdamW with more steps costs those."""
    times = pd.read_csv(results_directory() / "benchmark" / "time.csv")
    times = times[times.case == CASE].set_index("method")
    assert found.cheap is not None
    adamw = found.main.reported["adamw"]
    out = []
    for one in [some for some in (found.main, found.cheap, found.variants) if some]:
        for row in rows(one):
            name = row["method"]
            if name == "adamw":
                continue
            time = times.loc[TIMED_AS.get(name, name)]
            compared = table_8.against(one.reported[name], adamw, "AdamW")
            out.append(_row(name, compared, row["diverged"], (time.ratio, time.ratio_q1, time.ratio_q3)))
    for factor, one in found.longer.items():
        compared = table_8.against(one.reported["adamw"], adamw, "AdamW")
        out.append(_row(f"adamw {factor:g} x", compared, 0, (factor, factor, factor)))
    return pd.DataFrame(out)


def _row(name: str, compared: dict[str, float], diverged: int, cost: tuple[float, float, float]) -> dict[str, object]:
    row = {"method": name, "n": compared["n_baseline"], "diverged": diverged, "verdict": compared["verdict_baseline"]}
    row |= {"minus_adamw": compared["minus_baseline"], "minus_adamw_stderr": compared["minus_baseline_stderr"]}
    return row | dict(zip(("cost", "cost_q1", "cost_q3"), cost, strict=True))


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """One point a method, and the line of AdamW with more steps: below it, a method is worth its time."""
    study = load_study(spec, spec.command)
    found = table_8.parts(study)
    data = frame(study, found)
    style.use()
    figure, axis = plt.subplots(figsize=(style.PAGE, 3.2))
    line = data[data.method.str.startswith("adamw")].sort_values("cost")
    black = style.METHOD_COLOR["adamw"]
    axis.plot([1.0, *line.cost], [0.0, *line.minus_adamw], color=black, marker="o", label="AdamW with more steps")
    points = data[~data.method.str.startswith("adamw") & np.isfinite(data.minus_adamw)].sort_values(["cost", "minus_adamw"])
    for number, row in enumerate(points.itertuples(), start=1):
        color = style.METHOD_COLOR.get(str(row.method), "#888888")
        marker = "o" if str(row.method) in style.METHOD_COLOR else MARKERS[number % len(MARKERS)]
        spread = [[max(0.0, row.cost - row.cost_q1)], [max(0.0, row.cost_q3 - row.cost)]]
        error = row.minus_adamw_stderr
        text = label(str(row.method))
        axis.errorbar(
            row.cost, row.minus_adamw, error, spread, color=color, marker=marker, linestyle="none", elinewidth=0.6, label=text
        )
    axis.axhline(0.0, color=black, linewidth=0.6, linestyle=":")
    axis.set(xlabel="time per step / AdamW's (AdamW: number of steps)", ylabel="test loss minus AdamW's\n(nats/token, paired)")
    style.signed_log(axis, 0.01)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6)
    figure.tight_layout()
    lost = [label(str(row.method)) for row in data.itertuples() if row.diverged]
    caption = (
        f"{opening(spec, [found.main])} {found.main.lr.configs[0].training.steps} steps. Gain at equal steps (below zero: better; "
        "means and standard errors of paired differences) against the time of a step, median and quartiles of "
        f"results/benchmark/time.csv ({CASE}; the two variants of Functional-SAM as Functional-SAM). Black: AdamW with that many "
        "times the steps, its learning rate tuned again: a method below this line is worth its time. "
        "Linear within 0.01, logarithmic beyond."
        + ("" if found.variants else " The variants of table-8 are not shown, because their runs are not complete.")
        + (f" With diverged runs, not shown: {', '.join(lost)}." if lost else "")
    )
    return Exhibit([*save_figure(spec, figure), save_frame(spec, data)], caption, _words(study, found), data, figure)


def _words(study: Study, found: table_8.Parts) -> str:
    """Of each method, the difference to AdamW with the time it takes."""
    assert found.cheap is not None
    sentences = []
    for one, names in ((found.main, [n for n in study.methods if n != "adamw"]), (found.cheap, list(study.cheap))):
        for name in names:
            base = found.longer[study.compute.get(name, 2.0)].reported["adamw"]
            compared = table_8.against(one.reported[name], base, "")
            word = compared["verdict_baseline"]
            sentences.append(f"{label(name)} {compared['minus_baseline']:+.4f} +- {compared['minus_baseline_stderr']:.4f} ({word})")
    return f"Against AdamW given the same time (paired, 95 %, n={len(study.middle_seeds)}): {'; '.join(sentences)}."
