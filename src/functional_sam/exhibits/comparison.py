"""What the exhibits of a study share: their plan, a table a cell, and the words of verdicts, settings and what is not there yet."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pandas as pd

from functional_sam.exhibits import markdown, style
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import data_name, metric_label, model_name, tally
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict
from functional_sam.study.design import Cell, Study, load_study, trials
from functional_sam.study.report import difference, judge
from functional_sam.study.tune import Planned, plan_cells, todo, unique

# Parts whose comparisons are a family of their own, beside that of the exhibit's claim.
DESCRIBED = ("activation", "alike", "control", "fresh")


def plan(
    spec: Spec, source: Source, overrides: tuple[str, ...] = (), has_a_place: Callable[[Study, Cell], bool] = lambda *_: True
) -> Plan:
    """Plan every run known so far of the cells of the exhibit's parts; the plan's content are the cells that are complete.

    has_a_place: whether the exhibit shows a cell of these parts. What cells= on the command line leaves out counts as left.
    """
    study = load_study(spec.study, spec.scale, overrides)
    planned = plan_cells(study, [cell for cell in study.part(*spec.parts) if has_a_place(study, cell)], source)
    shown = [one for one in planned if one.complete]
    have = {one.cell.name for one in shown}
    own = [cell for cell in study.cells.values() if cell.part in spec.parts and has_a_place(study, cell)]
    left = [cell for cell in own if cell.name not in have]
    return Plan(
        spec,
        todo(planned),
        shown,
        source,
        drawable=bool(shown),
        drawn=unique(config for one in shown for config in one.configs),
        left=tuple(cell.name for cell in left),
        growing=any(cell.part not in DESCRIBED for cell in left),
    )


def by_family(data: pd.DataFrame) -> list[pd.DataFrame]:
    """Split the rows into families of comparisons: those of the exhibit's claim, and those of each part that is DESCRIBED."""
    return [own for _, own in data.groupby(data.part.where(data.part.isin(DESCRIBED), ""), sort=False)]


def label(name: str, own: object = "") -> str:
    """Name an entry as readers know it; own: its label in the study, if any (nan where a CSV was read)."""
    return own if isinstance(own, str) and own else style.METHOD_LABEL.get(name, name)


def place(row: Any) -> str:
    """Describe a cell in words: size, rows of a step, and how often its data is met."""
    size = str(row.task).split("-", 1)[-1]
    epochs = row.units / row.unique_units
    return f"{size}, {row.batch} rows" + (f", {epochs:.3g} epochs" if epochs > 1.05 else "")


def rows_of(data: pd.DataFrame, other: str = "sam") -> str:
    """Write the Markdown table, a row an entry and cell: what came out before what was set."""
    unit = metric_label(data.metric.iloc[0])
    second = f"minus_{other}" in data and f"verdict_{other}" in data
    columns = ["setting", "method", "against AdamW", "minus AdamW", f"against {label(other)}", unit, "lr, rho", "dose", "n"]
    differing = data.groupby("cell").weight_decay.nunique() > 1
    decays, lines = set(differing[differing].index), []
    for row in data.itertuples():
        settings = [chosen(row, "lr"), chosen(row, "rho"), f"decay {row.weight_decay:g}" if row.cell in decays else ""]
        cells = [place(row), label(row.entry, row.label), row.verdict_baseline, differs(row, "baseline")]
        cells += [with_verdict(row, other)] if second else []
        dose = markdown.significant(row.dose, 2)
        lines.append([*cells, level(row), ", ".join(filter(None, settings)), dose, runs(row)])
    if not second:
        columns.remove(f"against {label(other)}")
    return markdown.table(columns, lines, text=[column for column in columns if column not in ("dose", "n")])


def differs(row: Any, other: str) -> str:
    """Write a row's paired difference with its 95 % interval."""
    found = difference(row, other)
    if not found.n:
        return ""
    return "diverged" if math.isinf(found.mean) else markdown.interval(found.mean, found.half_width, sign=True)


def with_verdict(row: Any, other: str) -> str:
    """Write a row's verdict and, after it, what `differs` says."""
    word = getattr(row, f"verdict_{other}")
    found = differs(row, other)
    return f"{word}, {found}" if word and found and found != "diverged" else word or ""


def chosen(row: Any, key: str) -> str:
    """Write a row's value of "lr" or "rho", with a mark where it lies at an end of what was tried; empty where it has none."""
    value = getattr(row, key)
    if math.isnan(value):
        return ""
    edges = dict(part.split(":") for part in row.edges.split()) if isinstance(row.edges, str) else {}
    return f"{value:g}" + {"low": " (lowest tried)", "high": " (highest tried)"}.get(edges.get(key, ""), "")


def runs(row: Any) -> str:
    """Write how many runs a row is of, and how many of them diverged."""
    return f"{row.n}" + (f" ({row.diverged} diverged)" if row.diverged else "")


def level(row: Any, digits: int | None = None, column: str = "test", unit: float = 1.0) -> str:
    """Write a mean over a row's runs, that of the test metric unless another is named, with its 95 % interval, in a unit."""
    mean, stderr = unit * getattr(row, column), unit * getattr(row, f"{column}_stderr")
    return markdown.interval(mean, Estimate(mean, stderr, row.n).half_width, digits)


def counted(data: pd.DataFrame, other: str = "baseline") -> str:
    """List the entries by verdict, in words: "worse: SAM; inconclusive: ..."."""
    found = []
    for word in Verdict:
        own = [row for row in data.itertuples() if word and getattr(row, f"verdict_{other}") == word]
        names = list(dict.fromkeys(label(row.entry, row.label) for row in own))
        found += [f"{word}: {', '.join(names)}"] if names else []
    return "; ".join(found) or "nothing to compare"


def headline(data: pd.DataFrame) -> str:
    """How many comparisons came out how, in a few words."""
    words = [word for word in data.verdict_baseline if isinstance(word, str) and word]
    return f"of {len(words)} comparisons with AdamW {tally(words)}"


def differences(data: pd.DataFrame, other: str = "baseline") -> str:
    """In nats, minus another entry: of one row with its interval, of several the least and the largest; and the verdicts."""
    own = data[data[f"verdict_{other}"].isin([str(word) for word in Verdict if word])]
    means, halves, verdicts = (list(own[f"{name}_{other}"]) for name in ("minus", "half", "verdict"))
    if len(own) == 1:
        return f"{markdown.interval(means[0], halves[0], sign=True)} nats ({verdicts[0]})"
    finite = sorted((mean, half) for mean, half in zip(means, halves, strict=True) if math.isfinite(mean))
    extremes = finite[:1] + finite[1:][-1:]  # of several that diverged but for one, that one
    ends = [markdown.number(mean, markdown.decimals(mean, half), sign=True) for mean, half in extremes]
    return f"{' to '.join(ends)} nats ({tally(verdicts)})" if ends else f"({tally(verdicts)})"


def seen(data: pd.DataFrame, other: str = "baseline", scale: float = 1.0, unit: str = "") -> str:
    """Say which effect the inconclusive comparisons would have seen, times scale, in a sentence; empty where there are none."""
    return would_have_seen(scale * data[data[f"verdict_{other}"] == str(Verdict.OPEN)][f"detectable_{other}"], unit)


def would_have_seen(sizes: Iterable[float], unit: str = "") -> str:
    """Say the same of the effects that each inconclusive comparison would have seen."""
    found = [size for size in sizes if 0 < size < math.inf]  # none of a comparison whose seeds all agree
    if not found:
        return ""
    words = " to ".join(dict.fromkeys(markdown.significant(size, 2) for size in (min(found), max(found))))
    return f" Where inconclusive, an effect of {f'{words} {unit}'.rstrip()} would have been seen in 4 of 5 cases by a single test."


def setting(plan: Plan, data: pd.DataFrame) -> str:
    """Say what was trained on what, in one sentence."""
    config = plan.content[0].configs[0]
    sizes = ", ".join(dict.fromkeys(str(name).split("-", 1)[-1] for name in data.task))
    steps = ", ".join(dict.fromkeys(f"{int(steps)}" for steps in data.steps))
    n = "/".join(str(value) for value in sorted(set(data.n)))
    return (
        f"Scale {plan.spec.scale}, not the paper's models: {model_name(config)} of {sizes} on {data_name(config)}, "
        f"{steps} steps in {config.training.precision}; 95 % intervals of differences paired by seed, n = {n}, Holm's correction "
        "within the exhibit."
    )


def left_out(plan: Plan, data: pd.DataFrame | None = None, longer: Collection[str] = ()) -> str:
    """Say which cells of the exhibit are not complete, and which verdicts may still change; empty when all are complete.

    data: the rows judged against the baseline in one family, entries in `longer` aside. A verdict may change if it would not
    stand were all comparisons still to come of its family null; the others are final.
    """
    if not plan.left:
        return ""
    words = f" Not shown, their runs are not complete: {', '.join(plan.left)}"
    if not plan.growing:
        return f"{words}; their comparisons are a family of their own."
    if data is None:
        return f"{words}; verdicts are so far."
    number = to_come(plan, longer)
    again = judge(data, plan.content[0].study.margin, family=lambda row: row.entry not in longer, more=number)
    moved = changed([_named(row) for row in data.itertuples()], data.verdict_baseline, again.verdict_baseline)
    return (
        f"{words}; verdicts are so far. Were their comparisons with AdamW null, at most {number}, Holm's correction would {moved}."
    )


def changed(names: Iterable[str], before: Iterable[str], after: Iterable[str]) -> str:
    """Say what more comparisons in a family do to its verdicts."""
    moved = [(name, new) for name, old, new in zip(names, before, after, strict=True) if old != new]
    lost = [name if new == Verdict.OPEN else f"{name} ({new})" for name, new in moved]
    return f"leave open {', '.join(lost)}" if lost else "change no verdict"


def to_come(plan: Plan, longer: Collection[str] = ()) -> int:
    """Count the comparisons with the baseline that the incomplete cells will add to the family, at most, `longer` aside.

    At most: a cell may turn out to have the runs of another one.
    """
    study = plan.content[0].study
    found = 0
    for cell in (study.cells[name] for name in plan.left if study.cells[name].part not in DESCRIBED):
        names = [name for name in cell.entries[1:] if name not in longer]
        found += len(names) if cell.choose else sum(len(trials(study, cell, name, 1.0)) for name in names)
    return found


def _named(row: Any) -> str:
    """Name a row of a family: its method, with the radius where none was chosen."""
    return label(row.entry, row.label) + ("" if row.trials or math.isnan(row.rho) else f" at rho {row.rho:g}")


def same_runs(planned: Sequence[Planned]) -> dict[str, str]:
    """Cell -> an earlier cell whose reported runs are its own, as fixed length is where it is 20 tokens a parameter."""
    first: dict[frozenset[str], str] = {}
    found = {one.cell.name: frozenset(c.name for configs in one.reported.values() for c in configs) for one in planned}
    return {name: first[runs] for name, runs in found.items() if first.setdefault(runs, name) != name}


def of_part(planned: Sequence[Planned], *parts: str) -> list[Planned]:
    """The cells of some parts."""
    return [one for one in planned if one.cell.part in parts]
