"""figure-2 by batch: the harm of each part at equal size, as sampling noise shrinks (paper/PROTOCOL.md, "Held dose by batch")."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from functional_sam.config import Config
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import by_targets
from functional_sam.study.compare import Estimate, judged, paired_difference

# What is compared: its name in the table, and how the figure draws it.
AGAINST_LOGIT, FUNCTIONAL, LOGIT = "functional minus logit part", "functional part minus AdamW", "logit part minus AdamW"
AGAINST_SMALLEST = "functional minus logit part, minus that at the fewest rows"
LOOKS = {
    FUNCTIONAL: {"linestyle": "-", "color": style.METHOD_COLOR["functional-sam"]},
    LOGIT: {"linestyle": "--", "marker": "s", "color": style.METHOD_COLOR["logit-sam"]},
}


def configs_of(spec: Spec, cell: dict[str, Any], overrides: tuple[str, ...]) -> list[Config]:
    """AdamW, which measures the noise of its batch, and Angle-SAM's two parts at the cell's dose; seeds first."""
    task, rows = cell["task"], {"training": {name: cell[name] for name in ("batch", "micro_batch")}}
    noise = {"points": 2, "targets": [cell["targets"]], "ascents": ["gradient"], "micro_batch": cell["micro_batch"]}
    configs = []
    for seed in cell["seeds"]:
        configs.append(spec.run(task, "adamw", seed, overrides, cell["settings"], {"measure": noise}, **rows))
        for phi in (min(spec.phi), max(spec.phi)):
            method = {"options": {"phi": phi, "dose": cell["dose"]}}
            configs.append(spec.run(task, "angle-sam", seed, overrides, cell["settings"], method=method, **rows))
    return configs


def by_batch(data: pd.DataFrame, margin: float) -> pd.DataFrame:
    """D, loss of the functional part minus the logit part's, at each number of rows: one family; and what is described beside it.

    That is each part minus AdamW, and D minus D at the fewest rows, paired by seed. data: figure_2.frame of the cells, of one task
    and dose.
    """
    rows = []
    losses = data.assign(phi=data.phi.fillna(-1.0)).pivot(index=["batch", "seed"], columns="phi", values="value")  # -1: AdamW
    adamw, functional, logit = (losses[phi] for phi in sorted(losses.columns))
    fewest = data.batch.min()
    for batch in sorted(set(data.batch)):
        sides = {AGAINST_LOGIT: (functional[batch], logit[batch])}
        sides |= {FUNCTIONAL: (functional[batch], adamw[batch]), LOGIT: (logit[batch], adamw[batch])}
        if batch != fewest:
            seeds = functional[batch].index  # the most rows have fewer
            sides[AGAINST_SMALLEST] = (functional[batch] - logit[batch], (functional[fewest] - logit[fewest])[seeds])
        for what, (ours, theirs) in sides.items():
            found = paired_difference(list(ours), list(theirs))
            row = {"batch": batch, "what": what, "n": found.n, "difference": found.mean, "stderr": found.stderr}
            rows.append(row | {"half_width": found.half_width})
    table = pd.DataFrame(rows)
    table["verdict"] = ""  # of what is described there is none
    family = table[table.what == AGAINST_LOGIT]
    estimates = [Estimate(row.difference, row.stderr, row.n) for row in family.itertuples()]
    table.loc[family.index, "verdict"] = list(map(str, judged(estimates, margin=margin)))
    return table


def noise_by_batch(plan: Plan, configs: list[Config]) -> pd.DataFrame:
    """One row per number of rows: its targets, and the part of |H_F eps|^2 that is sampling noise at AdamW's first and last step.

    eps is of an independent batch; noise is one minus the ratio of two means over seeds, of <d_1, d_2> over the halves of the batch
    and of |d|^2 (curvature/halves.py); above 1 where the former came out negative.
    """
    adamw = [config for config in configs if config.method.name == "adamw"]
    data = by_targets(dataclasses.replace(plan, configs=adamw), lambda config: {"batch": config.training.batch})
    data = data[data.origin == "independent"]
    rows = []
    for batch, own in data.groupby("batch"):
        steps = [own[own.step == step] for step in (own.step.min(), own.step.max())]
        first, last = (1.0 - float(at.square_func.mean() / (at.norm_func**2).mean()) for at in steps)
        rows.append({"batch": batch, "targets": int(own.targets.iloc[0]), "noise_func_first": first, "noise_func": last})
    return pd.DataFrame(rows)


def draw_by_batch(column: Iterable[Axes], table: pd.DataFrame, dose: float, steps: int) -> None:
    """Above both parts minus AdamW, below the one minus the other, against targets a step and the noise in H_F eps.

    Hollow where nothing is tested or nothing is significant.
    """
    above, below = column
    for axis in (above, below):
        axis.axhline(0.0, color=style.METHOD_COLOR["adamw"])
        axis.set_xscale("log", base=2)
    look: dict[str, Any] = {"color": style.METHOD_COLOR["angle-sam"], "marker": "o", "markerfacecolor": "white"}
    for beside, (what, other) in zip((0.94, 1.06), LOOKS.items(), strict=True):
        own = _drawn(table[table.what == what])
        label = what.removesuffix(" minus AdamW")
        above.errorbar(own.targets * beside, own.difference, own.half_width, **look | other, label=label)
    own = table[table.what == AGAINST_LOGIT]
    bars = _drawn(own)
    below.errorbar(bars.targets, bars.difference, bars.half_width, **look)
    significant = own[own.verdict.str.startswith(("better", "worse"))]
    below.plot(significant.targets, significant.difference, **look | {"markerfacecolor": look["color"]}, linestyle="", zorder=3)
    noise = [f"{row.noise_func_first:.2f} to\n{row.noise_func:.2f}" for row in own.itertuples()]
    below.set_xticks(
        list(own.targets), [f"{row.targets / 1000:.0f}k\n{words}" for row, words in zip(own.itertuples(), noise, strict=True)]
    )
    below.minorticks_off()
    n = "/".join(str(one) for one in sorted(set(own.n), reverse=True))
    above.set(title=f"Language by batch\n(dose {dose:g}, {steps} steps, n = {n})", ylabel="loss minus AdamW's")
    low, high = above.get_ylim()
    above.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    above.legend(fontsize=6, loc="upper right")
    below.set(xlabel="targets a step; noise in $|H_F\\epsilon|^2$,\nfirst to last step", ylabel="functional minus\nlogit part")


def _drawn(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a mean that can be drawn, those without an interval without a bar."""
    finite = rows[np.isfinite(rows.difference)]
    return finite.assign(half_width=[style.bar(half) for half in finite.half_width])


def in_words(table: pd.DataFrame, dose: float, steps: int) -> str:
    """D at each batch, with its verdict, its difference to the first and the noise there."""
    if table.empty:
        return ""
    more = table[table.what == AGAINST_SMALLEST].set_index("batch")
    each = []
    for row in table[table.what == AGAINST_LOGIT].itertuples():
        words = f"{row.verdict}, n={row.n}, noise {row.noise_func_first:.2f} at the first step, {row.noise_func:.2f} at the last"
        if row.batch in more.index:
            other = more.loc[row.batch]
            words += f", minus that of the fewest targets {interval(other.difference, other.half_width, sign=True)}"
        each.append(f"{interval(row.difference, row.half_width, sign=True)} at {row.targets:,} targets ({words})")
    return f"by batch, functional minus logit part after {steps} steps at dose {dose:g}: {'; '.join(each)}"


def significant(table: pd.DataFrame) -> list[str]:
    """Where D is significant, in a few words each."""
    own = table[(table.what == AGAINST_LOGIT) & table.verdict.str.startswith(("better", "worse"))] if len(table) else table
    return [f"language at {row.targets:,} targets a step (functional part {row.verdict})" for row in own.itertuples()]
