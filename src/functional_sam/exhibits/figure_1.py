"""figure-1: the logit share of the sharpness gradient against the number of targets and against time, language beside vision."""

import itertools
import math
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval, number
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, by_targets, firsts, sentence, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Verdict, estimate, holm, unpaired_difference, verdict

MARGIN = 0.05  # of a share: what is called no difference (paper/PROTOCOL.md)
PAIR = ("language", "vision")
WHERE = "Logit share at the end"
Dash = Any  # matplotlib's type of line
NOISY = {"gradient": "g", "logit": "delta_logit", "func": "delta_func"}  # whose noise scale is said
ASCENTS: dict[str, Dash] = {"gradient": "-", "adam": "--"}


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW on each task, each seed (of initialization and data order), with the shares measured on the way."""
    configs = [spec.run(task, "adamw", seed, overrides) for task in spec.tasks for seed in spec.seeds_by_task.get(task, spec.seeds)]
    return Plan.of_known_runs(spec, configs, source)


def compared(data: pd.DataFrame) -> pd.DataFrame:
    """Language minus vision at the end of training, by ascent and matched number of targets, eps of the same batch; one family."""
    rows, found = [], []
    own = data[(data.origin == "same") & at_last(data)]
    for ascent, targets in itertools.product(ASCENTS, sorted(set(own.targets))):
        part = own[(own.ascent == ascent) & (own.targets == targets)]
        sides = [list(part[part.task == task].share_logit) for task in PAIR]
        if all(sides):
            means = [estimate(values).mean for values in sides]
            rows.append({"ascent": ascent, "targets": targets, **dict(zip(PAIR, means, strict=True))})
            found.append(unpaired_difference(*sides))
    for row, one, p in zip(rows, found, holm([one.p for one in found]), strict=True):
        word = verdict(one, lower_is_better=False, margin=MARGIN, p=p)
        side = {Verdict.BETTER: "language above", Verdict.WORSE: "vision above"}.get(word, str(word))
        row |= {"n": one.n, "difference": one.mean, "half_width": one.half_width, "p_holm": p, "verdict": side}
    return pd.DataFrame(rows)


def at_last(data: pd.DataFrame) -> pd.Series:
    """Whether a row is of its task's last step."""
    last: pd.Series = data.step == data.groupby("task").step.transform("max")
    return last


def without_noise(data: pd.DataFrame) -> pd.DataFrame:
    """The rows from which sampling noise is told: the last step, gradient ascent, eps independent of the measuring batch."""
    return data[at_last(data) & (data.ascent == "gradient") & (data.origin == "independent")]


def noise_scale(data: pd.DataFrame, task: str, part: str) -> float:
    """Return tr Sigma / |E d|^2 at the end, the number of targets of which a batch is as much noise as mean.

    d is the gradient, or the part of the sharpness gradient along an independent eps; Sigma is its covariance for one target, by
    n (|d|^2 - |E d|^2) on the largest measuring batch, of n targets. Both are means over seeds, of which the ratio is taken: nan
    where that of |E d|^2 came out negative.
    Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, there for the gradient.
    """
    end = without_noise(data)
    end = end[end.task == task]
    end = end[end.targets == end.targets.max()]
    found = noise(end, part)
    return float(end.targets.iloc[0]) * found / (1.0 - found) if found < 1 else math.nan


def noise(data: pd.DataFrame, part: str) -> float:
    """The part of |d|^2 that is sampling noise: means over seeds, of which the ratio is taken.

    Above 1 where the inner product of the half batches, which has the mean |E d|^2, came out negative.
    """
    whole = data[f"norm_{part}"] ** 2
    return float((whole * data[f"noise_{part}"]).mean() / whole.mean())


def draw(plan: Plan) -> Exhibit:
    """Above: share against targets at several times, and against time at matched targets. Below: the end of training."""
    data = by_targets(plan)
    for part in ("func", "logit", "gradient"):
        data[f"noise_{part}"] = 1.0 - data.pop(f"square_{part}") / data[f"norm_{part}"] ** 2
    tests, matched = compared(data), plan.configs[0].measure.targets[0]
    figure, finding = _figure(data, matched, list(firsts(plan.configs))), _finding(tests)
    style.finding_above(figure, sentence(f"{WHERE}, {headline(data)}"))
    sides = {"language above": Verdict.BETTER, "vision above": Verdict.WORSE}
    said = answer([sides.get(word, word) for word in tests.verdict], Verdict.BETTER)
    return Exhibit(
        plan,
        {"": data, "tests": tests},
        _caption(plan, finding, through_training(data, matched)),
        _verdict(plan, data, tests),
        figure,
        answer=said,
    )


def _figure(data: pd.DataFrame, matched: int, tasks: list[str]) -> Figure:
    style.use()
    figure, ((times, steps), (origins, norms)) = plt.subplots(2, 2, figsize=(style.PAGE, 5.2))
    same, gradient = data.origin == "same", data.ascent == "gradient"
    names: list[float] = []
    for task in tasks:
        color, own = style.TASK_COLOR.get(task, "#777777"), data.task == task
        counts = data[own & same & gradient].groupby("step").targets.nunique()
        shown = list(counts[counts == counts.max()].index)  # the steps measured at all numbers of targets
        for place, step in enumerate(shown):
            shade = 0.25 + 0.75 * (place + 1) / len(shown)
            at_step = data[own & same & gradient & (data.step == step)]
            _line(times, at_step, "targets", "share_logit", color, alpha=shade, band=step == shown[-1])
            names.append(_named(times, at_step, "targets", "share_logit", f"{step}", color, names))
        for ascent, dash in ASCENTS.items():
            _line(steps, data[own & same & (data.ascent == ascent) & (data.targets == matched)], "step", "share_logit", color, dash)
        independent = without_noise(data[own])
        _line(origins, data[own & same & gradient & at_last(data)], "targets", "share_logit", color)
        _line(origins, independent, "targets", "share_logit_without_noise", color, ":", "D")
        for part, dash in (("func", "-"), ("logit", ":"), ("gradient", "--")):
            found = {targets: noise(rows, part) for targets, rows in independent.groupby("targets")}
            norms.plot(list(found), list(found.values()), color=color, linestyle=dash, marker="o", markersize=3)
    for axis, label in ((times, "logit share"), (steps, "logit share"), (origins, "logit share"), (norms, "part that is noise")):
        axis.set(xscale="log", xlabel="targets of the measuring batch", ylabel=label)
        axis.set_ylim(0.0, 1.02)
    steps.set_xlabel("AdamW step")
    norms.set_ylim(0.0, 1.25)
    times.set_title(r"At several steps (numbers), $\epsilon$ from the same batch")
    steps.set_title(f"Through training, at {matched} targets of either task")
    origins.set_title("At the end: as a batch of SAM has it, and without noise")
    norms.set_title(r"At the end: sampling noise ($\epsilon$ independent)")
    _legends(figure, steps, origins, norms, tasks)
    figure.tight_layout()
    return figure


def through_training(data: pd.DataFrame, targets: int) -> pd.DataFrame:
    """Language minus vision at the steps that both were measured at: gradient ascent, eps of the same batch; described, no test."""
    own = data[data.ascent.eq("gradient") & data.origin.eq("same") & data.targets.eq(targets)]
    rows = []
    for step in sorted(set.intersection(*(set(own[own.task == task].step) for task in PAIR)) if len(own) else ()):
        found = unpaired_difference(*(list(own[own.step.eq(step) & own.task.eq(task)].share_logit) for task in PAIR))
        rows.append({"step": step, "targets": targets, "difference": found.mean, "half_width": found.half_width})
    return pd.DataFrame(rows)


def headline(data: pd.DataFrame) -> str:
    """What figure and CSV say, in a few words."""
    found = _finding(compared(data)).lower().removeprefix(f"{WHERE.lower()}, ")
    end = without_noise(data)
    matched = set.intersection(*(set(end[end.task == task].targets) for task in PAIR)) if len(end) else set()
    if not matched:
        return found
    own = end[end.targets == max(matched)].groupby("task").share_logit_without_noise
    means = {task: _known(values) for task, values in own}
    return f"{found}; without sampling noise {' against '.join(means[task] for task in PAIR)}"


def _known(shares: pd.Series, sign: bool = False) -> str:
    """Mean and interval of shares without noise, a seed each; nan where all that a seed has is noise: of how many seeds it is."""
    known = shares.dropna()
    if known.empty:
        return "not known, all is noise"
    one = estimate(list(known))
    left = "" if len(known) == len(shares) else f" (in {len(known)} of {len(shares)} seeds, of the others all is noise)"
    return f"{interval(one.mean, one.half_width, 2, sign=sign)}{left}"


def _line(
    axis: Axes,
    part: pd.DataFrame,
    x: str,
    y: str,
    color: str,
    dash: str = "-",
    marker: str = "o",
    alpha: float = 1.0,
    band: bool = True,
) -> None:
    """Means over seeds with their 95 % t intervals."""
    groups = [(at, estimate(list(values))) for at, values in part.dropna(subset=[y]).groupby(x)[y]]
    xs, means = [at for at, _ in groups], [one.mean for _, one in groups]
    axis.plot(xs, means, color=color, linestyle=dash, marker=marker, alpha=alpha, markersize=3)
    if band:
        halves = [style.bar(one.half_width) for _, one in groups]
        low, high = zip(*((m - h, m + h) for m, h in zip(means, halves, strict=True)), strict=True) if groups else ((), ())
        axis.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def _named(axis: Axes, part: pd.DataFrame, x: str, y: str, text: str, color: str, taken: list[float]) -> float:
    """The text at the right end of a line, above or below where one of those taken is in its way; where it stands."""
    last = part[part[x] == part[x].max()]
    end = float(last[y].mean())
    beside = min((end - other for other in taken if abs(end - other) < 0.03), key=abs, default=1.0)
    at = end if beside == 1.0 else end - beside + math.copysign(0.035, beside)
    axis.annotate(text, (last[x].iloc[0], at), (3, 0), textcoords="offset points", fontsize=5.5, color=color, va="center")
    return at


def _legends(figure: Figure, steps: Axes, origins: Axes, norms: Axes, tasks: list[str]) -> None:
    def grey(dash: Dash, label: str, marker: str = "o") -> Line2D:
        return Line2D([], [], color="#555555", linestyle=dash, marker=marker, label=label)

    colors = [Line2D([], [], color=style.TASK_COLOR.get(t, "#777777"), label=style.TASK_LABEL.get(t, t)) for t in tasks]
    figure.legend(handles=colors, loc="upper center", ncol=len(tasks), bbox_to_anchor=(0.5, 1.03))
    steps.legend(handles=[grey("-", r"$\epsilon = g/|g|$ (SAM)"), grey("--", "Adam's ascent (Precond)")], loc="lower right")
    names = [grey("-", r"$\epsilon$ of the same batch"), grey(":", r"$\epsilon$ independent, without sampling noise", "D")]
    origins.legend(handles=names, loc="lower right")
    squares = [grey("-", r"of $|\delta_{func}|^2$"), grey(":", r"of $|\delta_{logit}|^2$"), grey("--", r"of $|g|^2$")]
    norms.legend(handles=squares, loc="upper center", ncol=3, columnspacing=1.0)


def _finding(tests: pd.DataFrame) -> str:
    """The verdicts under the gradient ascent, in a line."""
    own = tests[tests.ascent == "gradient"] if len(tests) else tests
    words = []
    for word, part in own.groupby("verdict", sort=False) if len(own) else ():
        words.append(f"{word} at {', '.join(f'{targets:,}' for targets in part.targets)} targets")
    if not words:
        return "Logit share of the sharpness gradient"
    if len(words) == 1 and len(own) > 1:
        words = [f"{own.verdict.iloc[0]} at all {len(own)} matched numbers of targets"]
    largest = own[own.targets == own.targets.max()].iloc[0]
    numbers = f"({number(largest.language, 2)} against {number(largest.vision, 2)} at {largest.targets:,})"
    return f"{WHERE}, language against vision: {'; '.join(words)} {numbers}"


def _caption(plan: Plan, finding: str, times: pd.DataFrame) -> str:
    n = len(plan.spec.seeds)
    others = "; ".join(f"{task} n={len(seeds)}" for task, seeds in plan.spec.seeds_by_task.items())
    more = f" ({others})" if others else ""
    each = [f"{interval(row.difference, row.half_width, 2, sign=True)} at step {row.step:,}" for row in times.itertuples()]
    by_time = f" (through training, at {times.targets.iloc[0]:,} targets, described: {', '.join(each)})" if each else ""
    return (
        f"{finding}{by_time}. Logit share is |delta_logit| / (|delta_logit| + |delta_func|), delta_logit = H_G eps, "
        "delta_func = H_F eps, eps a unit vector, on batches of the rows that training would have met next, under Adam's ascent "
        f"from step {plan.configs[0].measure.adam_from} on; without noise: inner products of two half batches in place of squared "
        "norms (a negative one says that all is noise, and more); noise is a ratio of means over seeds, without an interval; "
        f"scale {plan.spec.scale}, not the paper's: {sizes(plan.configs)}. Means over n={n} seeds{more}, bands are 95 % t "
        "intervals, Holm's correction over both ascents and all matched numbers."
    )


def _verdict(plan: Plan, data: pd.DataFrame, tests: pd.DataFrame) -> str:
    said = [
        f"{row.ascent}, {row.targets} targets: {interval(row.difference, row.half_width, 3, sign=True)}, {row.verdict}"
        for row in tests.itertuples()
    ]
    changes, scales = [], []
    ends = without_noise(data)
    for task in firsts(plan.configs):
        end = ends[ends.task == task]
        fewest, most = (
            end[end.targets == targets].set_index("seed").share_logit_without_noise
            for targets in (end.targets.min(), end.targets.max())
        )
        one = " (one seed)" if len(most) == 1 else ""
        changes.append(f"{task} {_known(most - fewest, sign=True)}{one}")
        found = [f"{label} {number(noise_scale(data, task, part), 0)}" for part, label in NOISY.items()]
        scales.append(f"{task} {', '.join(found)}")
    return (
        f"logit share at the end, language minus vision ({'; '.join(said)}); share without noise, most minus fewest targets: "
        f"{', '.join(changes)} (n={len(plan.spec.seeds)}, 95 % t intervals, Holm over {len(tests)} comparisons). "
        f"Noise scale at the end, in targets ({'; '.join(scales)})."
    )
