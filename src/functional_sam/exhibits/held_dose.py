"""figure-2 by batch: the harm of each half at equal size, as sampling noise shrinks (paper/PROTOCOL.md, "Held dose by batch")."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from functional_sam.config import Config, compose
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import at_the_end, by_targets
from functional_sam.study.compare import Estimate, judged, paired_difference

# What is compared: its name in the table, and how the figure draws it.
AGAINST_LOGIT, FUNCTIONAL, LOGIT = "functional minus logit half", "functional half minus AdamW", "logit half minus AdamW"
LOOKS = {FUNCTIONAL: {"linestyle": "-"}, LOGIT: {"linestyle": "--", "marker": "s"}}


def configs_of(spec: Spec, cell: dict[str, Any], overrides: tuple[str, ...]) -> list[Config]:
    """AdamW, which measures the noise of its batch, and Angle-SAM's two halves at the cell's dose; seeds first."""
    task, rows = cell["task"], {"training": {name: cell[name] for name in ("batch", "micro_batch")}}
    noise = {"points": 2, "targets": [cell["targets"]], "ascents": ["gradient"], "micro_batch": cell["micro_batch"]}
    configs = []
    for seed in cell["seeds"]:
        layers = [*spec.layers(task, seed, **cell["settings"]), rows]
        configs.append(compose(task, "adamw", spec.scale, [*layers, {"measure": noise}], overrides))
        for phi in (min(spec.phi), max(spec.phi)):
            method = {"method": {"options": {"phi": phi, "dose": cell["dose"]}}}
            configs.append(compose(task, "angle-sam", spec.scale, [*layers, method], overrides))
    return configs


def by_batch(data: pd.DataFrame, margin: float) -> pd.DataFrame:
    """D, loss of the functional half minus the logit half's, at each number of rows: one family; and each half minus AdamW.

    data: figure_2.frame of the cells, of one task and dose.
    """
    rows = []
    for batch, part in data.groupby("batch"):
        ordered = part.sort_values("seed")
        adamw, angles = list(ordered[ordered.phi.isna()].value), ordered[ordered.phi.notna()]
        functional, logit = (list(angles[angles.phi == phi].value) for phi in (angles.phi.min(), angles.phi.max()))
        for what, ours, theirs in ((AGAINST_LOGIT, functional, logit), (FUNCTIONAL, functional, adamw), (LOGIT, logit, adamw)):
            found = paired_difference(ours, theirs)
            row = {"batch": batch, "what": what, "n": found.n, "difference": found.mean, "stderr": found.stderr}
            rows.append(row | {"half_width": found.half_width})
    table = pd.DataFrame(rows)
    table["verdict"] = ""  # of the halves minus AdamW there is none: they are described
    family = table[table.what == AGAINST_LOGIT]
    estimates = [Estimate(row.difference, row.stderr, row.n) for row in family.itertuples()]
    table.loc[family.index, "verdict"] = list(map(str, judged(estimates, margin=margin)))
    return table


def noise_by_batch(plan: Plan, configs: list[Config]) -> pd.DataFrame:
    """One row per number of rows: its targets, and the part of |H_F eps|^2 that is sampling noise at AdamW's last step.

    eps is of an independent batch; noise is one minus the ratio of two means over seeds, of <d_1, d_2> over the halves of the batch
    and of |d|^2 (curvature/halves.py); above 1 where the former came out negative.
    """
    adamw = [config for config in configs if config.method.name == "adamw"]
    data = by_targets(dataclasses.replace(plan, configs=adamw), lambda config: {"batch": config.training.batch})
    end = at_the_end(data, adamw[0].task).query("origin == 'independent'")
    rows = []
    for batch, part in end.groupby("batch"):
        noise = 1.0 - float(part.square_func.mean() / (part.norm_func**2).mean())
        rows.append({"batch": batch, "targets": int(part.targets.iloc[0]), "noise_func": noise})
    return pd.DataFrame(rows)


def draw_by_batch(column: Iterable[Axes], table: pd.DataFrame, dose: float) -> None:
    """Above both halves minus AdamW, below the one minus the other, against targets a step and the noise in H_F eps."""
    above, below = column
    for axis in (above, below):
        axis.axhline(0.0, color=style.METHOD_COLOR["adamw"])
        axis.set_xscale("log", base=2)
    look: dict[str, Any] = {"color": style.METHOD_COLOR["angle-sam"], "marker": "o"}
    for beside, (what, other) in zip((0.94, 1.06), LOOKS.items(), strict=True):
        own = table[table.what == what]
        label = what.removesuffix(" minus AdamW")
        above.errorbar(own.targets * beside, own.difference, own.half_width, **look | other, label=label)
    own = table[table.what == AGAINST_LOGIT]
    below.errorbar(own.targets, own.difference, own.half_width, **look, markerfacecolor="white")
    told = own[own.verdict.str.startswith(("better", "worse"))]
    below.plot(told.targets, told.difference, **look, linestyle="", zorder=3)
    below.set_xticks(list(own.targets), [f"{row.targets / 1000:.0f}k\n{row.noise_func:.2f}" for row in own.itertuples()])
    below.minorticks_off()
    above.set(title=f"Language by batch\n(dose {dose:g})", ylabel="loss minus AdamW's")
    above.legend(fontsize=6)
    below.set(xlabel="targets a step;\nnoise in $|H_F\\epsilon|^2$", ylabel="functional minus\nlogit half")


def in_words(table: pd.DataFrame, dose: float, steps: int) -> str:
    """D at each batch, with its verdict and the noise there."""
    if table.empty:
        return ""
    each = [
        f"{interval(row.difference, row.half_width, sign=True)} at {row.targets:,} targets (n={row.n}, noise {row.noise_func:.2f}, "
        f"{row.verdict})"
        for row in table[table.what == AGAINST_LOGIT].itertuples()
    ]
    return f"by batch, functional minus logit half after {steps} steps at dose {dose:g}: {', '.join(each)}"
