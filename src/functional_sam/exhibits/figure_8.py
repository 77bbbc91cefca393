"""figure-8: what drives the logit share: number of outputs, domain, confidence, or the number of targets alone."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from functional_sam.config import Config
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval, number
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.pairs import by_seed
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, by_targets, sentence, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, estimate, holm, significant
from functional_sam.study.regression import Fit, fit

LEAST_R2 = 0.02  # that outputs and domain must add to matter (paper/PROTOCOL.md)
ADDED = ("log outputs", "domain")
SMALL = "small embeddings"
RISES, FALLS, TURNS, UNSEEN, OPEN = "rises", "falls", "turns", "unseen", "open"
TEMPERATURE_MARKERS, STEP_MARKERS = ("v", "o", "^"), ("o", "D")
MODELS: dict[str, tuple[str, ...]] = {"targets, entropy": (), "+ outputs": ADDED[:1], "+ domain": ADDED[1:], "+ both": ADDED}


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW in each cell, each seed, with the shares measured on the way."""
    configs = [
        spec.run(cell["task"], "adamw", seed, overrides, **cell["settings"]) for seed in spec.seeds for cell in spec.cells.values()
    ]
    return Plan.of_known_runs(spec, configs, source)


def outputs(config: Config) -> int:
    """The number of logits."""
    return config.data.vocab if config.kind == "language" else config.data.relabel or 10


def settings_frame(plan: Plan) -> pd.DataFrame:
    """by_targets along eps of the same batch, with outputs and embedding_scale."""
    data = by_targets(plan, lambda config: {"outputs": outputs(config), "embedding_scale": config.model.embedding_scale})
    return (
        data[data.origin == "same"]
        .drop(columns=[name for name in data if name.endswith(("_without_noise", "_gradient")) or name.startswith("square_")])
        .reset_index(drop=True)
    )


def fits(data: pd.DataFrame) -> dict[str, Fit]:
    """log(|delta_logit| / |delta_func|) on a quadratic in log targets and entropy, with and without what may be added to it."""
    return {name: _fitted(data, added) for name, added in MODELS.items()}


def _fitted(data: pd.DataFrame, added: Sequence[str], below_uniform: bool = False, by_setting: bool = False) -> Fit:
    """below_uniform: entropy minus log outputs, its largest value, instead of entropy. by_setting: a cluster holds all its runs."""
    y = np.log(data.norm_logit / data.norm_func)
    a, b = np.log(data.targets.to_numpy(float)), data.entropy.to_numpy(float)
    b = b - np.log(data.outputs.to_numpy(float)) if below_uniform else b
    a, b = a - a.mean(), b - b.mean()
    base = [np.ones_like(a), a, b, a * a, a * b, b * b]
    more = {
        "log outputs": np.log(data.outputs.to_numpy(float)),
        "domain": (data.task == "language").to_numpy(float),
        SMALL: (data.embedding_scale < 1).to_numpy(float),
    }
    setting = (data.task, data.outputs, data.embedding_scale)
    clusters = list(zip(*setting, *([] if by_setting else [data.seed]), strict=True))
    return fit(y, np.stack([*base, *(more[one] for one in added)], 1), clusters)


def contrasts(data: pd.DataFrame) -> dict[str, Estimate]:
    """What is compared in pairs at the last step, most targets, temperature 1: name -> difference of logit shares."""
    end = at_end(data)
    found = {}
    for task in firsts_of(end):
        own = end[(end.task == task) & (end.embedding_scale == 1)]
        least, most = own.outputs.min(), own.outputs.max()
        name = f"{task}, {most:,} minus {least} outputs"
        found[name] = by_seed(own[own.outputs == most], own[own.outputs == least], "share_logit", name)
    small = end[end.embedding_scale < 1]
    same = end[(end.embedding_scale == 1) & (end.task == "language") & end.outputs.isin(small.outputs)]
    name = f"language, embeddings of {small.embedding_scale.min():g} minus 1"
    return found | {name: by_seed(small, same, "share_logit", name)}


def at_end(data: pd.DataFrame) -> pd.DataFrame:
    """The last step, most targets, temperature 1."""
    return data[(data.step == data.step.max()) & (data.targets == data.targets.max()) & (data.temperature == 1)]


def firsts_of(data: pd.DataFrame) -> list[str]:
    """Its tasks."""
    return list(dict.fromkeys(data.task))


def judged_family(data: pd.DataFrame) -> pd.DataFrame:
    """One row a comparison of the family: estimate, half width of its 95 % interval, p, and p by Holm."""
    rows = _coefficients(fits(data)["+ both"])
    for name, one in contrasts(data).items():
        rows.append(
            {"compared": name, "of": "logit share", "estimate": one.mean, "half_width": one.half_width, "p": one.p, "n": one.n}
        )
    found = pd.DataFrame(rows)
    found["p_holm"] = holm(list(found.p))
    return found


def described(data: pd.DataFrame) -> pd.DataFrame:
    """The same two coefficients beside an indicator of the runs with small embeddings; p by Holm with the same three contrasts."""
    rows = _coefficients(_fitted(data, (SMALL, *ADDED)))
    for row, p in zip(rows, holm([*(row["p"] for row in rows), *(one.p for one in contrasts(data).values())]), strict=False):
        row["p_holm"] = p
    return pd.DataFrame(rows)


def below_uniform(data: pd.DataFrame) -> dict[str, Any]:
    """The coefficient of log outputs where models that are as far from uniform are held equal, not those of equal entropy."""
    return _coefficients(_fitted(data, ADDED, below_uniform=True))[0]


def by_setting(data: pd.DataFrame) -> pd.DataFrame:
    """The two coefficients of the family with standard errors clustered by setting, p by Holm with the same three contrasts.

    Outputs and domain are properties of a setting: of other settings its seeds are no further evidence. Described, in no family.
    """
    rows = _coefficients(_fitted(data, ADDED, by_setting=True))
    for row, p in zip(rows, holm([*(row["p"] for row in rows), *(one.p for one in contrasts(data).values())]), strict=False):
        row["p_holm"] = p
    return pd.DataFrame(rows)


def _coefficients(full: Fit) -> list[dict[str, Any]]:
    """A row for each of ADDED, the last columns of the fit."""
    first = len(full.coefficients) - len(ADDED)
    return [
        {
            "compared": name,
            "of": "log ratio",
            "estimate": full.coefficients[first + place],
            "half_width": Estimate(full.coefficients[first + place], full.stderr[first + place], full.clusters).half_width,
            "p": full.p(first + place),
            "n": full.clusters,
        }
        for place, name in enumerate(ADDED)
    ]


def told(data: pd.DataFrame) -> dict[str, str]:
    """Whether the share RISES or FALLS with outputs and with the domain, at equal targets and entropy, or that is UNSEEN or OPEN.

    Unseen too where both together add less than LEAST_R2 to the fit. Open: one of two fits says so and the other does not, that of
    the family and the one with small embeddings told apart. The answer to the claim is by these words.
    """
    signs = []
    fitted = ((judged_family(data), ()), (described(data), (SMALL,)))
    for rows, beside in fitted:
        adds = _fitted(data, (*beside, *ADDED)).r2 - _fitted(data, beside).r2 >= LEAST_R2
        own = rows.set_index("compared").loc[list(ADDED)]
        signs.append([int(np.sign(row.estimate)) if adds and significant(row.p_holm) else 0 for row in own.itertuples()])
    words = {1: RISES, -1: FALLS, 0: UNSEEN}
    return {name: words[one] if one == other else OPEN for name, one, other in zip(ADDED, *signs, strict=True)}


def in_short(data: pd.DataFrame) -> dict[str, str]:
    """The same for a headline: TURNS where the share rises or falls with outputs, and the other way at equal distance from uniform.

    That fit was thought of after the result, and changes words, never the answer.
    """
    found, against = told(data), below_uniform(data)
    sign = {RISES: 1, FALLS: -1}.get(found["log outputs"], 0)
    return found | ({"log outputs": TURNS} if sign * against["estimate"] < -against["half_width"] else {})


def draw(plan: Plan) -> Exhibit:
    """Share against outputs and against entropy; the cosine at the first step; what is explained by what."""
    data = settings_frame(plan)
    tests, beside, models = judged_family(data), described(data), fits(data)
    style.use()
    figure, ((by_outputs, by_entropy), (cosines, explained)) = plt.subplots(2, 2, figsize=(style.PAGE, 5.2))
    end = at_end(data)
    for task in firsts_of(data):
        color = style.TASK_COLOR.get(task, "#777777")
        own = end[end.task == task]
        _means(by_outputs, own[own.embedding_scale == 1], "outputs", "share_logit", color, "-")
        _means(by_outputs, own[own.embedding_scale < 1], "outputs", "share_logit", color, "", marker="s")
        seen = data[(data.task == task) & (data.targets == data.targets.max())]
        for place, (_, part) in enumerate(seen.groupby("temperature")):
            by_entropy.scatter(
                part.entropy, part.share_logit, s=7, marker=TEMPERATURE_MARKERS[place % 3], color=color, alpha=0.55, linewidths=0
            )
    _cosines(cosines, data)
    _explained(explained, models)
    by_outputs.set(xscale="log", xlabel="outputs (classes, or pieces of the vocabulary)", ylabel="logit share", ylim=(0, 1.02))
    by_entropy.set(xlabel="entropy of the softmax (nats per target)", ylabel="logit share", ylim=(0, 1.02))
    by_outputs.set_title(f"Step {data.step.max():,}: the share against outputs")
    by_entropy.set_title("All steps and temperatures: against entropy")
    cosines.set_title(r"Cosine of $\delta_{logit}$ and $\delta_{func}$ by initial embedding")
    explained.set_title(r"Variance of $\log\,|\delta_{logit}|/|\delta_{func}|$ explained by")
    finding = f"{sentence(_plainly(data))} {_finding(data)}"
    figure.tight_layout()
    _legends(figure, data)
    style.finding_above(figure, finding)
    plain = tests[tests.compared.str.endswith("outputs") & ~tests.compared.isin(ADDED)]
    words = [
        (Verdict.BETTER if row.estimate > 0 else Verdict.WORSE) if significant(row.p_holm) else Verdict.OPEN
        for row in plain.itertuples()
    ]
    words += [{RISES: Verdict.BETTER, FALLS: Verdict.WORSE}.get(word, Verdict.OPEN) for word in told(data).values()]
    frames = {"": data, "tests": tests, "apart": beside}
    said = answer(words, Verdict.BETTER)
    return Exhibit(plan, frames, _caption(plan, data, finding, beside), _verdict(tests, models), figure, answer=said)


WORDS = {  # what the finding says of each
    "log outputs": {
        RISES: "grows with the number of outputs",
        FALLS: "falls with the number of outputs",
        TURNS: "depends on the number of outputs (it grows with them at equal entropy, and falls at equal distance from uniform)",
        UNSEEN: "is not seen to depend on the number of outputs",
        OPEN: "may depend on the number of outputs (open)",
    },
    "domain": {
        RISES: "is larger in language",
        FALLS: "is smaller in language",
        UNSEEN: "has no constant difference between the domains",
        OPEN: "may depend on the domain (open)",
    },
}


def headline(data: pd.DataFrame) -> str:
    """What the two tests of the fit say, in a few words."""
    found, models = in_short(data), fits(data)
    short = {"log outputs": {RISES: "grows with outputs", FALLS: "falls with outputs"}, "domain": WORDS["domain"]}
    named = [f"it {short[name][word]}" for name, word in found.items() if word in (RISES, FALLS)]
    named += ["it depends on outputs"] if found["log outputs"] == TURNS else []
    named += [f"{name.removeprefix('log ')} is open" for name, word in found.items() if word == OPEN]
    seen = ", ".join(named) or "it depends on neither outputs nor domain"
    base, both = (number(models[name].r2, 2) for name in ("targets, entropy", "+ both"))
    return f"{_plainly(data)}; given targets and entropy {seen} (R2 {base}, both {both})"


def _plainly(data: pd.DataFrame) -> str:
    """The share of fewest and most classes of the same images, as it is, with the interval over seeds."""
    own = at_end(data)
    own = own[own.task.eq("vision") & own.embedding_scale.eq(1)]
    least, most = own.outputs.min(), own.outputs.max()
    shares = (estimate(list(own[own.outputs == count].groupby("seed").share_logit.mean())) for count in (least, most))
    few, many = (interval(one.mean, one.half_width, 2) for one in shares)
    return f"logit share {few} at {least} classes, {many} at {most}"


def _means(axis: Axes, part: pd.DataFrame, x: str, y: str, color: str, dash: Any, marker: str = "o") -> None:
    """Means over seeds with their 95 % t intervals as bars."""
    groups = [(at, estimate(list(values))) for at, values in part.groupby(x)[y]]
    if groups:
        halves = [style.bar(one.half_width) for _, one in groups]
        xs, means = [at for at, _ in groups], [one.mean for _, one in groups]
        face = color if marker == "o" else "white"
        axis.errorbar(xs, means, halves, color=color, linestyle=dash, marker=marker, markerfacecolor=face, capsize=2, linewidth=1)


def _cosines(axis: Axes, data: pd.DataFrame) -> None:
    own = data[(data.targets == data.targets.max()) & (data.temperature == 1)]
    small = own[own.embedding_scale < 1]
    groups = {
        "vision": own[own.task == "vision"],
        "language": own[(own.task == "language") & (own.embedding_scale == 1) & own.outputs.isin(small.outputs)],
        "language, small": small,
    }
    for place, (name, part) in enumerate(groups.items()):
        color = style.TASK_COLOR[name.split(",")[0]]
        for shift, step, marker in zip((-0.12, 0.12), (own.step.min(), own.step.max()), STEP_MARKERS, strict=True):
            found = estimate(list(part[part.step == step].groupby("seed").cosine.mean()))
            axis.errorbar([place + shift], [found.mean], [style.bar(found.half_width)], color=color, marker=marker, capsize=2)
    axis.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    scale = small.embedding_scale.min() if len(small) else math.nan
    axis.set_xticks(range(3), ["vision,\nall classes", "language,\nembeddings x 1", f"language,\nembeddings x {scale:g}"])
    axis.set(ylim=(-1.05, 1.05), ylabel="cosine")


def _explained(axis: Axes, models: dict[str, Fit]) -> None:
    names = list(models)[::-1]
    axis.barh(range(len(names)), [models[name].r2 for name in names], color="#999999", height=0.6)
    for place, name in enumerate(names):
        axis.annotate(
            number(models[name].r2, 3), (models[name].r2, place), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(0, 1.12), xlabel=r"$R^2$")


def _legends(figure: Figure, data: pd.DataFrame) -> None:
    """All marks above the panels: inside of one they would cover points."""

    def grey(marker: str, label: str, face: str = "#555555") -> Line2D:
        return Line2D([], [], color="#555555", marker=marker, markerfacecolor=face, linestyle="", label=label)

    marks = [Line2D([], [], color=style.TASK_COLOR.get(t, "#777777"), label=style.TASK_LABEL.get(t, t)) for t in firsts_of(data)]
    marks.append(grey("s", f"initial embeddings x {data.embedding_scale.min():g} (first panel)", "white"))
    for marker, temperature in zip(TEMPERATURE_MARKERS, sorted(set(data.temperature)), strict=False):
        marks.append(grey(marker, f"temperature {temperature:g} (second panel)"))
    for marker, step in zip(STEP_MARKERS, (data.step.min(), data.step.max()), strict=True):
        marks.append(grey(marker, f"step {step:,} (third panel)"))
    figure.legend(handles=marks, loc="lower center", ncol=4, bbox_to_anchor=(0.5, 1.0))


def _finding(data: pd.DataFrame) -> str:
    found, models = in_short(data), fits(data)
    base, both = (number(models[name].r2, 2) for name in ("targets, entropy", "+ both"))
    explained = f"(R2 {base}, with both {both})"
    if set(found.values()) == {UNSEEN}:
        return f"Given targets and entropy, outputs and domain add nothing to the logit share {explained}"
    words = " and ".join(WORDS[name][word] for name, word in found.items())
    return f"Given targets and entropy, the logit share {words} {explained}"


def _caption(plan: Plan, data: pd.DataFrame, finding: str, beside: pd.DataFrame) -> str:
    full, either_open = fits(data)["+ both"], OPEN in told(data).values()
    meaning = "open: significant in one of two fits and not in the other, the second" if either_open else "beside it a fit"
    other = below_uniform(data)
    turned = interval(other["estimate"], other["half_width"], 2, sign=True)
    there = ", ".join(f"{row.compared} {interval(row.estimate, row.half_width, 2, sign=True)}" for row in beside.itertuples())
    settings = by_setting(data)
    wide = ", ".join(
        f"{row.compared} {interval(row.estimate, row.half_width, 2, sign=True)} (p {number(row.p_holm, 2)})"
        for row in settings.itertuples()
    )
    return (
        f"{finding}. AdamW on the same changed images with more or fewer classes and on the same text with more or fewer pieces, "
        "logits divided by temperatures when measuring, log(|delta_logit| / |delta_func|) fitted by a quadratic in log targets and "
        f"entropy, gradient ascent, eps of the same batch ({data.targets.max()} targets in the drawn points); scale "
        f"{plan.spec.scale}, not the paper's: {sizes(plan.configs)}. "
        f"n={len(plan.spec.seeds)} seeds a setting, {full.rows} measurements of {full.clusters} runs (standard errors clustered by "
        "run), bars are 95 % t intervals, Holm's correction over the five comparisons of the protocol; "
        f"{meaning} with an indicator for the runs of small embeddings, all in language (there: {there}). Where entropy minus its "
        f"largest value, log outputs, is held equal and not entropy: log outputs {turned}. The runs are of {settings.n.iloc[0]} "
        f"settings; clustered by these, as other settings ask for: {wide}."
    )


def _verdict(tests: pd.DataFrame, models: dict[str, Fit]) -> str:
    said = [
        f"{row.compared} {interval(row.estimate, row.half_width, 3, sign=True)} ({row.of}, p {number(row.p_holm, 4)}, n={row.n})"
        for row in tests.itertuples()
    ]
    explained = ", ".join(f"{name} {number(one.r2, 3)}" for name, one in models.items())
    return f"R2: {explained}; {'; '.join(said)} (95 % intervals, p by Holm)."
