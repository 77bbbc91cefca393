"""figure-6: what fine-tuning gains, against the share of the data, and against the functional share of the pretrained model."""

import dataclasses
import math
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import scipy
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from functional_sam.config import Config
from functional_sam.exhibits import comparison, markdown, style
from functional_sam.exhibits.comparison import counted, label
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, metric_label, sentence
from functional_sam.records import Source
from functional_sam.study.compare import Verdict, estimate
from functional_sam.study.design import load_study
from functional_sam.study.report import difference, frame, judge
from functional_sam.study.tune import Planned
from functional_sam.tasks import TASKS

__all__ = ["draw", "headline", "plan"]

MARKERS = ("o", "s", "^")  # one a radius


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """The runs that measure the share, then the cells of the study."""
    found = comparison.plan(spec, source, overrides)
    study = load_study(spec.study, spec.scale, overrides)
    tasks = dict.fromkeys(cell.task for cell in study.part(*spec.parts))
    measured = {task: share_runs(spec, task, study.overrides) for task in tasks}  # without cells=, which is of the study alone
    runs = [config for configs in measured.values() for config in configs]
    drawable = found.drawable and all(source.done(config) for config in runs)
    drawn = [*runs, *(found.drawn or [])]
    return dataclasses.replace(
        found, configs=[*runs, *found.configs], content=(found.content, measured), drawable=drawable, drawn=drawn
    )


def share_runs(spec: Spec, task: str, overrides: tuple[str, ...]) -> list[Config]:
    """One step of AdamW at learning rate 0 a seed, after which the pretrained model with its fresh head is decomposed."""
    return [spec.run(task, "adamw", seed, overrides) for seed in spec.seeds]


def draw(plan: Plan) -> Exhibit:
    """Left the tasks with several shares of the data, right all tasks at the share that they have in common.

    A side whose cells are not complete is not there.
    """
    planned, measured = plan.content
    data = judge(frame(planned, plan.source), planned[0].study.margin)
    data["data_share"] = data.cell.map({one.cell.name: _config(one).data.share for one in planned})
    shares = {task: estimate([functional_share(plan.source, config) for config in configs]) for task, configs in measured.items()}
    data["share"] = [shares[task].mean for task in data.task]
    data["share_stderr"] = [shares[task].stderr for task in data.task]
    data["half_share"] = [shares[task].half_width for task in data.task]
    data = data.drop(columns=["minus_sam", "minus_sam_stderr"])
    if data.rho.nunique() > 1:  # an entry has several radii, and verdicts
        data["label"] = [
            f"{label(row.entry, row.label)} at rho {row.rho:g}" if row.rho > 0 else row.label for row in data.itertuples()
        ]
    common = _several_tasks(data)
    several = data[data.task.isin(data[data.part == "share"].task)]

    style.use()
    sides = [(part, x) for part, x in ((several, "data_share"), (common, "share")) if len(part)]  # whose cells are complete
    figure, panels = plt.subplots(1, len(sides), figsize=(style.PAGE * (1 if len(sides) > 1 else 0.7), 2.7), squeeze=False)
    for axis, (part, x) in zip(panels[0], sides, strict=True):
        axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
        _points(axis, part[part.entry != "adamw"], x)
        axis.set_ylabel(f"{_metric(part)} minus AdamW's{' (points)' if _points_alone(part) else ''}")
        if _points_alone(part):
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}".replace("-", markdown.MINUS))
        if x == "share":
            axis.set(xlabel=r"functional share $|\delta_{func}|/(|\delta_{func}|+|\delta_{logit}|)$, pretrained")
            _shares_below(axis, common)
        else:
            _shares_of_the_data(axis, several)
    style.legend_above(figure, panels[0, -1], columns=4 if len(sides) > 1 else 2)
    style.finding_above(figure, sentence(headline(data)))
    correlations = ranks(common)
    finding = _finding(several, common, correlations)
    could = comparison.seen(data, scale=100, unit="points") if _points_alone(data) else comparison.seen(data)
    caption = f"{finding} {_setting(plan, data, len(common) > 0)}{could}{comparison.left_out(plan_of_cells(plan))}"
    said = answer([_little_against_much(data)], Verdict.BETTER)
    frames = {"": data} | ({"ranks": correlations} if len(correlations) else {})
    return Exhibit(plan, frames, caption, finding, figure, answer=said)


def _several_tasks(data: pd.DataFrame) -> pd.DataFrame:
    """The rows of all tasks at the share that they have in common; none while it is one task, which the other panel shows."""
    common = data[data.part == "tasks"]
    return common.iloc[:0] if common.task.nunique() == 1 and (data.part == "share").any() else common


def _shares_of_the_data(axis: Axes, several: pd.DataFrame) -> None:
    axis.set_xscale("log")
    ticks = sorted(set(several.data_share))
    axis.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(f"share of the training texts ({', '.join(dict.fromkeys(several.task))})")


def _shares_below(axis: Axes, common: pd.DataFrame) -> None:
    """Under the marks a row for each task: its name, its functional share and the 95 % interval over heads."""
    rows = [own.iloc[0] for _, own in common.groupby("task", sort=False)]
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.09 * len(rows) * (high - low), high)  # room for the rows
    left, right = axis.get_xlim()
    for number, row in enumerate(sorted(rows, key=lambda row: row.share)):
        y, ends = 0.03 + 0.065 * number, (row.share - row.half_share, row.share + row.half_share)
        before = row.share > (left + right) / 2  # the name stands where there is room
        axis.plot(ends, [y, y], color="#999999", linewidth=0.8, transform=axis.get_xaxis_transform())
        axis.plot([row.share], [y], "|", color="#777777", transform=axis.get_xaxis_transform())
        axis.text(
            ends[0] - 0.01 if before else ends[1] + 0.01, y, row.task, fontsize=6, color="#555555", va="center",
            ha="right" if before else "left", transform=axis.get_xaxis_transform(),
        )  # fmt: skip


def _metric(part: pd.DataFrame) -> str:
    """What most tasks of a panel are judged by, on the test split; the caption names those that are judged by another measure."""
    words = metric_label(part.metric.mode()[0])
    return f"test {words[0].lower()}{words[1:]}"


def _points_alone(part: pd.DataFrame) -> bool:
    """Whether all are accuracies, which the title has in points."""
    return set(part.metric) == {"accuracy"}


def headline(data: pd.DataFrame) -> str:
    """SAM's gain with the least and the most of the data, and the rank correlation of gain and functional share, in a few words."""
    parts = []
    if ends := _ends(data):
        least, most = (markdown.interval(100 * row.minus_baseline, 100 * difference(row).half_width, 1, sign=True) for row in ends)
        shares = [f"{row.data_share:.0%}" for row in ends]
        which = f" at rho {ends[0].rho:g}" if data.rho.nunique() > 1 else ""
        parts.append(f"SAM{which} minus AdamW {least} points with {shares[0]} of the data, {most} with {shares[1]}")
    words = [f"{label(row.entry)} {_correlation(row)}" for row in ranks(_several_tasks(data)).itertuples()]
    parts += [f"rank correlation of gain and functional share: {', '.join(words)}"] if words else []
    return "; ".join(parts) or "neither several shares of the data nor several tasks are complete"


def _correlation(row: Any) -> str:
    """Of a row of `ranks`: what is all the same, or one task alone, has no order."""
    return "none" if math.isnan(row.correlation) else markdown.number(row.correlation, 2, sign=True)


def _ends(data: pd.DataFrame) -> list[Any]:
    """SAM's rows with the least and with the most of the data, at the smallest radius."""
    own = data[data.task.isin(data[data.part == "share"].task) & data.entry.eq("sam")]
    rows = list(own[own.rho == own.rho.min()].sort_values("data_share").itertuples())
    return [rows[0], rows[-1]] if len(rows) > 1 else []


def _little_against_much(data: pd.DataFrame) -> Verdict | str:
    """Whether SAM gains more with the least of the data, by the protocol's rule: open where the intervals overlap."""
    if not (ends := _ends(data)):
        return ""
    least, most = (difference(row) for row in ends)
    gap = least.mean - most.mean  # nan: runs of both diverged
    if math.isnan(gap) or abs(gap) <= least.half_width + most.half_width:
        return Verdict.OPEN
    return Verdict.BETTER if least.mean > most.mean else Verdict.WORSE


def functional_share(source: Source, config: Config) -> float:
    """|delta_func| / (|delta_func| + |delta_logit|) of the pretrained model, along the gradient."""
    (line,) = source.metrics(config, "decompose")
    return float(line["gradient"]["share"])


def ranks(common: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation over tasks between functional share and gain, a row a method and radius; p is two-sided."""
    found = []
    for (entry, rho), own in common[common.rho.notna()].groupby(["entry", "rho"], sort=False):
        gain = own.minus_baseline.round(6)  # accuracies of few texts are equal but for rounding
        ordered = min(own.share.nunique(), gain.nunique()) > 1  # what is all the same has no order
        correlation, p = scipy.stats.spearmanr(own.share, gain) if ordered else (math.nan, math.nan)
        found.append({"entry": entry, "rho": rho, "tasks": len(own), "correlation": float(correlation), "p": float(p)})
    return pd.DataFrame(found)


def plan_of_cells(plan: Plan) -> Plan:
    """The plan with the cells alone as its content, as `comparison` knows it."""
    return dataclasses.replace(plan, content=plan.content[0])


def _config(one: Planned) -> Config:
    return next(iter(one.reported.values()))[0]


def _points(axis: Axes, part: pd.DataFrame, x: str) -> None:
    groups = list(part.groupby(["entry", "rho"], sort=False))
    radii = sorted(set(part.rho))
    for number, ((entry, rho), own) in enumerate(groups):
        own = own.sort_values(x)
        beside = number - (len(groups) - 1) / 2  # so that marks do not cover each other
        at = own[x] * (1 + 0.06 * beside) if x == "data_share" else own[x] + 0.006 * beside
        found, name = [difference(row) for row in own.itertuples()], rf"{label(str(entry))}, $\rho$ = {rho:g}"
        look = {"marker": MARKERS[radii.index(rho)]}
        style.marks(axis, list(at), found, str(entry), label=name, joined=x == "data_share", look=look)


def _finding(several: pd.DataFrame, common: pd.DataFrame, correlations: pd.DataFrame) -> str:
    parts = [f"{share:.0%} {counted(own)}" for share, own in several.sort_values("data_share").groupby("data_share")]
    tasks = [f"{task} {counted(own)}" for task, own in common.groupby("task", sort=False)]
    words = [
        f"{label(row.entry)} at rho {row.rho:g} {_correlation(row)}{'' if math.isnan(row.p) else f' (p {row.p:.2f})'}"
        for row in correlations.itertuples()
    ]
    sides = [f"by the share of the data: {'; '.join(parts)}"] if parts else []
    sides += [f"by task: {'; '.join(tasks)}"] if tasks else []
    ranked = f" Rank correlation of gain and functional share over {common.task.nunique()} tasks: {', '.join(words)}."
    return f"Against AdamW, {'; '.join(sides)}.{ranked if words else ''}"


def _setting(plan: Plan, data: pd.DataFrame, with_share: bool) -> str:
    config = _config(plan.content[0][0])
    n = "/".join(str(value) for value in sorted(set(data.n)))
    others = data[data.metric != data.metric.mode()[0]].groupby("metric", sort=False).task.unique()
    judged = "".join(f" ({', '.join(tasks)}: {metric_label(str(name))})" for name, tasks in others.items())
    steps = "/".join(str(value) for value in sorted(set(data.steps)))
    share = (
        "the functional share is that of the pretrained model with a fresh head on "
        f"{config.measure.rows} validation texts, grey its interval over heads; "
    )
    return (
        f"Scale {plan.spec.scale}: {TASKS[config.kind].model_name(config)}, {steps} steps of {config.training.batch} texts, rho as "
        f"given, nothing chosen{judged}; {share if with_share else ''}bars are 95 % intervals of differences "
        f"paired by seed, n = {n}, Holm's correction within the figure."
    )
