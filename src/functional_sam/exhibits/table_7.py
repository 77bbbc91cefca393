"""table-7: translation from scratch, every method against AdamW at equal steps and with twice the steps; loss, BLEU, chrF."""

import math
from collections.abc import Sequence

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import chosen, counted, differences, label, left_out, level, plan, runs, seen
from functional_sam.exhibits.output import Exhibit, paper_directory
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.published import rows
from functional_sam.exhibits.words import answer
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, estimate, judged, paired_difference
from functional_sam.study.report import difference, frame, tested
from functional_sam.study.tune import Planned
from functional_sam.tasks import TASKS

__all__ = ["draw", "headline", "plan"]

DOUBLE, PLACEBO = "adamw-double", "placebo"
SCORES = {"bleu": "BLEU", "chrf": "chrF"}
NONE = Estimate(math.nan, math.nan, 0)  # nothing to compare with
PUBLISHED = ("sam", "asam")  # rows iwslt14-valid-NAME and iwslt14-test-NAME of paper/numbers.csv


def draw(plan: Plan) -> Exhibit:
    """One table a cell; Holm over the losses of both comparisons of all cells, and apart over those of each score.

    The placebo, AdamW with weights that differ by rounding, is shown and not judged.
    """
    margin = plan.content[0].study.margin
    data = pd.concat([_cell(one, plan.source) for one in plan.content], ignore_index=True)
    data = _judged(data, ["baseline", "double"], lower_is_better=True, margin=margin)
    for score in SCORES:
        data = _judged(data, [score], lower_is_better=False)
    tables = []
    for name, part in data.groupby("cell", sort=False):
        tables += [f"**{name}**\n", _rows(part)] if len(plan.content) > 1 else [_rows(part)]
    tables.append(_signs(data))
    methods = data[~data.entry.isin([DOUBLE, PLACEBO])]
    equal = (_words(methods, other) for other in ("baseline", "double"))
    finding = f"Test loss against AdamW at equal steps: {next(equal)}{_chance(data)}; at equal compute: {next(equal)}."
    caption = f"{finding} {_setting(plan, data)}{seen(data)}{left_out(plan)}"
    said = answer(data[data.entry == "asam"].verdict_baseline, Verdict.BETTER)
    return Exhibit(plan, {"": data}, caption, f"{finding}{seen(data)}", markdown="\n".join(tables), answer=said)


def headline(data: pd.DataFrame) -> str:
    """How the losses compare, at equal steps and at equal compute, in a few words."""
    methods = data[~data.entry.isin([DOUBLE, PLACEBO])]
    equal, double = (differences(methods, other) for other in ("baseline", "double"))
    return f"methods minus AdamW at equal steps {equal}; at equal compute {double}"


def _cell(one: Planned, source: Source) -> pd.DataFrame:
    """The rows of a cell, a method each, with the loss against AdamW with twice the steps, and with what its translations score."""
    data = frame([one], source)
    by_name = one.by_entry
    names = list(data.entry)
    matched = {name: one.study.entries[name].matched for name in names}
    found = {
        name: paired_difference(*(tested(by_name[entry], source, one.cell.best) for entry in (name, matched[name])))
        for name in names
        if matched[name] in by_name
    }
    data["matched"] = [matched[name] for name in names]
    data = _with(data, "double", [found.get(name, NONE) for name in names])
    for score in SCORES:
        values = {name: _scores(configs, source, score, one.cell.best) for name, configs in by_name.items()}
        each = [estimate(values[name]) for name in names]
        data[score], data[f"{score}_stderr"] = [e.mean for e in each], [e.stderr for e in each]
        base = next(iter(by_name))
        data = _with(data, score, [NONE if name == base else paired_difference(values[name], values[base]) for name in names])
    return data


def _with(data: pd.DataFrame, other: str, found: Sequence[Estimate]) -> pd.DataFrame:
    return data.assign(**{f"minus_{other}": [e.mean for e in found], f"minus_{other}_stderr": [e.stderr for e in found]})


def _scores(configs: Sequence[Config], source: Source, score: str, best: bool) -> list[float]:
    """Of every run on the test split; a run that diverged translated nothing and scores 0."""
    key = f"test_{'best_' if best else ''}{score}"
    summaries = [source.summary(config) for config in configs]
    return [0.0 if summary.get("diverged") else float(summary[key]) for summary in summaries]


def _judged(data: pd.DataFrame, others: Sequence[str], *, lower_is_better: bool, margin: float = 0.0) -> pd.DataFrame:
    """Verdicts of all differences of some columns as one family."""
    found = {(place, other): difference(row, other) for place, row in enumerate(data.itertuples()) for other in others}
    family = {key: one for key, one in found.items() if one.n and data.entry.iloc[key[0]] != PLACEBO}
    words = dict(zip(family, judged(list(family.values()), lower_is_better=lower_is_better, margin=margin), strict=True))
    for other in others:
        each = [found[place, other] for place in range(len(data))]
        data[f"verdict_{other}"] = [str(words.get((place, other), Verdict.NONE)) for place in range(len(data))]
        data[f"half_{other}"] = [one.half_width if one.n else math.nan for one in each]
        data[f"detectable_{other}"] = [one.detectable if one.n else math.nan for one in each]
    return data


def _rows(data: pd.DataFrame) -> str:
    columns = ["method", "lr", "rho", "n", "test loss", "loss minus AdamW", "loss minus AdamW, twice the steps"]
    columns += [f"{name} (minus AdamW)" for name in SCORES.values()]
    lines = []
    for row in data.itertuples():
        cells = [label(row.entry, row.label), chosen(row, "lr"), chosen(row, "rho"), runs(row), level(row, 3)]
        for other in ("baseline", "double"):
            found = difference(row, other)
            text = markdown.interval(found.mean, found.half_width, 3, sign=True) if found.n else ""
            cells.append(", ".join(filter(None, (text, getattr(row, f"verdict_{other}")))))
        for score in SCORES:
            found = difference(row, score)
            against = f" ({markdown.interval(found.mean, found.half_width, 2, sign=True)})" if found.n else ""
            cells.append(f"{markdown.number(getattr(row, score), 2)}{against}")
        lines.append(cells)
    return markdown.table(columns, lines, text=columns[5:])


def _signs(data: pd.DataFrame) -> str:
    """Published differences of BLEU beside ours: signs alone, for data, model and steps are others."""
    published = rows(paper_directory() / "numbers.csv")
    lines = []
    for entry in PUBLISHED:
        pairs = [[published[f"iwslt14-{split}-{name}"] for name in (entry, "adam")] for split in ("valid", "test")]
        gains = [float(ours["value"]) - float(theirs["value"]) for ours, theirs in pairs]
        own = [difference(row, "bleu") for row in data[data.entry == entry].itertuples()]
        ours = ", ".join(_sign(found) for found in own)
        lines.append([label(entry), *(markdown.number(gain, 2, sign=True) for gain in gains), ours or "not run"])
    columns = ["BLEU minus Adam", "published, IWSLT14 DE-EN, validation", "published, test", "sign here, test"]
    return "\n**Signs** (published: ids iwslt14-*)\n\n" + markdown.table(columns, lines, text=[columns[3]])


def _sign(found: Estimate) -> str:
    if abs(found.mean) <= found.half_width:  # also where no translation of any seed scores
        return "not significant"
    return "above" if found.mean > 0 else "below"


def _chance(data: pd.DataFrame) -> str:
    """What the placebo did: differences that are no larger are chance."""
    found = [difference(row) for row in data[data.entry == PLACEBO].itertuples()]
    each = [markdown.interval(one.mean, one.half_width, 3, sign=True) for one in found if one.n]
    return f" (a placebo, AdamW's weights jittered by 1e-6: {' and '.join(each)})" if each else ""


def _words(data: pd.DataFrame, other: str) -> str:
    """Methods by verdict, cell by cell where there are several."""
    parts = [(str(name), counted(part, other)) for name, part in data.groupby("cell", sort=False)]
    return parts[0][1] if len(parts) == 1 else ". ".join(f"{name}: {words}" for name, words in parts)


def _setting(plan: Plan, data: pd.DataFrame) -> str:
    """What was trained on what, and what BLEU is worth at this size."""
    config = plan.content[0].configs[0]
    task = TASKS[config.kind]
    names = ", ".join(dict.fromkeys(TASKS[c.kind].data_name(c) for one in plan.content for c in one.configs[:1]))
    low = f"; BLEU is at most {markdown.number(data.bleu.max(), 1)}, too little to judge by" if data.bleu.max() < 5 else ""
    n = "/".join(str(value) for value in sorted(set(data.n)))
    return (
        f"Scale {plan.spec.scale}: {task.model_name(config)} of {config.model.depth} + {config.model.depth} layers of width "
        f"{config.model.width} on {names}, {plan.content[0].cell.steps} steps of {config.training.batch} pairs of at most "
        f"{config.model.length} pieces (tests too), label smoothing {config.training.label_smoothing:g}{low}. "
        f"95 % intervals of differences paired by seed, n = {n}, Holm's correction over all losses."
    )
