"""figure-1: shares of delta_logit and delta_func of the sharpness gradient through AdamW training, language beside vision."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D

from functional_sam.config import compose
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval, number
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import at_the_end, decompositions, firsts, rows, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, estimate
from functional_sam.tasks import TASKS

ASCENTS = {"gradient": "gradient ascent (SAM)", "adam": "Adam ascent (Precond)"}
DASHES: dict[str, Any] = {"gradient": "-", "adam": "--"}


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW on each task, each seed (of initialization and data order), with the decomposition measured on the way."""
    configs = [compose(task, "adamw", spec.scale, spec.layers(task, seed), overrides) for seed in spec.seeds for task in spec.tasks]
    return Plan.of_known_runs(spec, configs, source)


def draw(plan: Plan) -> Exhibit:
    """Two rows (share, cosine), one column per task; bands are 95 % t intervals over seeds."""
    spec, data = plan.spec, decompositions(plan)
    data["share_logit"] = 1.0 - data["share"]
    style.use()
    figure, axes = plt.subplots(2, len(spec.tasks), figsize=(style.PAGE, 3.6), sharex="col", sharey="row", squeeze=False)
    band: dict[str, Any] = {"x": "step", "errorbar": style.t_interval, "marker": "o", "legend": False}
    for column, (task, config) in enumerate(firsts(plan.configs).items()):
        share, cosine = axes[:, column]
        for ascent, dash in DASHES.items():
            part = data[(data.task == task) & (data.ascent == ascent)]
            for field, name in (("share", "functional"), ("share_logit", "logit")):
                sns.lineplot(part, y=field, ax=share, color=style.PART_COLOR[name], linestyle=dash, **band)
            sns.lineplot(part, y="cosine", ax=cosine, color="#555555", linestyle=dash, **band)
        name = TASKS[config.kind].data_name(config)
        share.set(xscale="log", ylim=(0, 1), title=f"{style.TASK_LABEL.get(task, task)} ({name})", ylabel="share of the two norms")
        cosine.set(xscale="log", ylim=(-1, 1), xlabel="AdamW step", ylabel=r"cosine of $\delta_{logit}$, $\delta_{func}$")
        cosine.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    parts = [
        Line2D([], [], color=style.PART_COLOR["logit"], label=r"$\delta_{logit} = H_G\,\epsilon$"),
        Line2D([], [], color=style.PART_COLOR["functional"], label=r"$\delta_{func} = H_F\,\epsilon$"),
    ]
    lines = [Line2D([], [], color="#555555", linestyle=DASHES[a], label=label) for a, label in ASCENTS.items()]
    figure.legend(handles=parts + lines, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.04))
    figure.align_ylabels()
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return Exhibit(plan, {"": data}, _caption(plan, data), _verdict(plan, data), figure)


def headline(data: pd.DataFrame) -> str:
    """What figure and CSV say, in a few words."""
    ends = {task: _ends(data, task)["gradient"].mean for task in data.task.unique()}
    return "logit share at the end " + ", ".join(f"{task} {number(share, 2)}" for task, share in ends.items())


def _ends(data: pd.DataFrame, task: str) -> dict[str, Estimate]:
    """The logit share at the last step, by ascent."""
    last = at_the_end(data, task)
    return {ascent: estimate(list(part.share_logit)) for ascent, part in last.groupby("ascent", sort=False)}


def _caption(plan: Plan, data: pd.DataFrame) -> str:
    shares = " and ".join(f"{_ends(data, task)['gradient'].mean:.0%} in {task}" for task in plan.spec.tasks)
    adam_from = plan.configs[0].measure.adam_from
    return (
        f"At the end of AdamW training delta_logit = H_G eps is {shares} of the sharpness gradient (|delta_logit| / "
        "(|delta_logit| + |delta_func|), gradient ascent). Both parts and the cosine between them are measured on fixed held-out "
        f"rows ({rows(plan.configs)}), under the gradient ascent and, from step {adam_from} on, under Adam's (before, its "
        f"direction is the sign of g, of rounding noise too); scale {plan.spec.scale}, not the paper's: {sizes(plan.configs)}. "
        f"Means over n={len(plan.spec.seeds)} seeds, bands are 95 % t intervals."
    )


def _verdict(plan: Plan, data: pd.DataFrame) -> str:
    ends = {task: _ends(data, task) for task in plan.spec.tasks}
    shares = "; ".join(
        f"{task} " + ", ".join(f"{ascent} {interval(e.mean, e.half_width, 2)}" for ascent, e in found.items())
        for task, found in ends.items()
    )
    sides = ", ".join(f"in {task} the logit part {_side(found['gradient'])}" for task, found in ends.items())
    return (
        f"logit share |delta_logit| / (|delta_logit| + |delta_func|) at the end: {shares} "
        f"(n={len(plan.spec.seeds)}, 95 % t intervals). Under the gradient ascent, {sides}."
    )


def _side(share: Estimate) -> str:
    """Whether the 95 % interval leaves out one half."""
    half = share.half_width
    return "dominates" if share.mean - half > 0.5 else "is the smaller part" if share.mean + half < 0.5 else "is inconclusive"
