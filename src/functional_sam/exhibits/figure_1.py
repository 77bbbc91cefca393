"""figure-1: shares of delta_logit and delta_func of the sharpness gradient through AdamW training, language beside vision."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D

from functional_sam.config import Config, compose
from functional_sam.exhibits import style
from functional_sam.exhibits.output import Exhibit, save_figure, save_frame
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import Estimate, estimate
from functional_sam.exhibits.words import data_name, sizes
from functional_sam.records import Run

ASCENTS = {"gradient": "gradient ascent (SAM)", "adam": "Adam ascent (Precond)"}


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """AdamW on each task, each seed (of initialization and data order), with the decomposition measured on the way."""
    return [
        compose(task, "adamw", spec.scale, [spec.overrides, {"training": {"init_seed": seed, "data_seed": seed}}], overrides)
        for seed in spec.seeds
        for task in spec.tasks
    ]


def frame(configs: list[Config]) -> pd.DataFrame:
    """One row per task, seed, step and ascent."""
    rows = []
    for config in configs:
        for line in Run(config).metrics("decompose"):
            for ascent in config.measure.ascents:
                rows.append(
                    {"task": config.task, "seed": config.training.init_seed, "step": line["step"], "ascent": ascent, **line[ascent]}
                )
    return pd.DataFrame(rows)


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """Two rows (share, cosine), one column per task; bands are standard errors over seeds."""
    data = frame(configs)
    data["share_logit"] = 1.0 - data["share"]
    style.use()
    figure, axes = plt.subplots(2, len(spec.tasks), figsize=(style.PAGE, 3.6), sharex="col", sharey="row", squeeze=False)
    dashes: dict[str, Any] = {"gradient": "-", "adam": "--"}
    for column, task in enumerate(spec.tasks):
        share, cosine = axes[:, column]
        for ascent, dash in dashes.items():
            part = data[(data.task == task) & (data.ascent == ascent)]
            for field, name in (("share", "functional"), ("share_logit", "logit")):
                color = style.PART_COLOR[name]
                sns.lineplot(
                    part, x="step", y=field, ax=share, color=color, linestyle=dash, errorbar="se", marker="o", legend=False
                )
            sns.lineplot(
                part, x="step", y="cosine", ax=cosine, color="#555555", linestyle=dash, errorbar="se", marker="o", legend=False
            )
        name = data_name(next(config for config in configs if config.task == task))
        share.set(xscale="log", ylim=(0, 1), title=f"{style.TASK_LABEL.get(task, task)} ({name})", ylabel="share of the two norms")
        cosine.set(xscale="log", ylim=(-1, 1), xlabel="AdamW step", ylabel=r"cosine of $\delta_{logit}$, $\delta_{func}$")
        cosine.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    parts = [
        Line2D([], [], color=style.PART_COLOR["logit"], label=r"$\delta_{logit} = H_G\,\epsilon$"),
        Line2D([], [], color=style.PART_COLOR["functional"], label=r"$\delta_{func} = H_F\,\epsilon$"),
    ]
    lines = [Line2D([], [], color="#555555", linestyle=dashes[a], label=label) for a, label in ASCENTS.items()]
    figure.legend(handles=parts + lines, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.04))
    figure.align_ylabels()
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    caption, verdict = _words(spec, configs, data)
    return Exhibit([*save_figure(spec, figure), save_frame(spec, data)], caption, verdict, data, figure)


def _words(spec: Spec, configs: list[Config], data: pd.DataFrame) -> tuple[str, str]:
    ends = []
    for task in spec.tasks:
        last = data[(data.task == task) & (data.step == data[data.task == task].step.max())]
        shares = {ascent: estimate(list(last[last.ascent == ascent].share_logit)) for ascent in ASCENTS}
        ends.append((task, shares))
    n = len(spec.seeds)
    caption = (
        "Logit and functional part of the sharpness gradient H eps = H_G eps + H_F eps during AdamW training: |part| / (sum of "
        "both norms), and the cosine between the two, on a fixed held-out batch, under the gradient and under the Adam ascent. "
        f"Mean over n={n} seeds, bands are one standard error. Scale {spec.scale}, not the paper's: {sizes(configs)}."
    )
    verdict = "logit share |delta_logit| / (|delta_logit| + |delta_func|) at the end: " + "; ".join(
        f"{task} " + ", ".join(f"{ascent} {value.mean:.2f} +- {value.stderr:.2f}" for ascent, value in shares.items())
        for task, shares in ends
    )
    return caption, f"{verdict} (n={n}). {_reading(ends)}"


def _reading(ends: list[tuple[str, dict[str, Estimate]]]) -> str:
    """Whether the logit part is the larger one in language, as the paper says, by more than two standard errors."""
    claims = []
    for task, shares in ends:
        value = shares["gradient"]
        margin = 2 * value.stderr
        side = (
            "dominates" if value.mean - margin > 0.5 else "is the smaller part" if value.mean + margin < 0.5 else "is inconclusive"
        )
        claims.append(f"in {task} the logit part {side}")
    return "Under the gradient ascent, " + ", ".join(claims) + "."
