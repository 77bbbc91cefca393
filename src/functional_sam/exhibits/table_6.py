"""table-6: fine-tuning at equal steps and at equal compute, and transfer to domains that were not trained on."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import (
    chosen,
    counted,
    differs,
    label,
    left_out,
    level,
    plan,
    runs,
    seen,
    with_verdict,
)
from functional_sam.exhibits.comparison import headline as overall
from functional_sam.exhibits.output import Exhibit, paper_directory
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.published import Gain, gains
from functional_sam.exhibits.words import answer, metric_label
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, estimate, paired_difference
from functional_sam.study.report import frame, judge
from functional_sam.study.tune import Planned
from functional_sam.tasks import TASKS

__all__ = ["draw", "headline", "plan"]

PLACES = ("at home", "on other domains")  # where a run is tested
IDLE = 1e-4  # dose below which a method did nothing

SCRATCH = "loss"  # the metric of what is not fine-tuned: a language model
DOUBLES = ("adamw-double", "adafactor-double")


def draw(plan: Plan) -> Exhibit:
    """A block a task, one of transfer, one of published signs; Holm over all comparisons with one baseline, apart for losses.

    The claim at home is of fine-tuning: a language model that is trained from scratch is there for its transfer.
    """
    margin = plan.content[0].study.margin
    data = rows(plan.content, plan.source)
    for other in ("baseline", "sam", "double"):
        data = judge(data, margin, other)
    at_home, away = data[~data.transfer], data[data.transfer]
    blocks = [_block(own) for _, own in at_home.groupby(["task", "tested_on", "data_share"], sort=False)]
    blocks += [_transfer(own) for _, own in away.groupby(["task", "data_share"], sort=False)]
    blocks.append(_published(data))
    finding = _finding(at_home, away)
    caption = f"{finding} {_setting(plan, data)}{_idle(data)}{left_out(plan)}"
    tuned = at_home[at_home.metric != SCRATCH]
    tram = away[away.entry.str.startswith("tram")]
    said = answer([*tuned[tuned.method == "sam"].verdict_baseline, *tram.verdict_baseline], Verdict.BETTER)
    return Exhibit(plan, {"": data}, caption, finding, markdown="\n".join(blocks), answer=said)


def headline(data: pd.DataFrame) -> str:
    """How many comparisons came out how, in and outside the trained domain, in a few words."""
    own = data[~data.entry.isin(DOUBLES)]
    home, away = own[~own.transfer], own[own.transfer]
    counts = [[str(word) for word in part.verdict_baseline if isinstance(word, str) and word] for part in (home, away)]
    better = [sum(Verdict(word).sign > 0 for word in words) for words in counts]  # also where AdamW diverged
    found = [f"{own} of {len(words)} {where}" for own, words, where in zip(better, counts, PLACES, strict=True) if words]
    return f"better than AdamW: {', '.join(found)}"


def rows(planned: Sequence[Planned], source: Source) -> pd.DataFrame:
    """A row an entry and a set it was tested on, each run's own and those of transfer; entries of two cells of a task once."""
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    doubles = {_setting_of(configs): configs for one in planned for name, configs in one.by_entry.items() if name in DOUBLES}
    for one in planned:
        base, sam = one.by_entry[one.cell.entries[0]], one.by_entry.get("sam")
        table = frame([one], source).to_dict("records")
        for row, (name, configs) in zip(table, one.by_entry.items(), strict=True):
            first = configs[0]
            others = {
                "baseline": base if configs is not base else None,
                "sam": sam if name not in (one.cell.entries[0], "sam") else None,
                "double": doubles.get(_setting_of(base)) if name not in (one.cell.entries[0], *DOUBLES) else None,
            }
            for on in (home_of(first), *first.data.transfer):
                values = tested_on(configs, source, on)
                mean = estimate(values)
                own = {
                    **row,
                    "home": home_of(first),
                    "tested_on": on,
                    "transfer": on != home_of(first),
                    "data_share": first.data.share,
                }
                own |= {"test": mean.mean, "test_stderr": mean.stderr}
                for other, theirs in others.items():
                    difference = Estimate(math.nan, math.nan, 0)
                    if theirs is not None:
                        difference = paired_difference(values, tested_on(theirs, source, on))
                    own |= {f"minus_{other}": difference.mean, f"minus_{other}_stderr": difference.stderr}
                found.setdefault(
                    (one.cell.task, on, name, *(config.name for config in configs)), {str(key): v for key, v in own.items()}
                )
    return pd.DataFrame(list(found.values()))


def home_of(config: Config) -> str:
    """What a run was trained on, by name."""
    return config.data.texts or " + ".join(config.data.sources)


def _setting_of(configs: Sequence[Config]) -> tuple[object, ...]:
    """What two cells have in common whose runs can be paired, but for the steps."""
    data = configs[0].data
    return (
        configs[0].task,
        home_of(configs[0]),
        data.share,
        configs[0].training.batch,
        *(config.training.init_seed for config in configs),
    )


def tested_on(configs: Sequence[Config], source: Source, texts: str) -> list[float]:
    """The metric of every run on a set of texts, infinitely bad where it diverged."""
    metric = TASKS[configs[0].kind].metric
    key = f"test_{metric.name}" + ("" if texts == home_of(configs[0]) else f"_{texts}")
    summaries = [source.summary(config) for config in configs]
    bad = math.inf if metric.lower_is_better else -math.inf
    return [bad if summary.get("diverged") else float(summary[key]) for summary in summaries]


def _block(own: pd.DataFrame) -> str:
    first = own.iloc[0]
    unit = metric_label(first.metric)
    base = label(first.entry, first.label)
    columns = ["method", "lr", "rho", "dose", "n", unit, f"minus {base}, verdict"]
    double = own.minus_double.notna().any()
    columns += [f"minus {base} with twice the steps, verdict"] if double else []
    lines = []
    for row in own.itertuples():
        cells = [label(row.entry, row.label), chosen(row, "lr"), chosen(row, "rho"), markdown.significant(row.dose, 2)]
        cells += [runs(row), level(row)]
        lines.append([*cells, with_verdict(row, "baseline"), *([with_verdict(row, "double")] if double else [])])
    by = "" if first.tested_on == first.task else f" ({first.task})"
    what = "from scratch" if first.metric == SCRATCH else f"{first.data_share:.0%} of its texts"
    title = f"**{first.tested_on}**{by}, {what}, {own.steps.min()} steps of {first.batch}\n"
    return f"{title}\n{markdown.table(columns, lines, text=columns[6:])}"


def _transfer(own: pd.DataFrame) -> str:
    """Tested without training: a column a domain."""
    domains = list(dict.fromkeys(own.tested_on))
    columns = ["method", *(f"{domain}, minus AdamW" for domain in domains)]
    lines = []
    for name, of in own.groupby("entry", sort=False):
        if name != "adamw":
            by_domain = {row.tested_on: row for row in of.itertuples()}
            cells = [with_verdict(by_domain[domain], "baseline") if domain in by_domain else "" for domain in domains]
            lines.append([label(str(name), of.label.iloc[0]), *cells])
    base = own[own.entry == "adamw"]
    levels = ", ".join(f"{row.tested_on} {markdown.number(row.test)}" for row in base.itertuples())
    scratch = own.metric.iloc[0] == SCRATCH
    trained = f"{own.home.iloc[0]} from scratch" if scratch else own.home.iloc[0]
    where = f"{', '.join(domains)}, nats per token" if scratch else "the same scale"
    return (
        f"\n**Transfer**: trained on {trained}, tested without training on {where} (AdamW: {levels})\n\n"
        f"{markdown.table(columns, lines, text=columns[1:])}"
    )


def _published(data: pd.DataFrame) -> str:
    """The signs that were published, beside ours; levels are not compared."""
    tuned = data[data.metric != SCRATCH]
    home, away = tuned[~tuned.transfer], tuned[tuned.transfer]
    columns = ["published", "method minus its baseline, points", "positive", "the same method here"]
    lines = []
    for group in gains(paper_directory() / "numbers.csv"):
        own = (away if group.transfer else home)[lambda part, name=group.method: part.entry == name]
        here = ", ".join(f"{row.tested_on} {differs(row, 'baseline')}" for row in own.itertuples())
        lines.append(
            [
                f"{label(group.method)}, {group.title}",
                _words(group),
                f"{sum(value > 0 for _, value in group.values)} of {len(group.values)}",
                here,
            ]
        )
    ids = "ids glue-delta-*, superglue-*, xnli-*; levels are not compared"
    return f"\n**Signs that were published** ({ids})\n\n{markdown.table(columns, lines, text=columns[1:])}"


def _words(group: Gain) -> str:
    return ", ".join(f"{name} {markdown.number(value, 2, sign=True)}" for name, value in group.values)


def _finding(home: pd.DataFrame, away: pd.DataFrame) -> str:
    by_task = home.groupby(["task", "tested_on", "data_share"], sort=False)
    parts = [f"on {share:.0%} of {on} {counted(own)}" for (_, on, share), own in by_task]
    parts += [f"on other domains {overall(away)}"] if len(away) else []
    double = home[home.minus_double.notna()]
    twice = f". Against AdamW with twice the steps: {counted(double, 'double')}" if len(double) else ""
    return f"Against AdamW at equal steps: {'; '.join(parts)}{twice}.{seen(home)}"


def _setting(plan: Plan, data: pd.DataFrame) -> str:
    configs = [one.configs[0] for one in plan.content]
    models = dict.fromkeys(f"{TASKS[c.kind].model_name(c)}{_sizes(c)}, {c.training.precision}" for c in configs)
    rows = "/".join(dict.fromkeys(str(c.training.test_rows or "all") for c in configs))
    n = "/".join(str(value) for value in sorted(set(data.n)))
    apart = ", apart for losses" if data.metric.nunique() > 1 and (data.metric == SCRATCH).any() else ""
    return (
        f"Scale {plan.spec.scale}: {'; '.join(models)}; the test split of {rows} texts read once; 95 % intervals of "
        f"differences paired by seed (head or weights, order, dropout), n = {n}, Holm's correction over all comparisons with one "
        f"baseline{apart}."
    )


def _idle(data: pd.DataFrame) -> str:
    """Methods whose radius changed no gradient to speak of: comparing them says nothing of them."""
    own = data[data.dose.lt(IDLE) & data.rho.notna()]
    words = [f"{label(name, part.label.iloc[0])} on {', '.join(dict.fromkeys(part.task))}" for name, part in own.groupby("entry")]
    return f" Of so small a dose (below {IDLE:g}) that nothing is said of the method: {'; '.join(words)}." if words else ""


def _sizes(config: Config) -> str:
    """Of a model that is made here, in words; empty for a pretrained one."""
    return "" if config.model.pretrained else f" from scratch of width {config.model.width}, depth {config.model.depth}"
