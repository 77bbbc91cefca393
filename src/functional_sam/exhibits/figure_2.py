"""figure-2: Angle-SAM at matched dose: each task's metric against the angle between the two parts of the sharpness gradient."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from functional_sam.config import Config
from functional_sam.exhibits import style
from functional_sam.exhibits.held_dose import (
    by_batch,
    configs_of,
    draw_by_batch,
    in_words,
    noise_by_batch,
    significant,
)
from functional_sam.exhibits.held_dose_tests import is_test, named_configs, tested, tests_figure, tests_in_words
from functional_sam.exhibits.markdown import interval
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.pairs import by_seed
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.vision import POINTS
from functional_sam.exhibits.words import answer, firsts, model, sentence, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, estimate, judged
from functional_sam.study.design import cells_asked
from functional_sam.tasks import TASKS

LOOKS = (("-", "o"), ("--", "s"), (":", "^"))  # line and marker, one pair a dose
# Parts of the figure: all angles at one batch, the ends at several, and tests of what they suggested.
SWEEP, BY_BATCH, TESTS = "sweep", "by batch", "tests"
LOWER = {task.metric.name: task.metric.lower_is_better for task in TASKS.values()}


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW, and Angle-SAM at each dose and angle, on each task and seed; seeds first, so that what exists is a whole sweep.

    Then the cells of the scale, the two parts by batch and the tests: one that is not complete is left out of a drawing. With
    cells=NAME,NAME among the overrides the runs of those cells alone.
    """
    asked, overrides = cells_asked(overrides, spec.cells, f"configs/exhibits/{spec.name}.yaml, scale {spec.scale}")
    configs = []
    for seed in spec.seeds:
        for task in spec.tasks:
            configs.append(spec.run(task, "adamw", seed, overrides))
            for dose in spec.dose:
                for phi in spec.phi:
                    method = {"options": {"phi": phi, "dose": dose}}
                    configs.append(spec.run(task, "angle-sam", seed, overrides, method=method))
    drawable = all(source.done(config) for config in configs)
    tests = {name: named_configs(spec, cell, overrides) for name, cell in spec.cells.items() if is_test(cell)}
    cells = {}  # name -> its runs, seeds first
    for name, cell in spec.cells.items():
        seeds = zip(*tests[name].values(), strict=True) if name in tests else [configs_of(spec, cell, overrides)]
        cells[name] = [config for one in seeds for config in one]
    complete = {name: own for name, own in cells.items() if all(source.done(config) for config in own)}
    shown = _once(configs, *complete.values())
    left = tuple(name for name in cells if name not in complete)
    batches = {name: own for name, own in complete.items() if name not in tests}
    content = configs, batches, {name: own for name, own in tests.items() if name in complete}
    every = _once(*(cells[name] for name in asked)) if asked else _once(configs, *cells.values())
    return Plan(spec, every, content, source, drawable, shown if drawable else None, left, growing=bool(left))


def _once(*parts: Sequence[Config]) -> list[Config]:
    """All of them, a run that several cells share once."""
    return list({config.name: config for part in parts for config in part}.values())


def frame(configs: Sequence[Config], source: Source, part: str = SWEEP, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """One row per run: its metric (infinitely bad where it diverged), and that minus AdamW's of the same task, batch and seed.

    names: of runs of tests, which have several AdamWs; the one called so is the one.
    """
    rows = []
    for config in configs:
        metric, summary = TASKS[config.kind].metric, source.summary(config)
        value = summary.get(metric.name)
        rows.append(
            {
                "part": part,
                "run": names[config.name] if names else "",
                "task": config.task,
                "batch": config.training.batch,
                "method": config.method.name,
                "dose": config.method.options.get("dose"),
                "phi": config.method.options.get("phi"),
                "seed": config.training.init_seed,
                "metric": metric.name,
                "value": (math.inf if metric.lower_is_better else -math.inf) if value is None else value,
                "diverged": bool(summary.get("diverged", False)),
            }
        )
    data = pd.DataFrame(rows).astype({"dose": float, "phi": float})  # nan for AdamW: runs of it alone would make them objects
    pairs = ["task", "batch", "seed"]
    base = data[(data.method == "adamw") & data.run.isin(["", "AdamW"])].set_index(pairs).value
    data["minus_adamw"] = data.value - base.reindex(pd.MultiIndex.from_frame(data[pairs])).to_numpy()
    return data


def comparisons(data: pd.DataFrame, margin: float) -> pd.DataFrame:
    """The smallest angle minus the largest (one family), and every angle minus AdamW (another), with Holm's correction in each."""
    rows = []
    for (task, dose), part in data[data.phi.notna()].groupby(["task", "dose"], sort=False):
        by = dict(iter(part.groupby("phi")))
        adamw = data[(data.task == task) & (data.method == "adamw")]
        pairs = [("logit part", min(by), by[max(by)]), *(("AdamW", phi, adamw) for phi in by)]
        for against, phi, other in pairs:
            found = by_seed(by[phi], other, "value", f"{task}, dose {dose:g}, phi {phi:g} minus {against}")
            row = {"task": task, "dose": dose, "phi": phi, "against": against, "metric": part.metric.iloc[0]}
            rows.append(row | {"n": found.n, "difference": found.mean, "stderr": found.stderr, "half_width": found.half_width})
    result = pd.DataFrame(rows)
    result["verdict"] = ""
    for _, family in result.groupby("against"):
        signs = [1 if LOWER[name] else -1 for name in family.metric]
        turned = [Estimate(sign * row.difference, row.stderr, row.n) for sign, row in zip(signs, family.itertuples(), strict=True)]
        result.loc[family.index, "verdict"] = list(map(str, judged(turned, margin=margin)))
    return result


def draw(plan: Plan) -> Exhibit:
    """Above the metric, below its difference to AdamW, seed by seed; one column per task; bars are 95 % t intervals.

    A further column is the two parts by batch, a further figure the tests, where their cells are complete.
    """
    spec, (grid, cells, tested_cells) = plan.spec, plan.content
    batches = [config for own in cells.values() for config in own]
    data, rows = frame(grid, plan.source), frame(batches, plan.source, BY_BATCH) if batches else pd.DataFrame()
    found, (told, tests) = comparisons(data, spec.margin), _tests(plan)
    ends = by_batch(rows, spec.margin).merge(noise_by_batch(plan, batches), on="batch") if batches else pd.DataFrame()
    style.use()
    figure, axes = plt.subplots(2, len(spec.tasks) + bool(batches), figsize=(style.PAGE, 3.9), sharex="col", squeeze=False)
    for column, config in enumerate(firsts(grid).values()):
        _panels(axes[:, column], config, data, found, spec)
    words = [tests_in_words(tests, spec.cells)]
    if batches:
        dose, steps = float(rows.dose.max()), batches[0].training.steps
        draw_by_batch(axes[:, -1], ends, dose, steps)
        words.append(in_words(ends, dose, steps))
    figure.align_ylabels()
    style.legend_above(figure, axes[0, 0], columns=2)
    finding, further = _finding(found), " ".join(map(sentence, filter(None, words)))
    short = f"{sentence(headline(data))} {_significant(found, ends)}"
    style.finding_above(figure, finding if len(spec.dose) == 1 else short)
    language = found[(found.task == "language") & (found.against == "logit part")]
    said = answer([*language.verdict, *(ends.verdict if batches else ())], Verdict.BETTER)
    frames = {"": pd.concat([data, rows, told], ignore_index=True), "comparisons": found}
    frames |= {"batches": ends} if batches else {}
    frames |= {"tests": tests} if len(tests) else {}
    given = {name: runs[0].optimizer.lr for cell in tested_cells.values() for name, runs in cell.items()}
    more = {"tests": tests_figure(tests, spec.cells, given["AdamW"])} if len(tests) else {}
    return Exhibit(plan, frames, _caption(plan, finding, further), _verdict(found, further), figure, answer=said, more=more)


def _panels(column: Iterable[Axes], config: Config, data: pd.DataFrame, found: pd.DataFrame, spec: Spec) -> None:
    """Both panels of a task, a line a dose. data: `frame` of the sweep; found: its `comparisons`; config: the task's AdamW."""
    (above, below), metric = column, TASKS[config.kind].metric
    part, own = data[data.task == config.task], found[(found.task == config.task) & (found.against == "AdamW")]
    points = metric.name == "accuracy"
    unit = POINTS if points else 1
    _band(above, estimate(list(part[part.method == "adamw"].value)))
    below.axhline(0.0, color=style.METHOD_COLOR["adamw"])
    for number, dose in enumerate(spec.dose):
        beside = 0.12 * (number - (len(spec.dose) - 1) / 2)
        values = [estimate(list(part[(part.dose == dose) & (part.phi == phi)].value)) for phi in spec.phi]
        _line(above, values, beside, number, f"Angle-SAM, |correction| = {dose:g} |g|")
        rows = own[own.dose == dose].set_index("phi").loc[spec.phi]
        _line(below, [Estimate(unit * r.difference, unit * r.stderr, r.n) for r in rows.itertuples()], beside, number)
        _fill_significant(below, rows, beside, number, unit)
    name = style.TASK_LABEL.get(config.task, config.task)
    above.set(title=f"{name}\n({model(config)})", ylabel=f"validation {metric.label}".replace(" (", "\n("))
    minus = f"{metric.name} minus\nAdamW's{' (points)' if points else ''}"
    below.set(xlabel="$\\phi$ (degrees)\nfunctional part 0, logit part 90", ylabel=minus)
    below.set_xticks(range(len(spec.phi)), [f"{phi:g}" for phi in spec.phi])


def _tests(plan: Plan) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of the tests that are complete, those that several cells name alike once, and their comparisons."""
    spec, (_, _, tests) = plan.spec, plan.content
    if not tests:
        return pd.DataFrame(), pd.DataFrame()
    data = {}
    for cell, runs in tests.items():
        names = {config.name: name for name, own in runs.items() for config in own}
        data[cell] = frame(_once(*runs.values()), plan.source, TESTS, names)
    return pd.concat(data.values()).drop_duplicates(ignore_index=True), tested(data, spec.cells, spec.margin)


def headline(data: pd.DataFrame) -> str:
    """What figure and CSV say, in a few words: of several doses the middle one."""
    ends = comparisons(data[data.part == SWEEP], 0.0).query("against == 'logit part'")
    doses = sorted(ends.dose.unique())
    middle = ends[ends.dose == doses[len(doses) // 2]]
    said = [row.verdict if row.verdict.startswith(("better", "worse")) else "not significant" for row in middle.itertuples()]
    return "functional part minus logit part at equal dose: " + ", ".join(
        f"{row.task} {_in_words(row)} (dose {row.dose:g}, {word})" for row, word in zip(middle.itertuples(), said, strict=True)
    )


def _in_words(row: Any) -> str:
    """A difference with its interval and unit: accuracies in points."""
    if row.metric == "accuracy":
        return f"{interval(POINTS * row.difference, POINTS * row.half_width, 1, sign=True)} points"
    return f"{row.metric} {interval(row.difference, row.half_width, sign=True)}"


def _band(axis: Axes, base: Estimate) -> None:
    black = style.METHOD_COLOR["adamw"]
    axis.axhline(base.mean, color=black, label="AdamW and its 95 % interval")
    if math.isfinite(base.half_width) and math.isfinite(base.mean):
        axis.axhspan(base.mean - base.half_width, base.mean + base.half_width, color=black, alpha=0.12, linewidth=0)


def _line(axis: Axes, values: Sequence[Estimate], beside: float, number: int, label: str | None = None) -> None:
    """Means with their intervals at equally spaced places, hollow; a mean with a diverged run is a word."""
    dash, marker = LOOKS[number % len(LOOKS)]
    shown = [(place, one) for place, one in enumerate(values) if math.isfinite(one.mean)]
    axis.errorbar(
        [place + beside for place, _ in shown],
        [one.mean for _, one in shown],
        [style.bar(one.half_width) for _, one in shown],
        color=style.METHOD_COLOR["angle-sam"],
        linestyle=dash,
        marker=marker,
        markerfacecolor="white",
        elinewidth=0.7,
        label=label,
    )
    for place, one in enumerate(values):
        if not math.isfinite(one.mean):
            axis.annotate(
                "diverged", (place, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="center", fontsize=6
            )


def _fill_significant(axis: Axes, rows: pd.DataFrame, beside: float, number: int, unit: float) -> None:
    """Filled markers where the angle is better or worse than AdamW."""
    for place, row in enumerate(rows.itertuples()):
        if row.verdict in (Verdict.BETTER, Verdict.WORSE):
            color = style.METHOD_COLOR["angle-sam"]
            axis.plot([place + beside], [unit * row.difference], color=color, marker=LOOKS[number % len(LOOKS)][1], zorder=3)


def _words(own: pd.DataFrame) -> str:
    """The metric of a task, and its difference with the verdict at each dose."""
    each = [f"{_in_words(row)} at dose {row.dose:g}, {row.verdict}" for row in own.itertuples()]
    return ", ".join(each)


def _finding(found: pd.DataFrame) -> str:
    """Functional part against logit part, task by task."""
    ends = found[found.against == "logit part"]
    parts = [f"{task} {_words(own)}" for task, own in ends.groupby("task", sort=False)]
    better, worse = (int(ends.verdict.str.startswith(word).sum()) for word in ("better", "worse"))
    found_out = {(True, False): "the functional part is better", (False, True): "the logit part is better"}
    words = found_out.get(
        (better > 0, worse > 0), "tasks or doses disagree on the better part" if better else "neither part is significantly better"
    )
    words += f" in {better + worse} of {len(ends)}" if 0 < better + worse < len(ends) else ""
    return f"At equal dose {words}: functional minus logit part, {'; '.join(parts)}"


def _significant(found: pd.DataFrame, batches: pd.DataFrame) -> str:
    """Where one part does more harm than the other, in a few words."""
    ends = found[found.against == "logit part"]
    words = [
        f"{row.task} at dose {row.dose:g} (functional part {row.verdict})"
        for row in ends.itertuples()
        if row.verdict.startswith(("better", "worse"))
    ]
    words += significant(batches)
    return f"Significant: {', '.join(words) or 'nothing'}."


def _caption(plan: Plan, finding: str, further: str) -> str:
    spec, batches = plan.spec, f" {further}" if further else ""
    if plan.content[1]:
        batches += " Noise is the part of |H_F eps|^2 that is sampling noise of the batch (AdamW's weights)."
    if plan.left:
        words = " (verdicts by batch are so far, Holm over those shown)" if plan.content[1] else ""
        batches += f" Not shown, their runs are not complete: {', '.join(plan.left)}{words}."
    return (
        f"{finding} (Holm over tasks and doses, margin {spec.margin:g}). Angle-SAM: "
        "gradient g + c, c along cos(phi) H_F eps + sin(phi) H_G eps and |c| = dose |g| at every step, by exact derivatives, "
        "so that angles differ in direction alone (45 is along H eps; the scaling is ours, the paper's was not seen); scale "
        f"{spec.scale}, not the paper's: {sizes(plan.content[0])}. Means over n={len(spec.seeds)} seeds, bars and band are 95 % t "
        "intervals, below of differences to AdamW with the same initialization and data order, filled where better or worse "
        f"after Holm's correction.{batches}"
    )


def _verdict(found: pd.DataFrame, batches: str) -> str:
    parts = []
    for (task, dose), own in found[found.against == "AdamW"].groupby(["task", "dose"], sort=False):
        words = [
            f"{word} at phi {', '.join(f'{phi:g}' for phi in own[own.verdict == word].phi)}"
            for word in Verdict
            if word and (own.verdict == word).any()
        ]
        parts.append(f"{task}, dose {dose:g}, against AdamW {'; '.join(words)}")
    ends = found[(found.against == "logit part") & (found.task == "language")]
    better, worse = (ends.verdict.str.startswith(word).sum() for word in ("better", "worse"))
    same = (ends.verdict == Verdict.SAME).sum()
    claim = "turned" if worse else "vanished" if same else "supported" if better else "inconclusive"
    n = int(found.n.iloc[0])
    return (
        f"{_finding(found)}. The paper's order in language is {claim}. {'. '.join(parts)} (n={n}, paired, 95 % t intervals, Holm)."
        f"{f' {batches}' if batches else ''}"
    )
