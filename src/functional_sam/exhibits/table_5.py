"""table-5: every method on clean images, ViT and residual network: accuracy and loss at the best checkpoint."""

import pandas as pd

from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import chosen, counted, label, left_out, level, plan, seen
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.vision import DOUBLES, POINTS, accuracies, baseline, gained, percent, points, published, setting
from functional_sam.exhibits.words import answer, tally
from functional_sam.study.compare import Verdict

__all__ = ["draw", "headline", "plan"]

PUBLISHED = [
    *(f"imagenet-{model}-{method}" for model in ("vit-s-32", "vit-s-16", "resnet-50") for method in ("vanilla", "sam", "gsam")),
    *(f"cifar10-error-vit-{size}-{method}" for size in ("ti", "s") for method in ("adam", "gr")),
]


def draw(plan: Plan) -> Exhibit:
    """One row an entry and model; Holm over all differences to the baseline, and over all to it with twice the epochs."""
    data = accuracies(plan.content, plan.source)
    equal = data[~data.entry.isin(DOUBLES)]
    words = "; ".join(f"{name}: {counted(part)}" for name, part in equal.groupby("model", sort=False))
    finding = f"Against {baseline(data)} at equal epochs: {words}.{seen(equal, scale=POINTS, unit='points')}"
    apart = "; ".join(f"{name}: {counted(part, 'longer')}" for name, part in data.groupby("model", sort=False))
    verdict = f"{finding} Against {baseline(data)} with twice the epochs: {apart}."
    caption = f"{finding} {setting(plan.content, plan.spec.scale, data.n, 'the table')}{left_out(plan, data, DOUBLES)}"
    tables = [rows(data), "\n**Published**, on other data, with other models and budgets\n", published(PUBLISHED)]
    said = answer(data[data.entry == "sam"].verdict_baseline, Verdict.BETTER)
    return Exhibit(plan, {"": data}, caption, verdict, markdown="\n".join(tables), answer=said)


def headline(data: pd.DataFrame) -> str:
    """SAM's difference on each model, and how many comparisons at equal epochs came out how, in a few words."""
    own = data[~data.entry.isin(DOUBLES)]
    words = [word for word in own.verdict_baseline if isinstance(word, str) and word]
    sam = [f"{gained(row)} points ({row.model})" for row in own[own.entry.eq("sam")].itertuples()]
    base = baseline(data)
    each = "their baseline" if "(" in base else base
    return f"SAM minus {base} {', '.join(sam)}; of {len(words)} methods against {each} {tally(words)}"


def rows(data: pd.DataFrame) -> str:
    """The table; accuracy and differences in per cent, loss in nats per image."""
    columns = ["model", "method", "lr", "rho", "weight decay", "accuracy (%)", "loss (nats)"]
    columns += [f"minus {baseline(data)}, verdict", f"minus {baseline(data)} for twice the epochs, verdict"]
    lines = []
    for row in data.itertuples():
        cells = [row.model, label(row.entry, row.label), chosen(row, "lr"), chosen(row, "rho"), f"{row.weight_decay:g}"]
        cells.append(percent(row) + (f" ({row.diverged} of {row.n} diverged)" if row.diverged else ""))
        loss = level(row, 3, "test_loss")
        lines.append([*cells, loss, points(row, "baseline"), points(row, "longer")])
    return markdown.table(columns, lines, text=["method", *columns[-2:]])
