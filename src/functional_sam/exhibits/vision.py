"""What table-5 and figure-10 share: a row an entry with accuracy, loss and noise, against AdamW, and for twice the epochs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import by_family, label, level
from functional_sam.exhibits.output import paper_directory
from functional_sam.exhibits.published import rows
from functional_sam.records import Source
from functional_sam.study.compare import estimate
from functional_sam.study.report import difference, frame, judge
from functional_sam.study.tune import Planned
from functional_sam.tasks import TASKS

AUGMENTED = {"crop-flip": "shifted and mirrored at random", "inception": "cropped and mirrored at random"}
POINTS = 100  # of accuracy, in 1
LONGER = {"longer": ("adamw-double", "sgd-double")}  # column -> what a row is compared with besides: the first that is there
DOUBLES = frozenset(name for names in LONGER.values() for name in names)


def accuracies(planned: Sequence[Planned], source: Source, best: bool = True) -> pd.DataFrame:
    """The frame of the study at the best or the last checkpoint, with model, noise, test loss and functional share.

    Judged against AdamW, and apart against AdamW with twice the epochs: Holm over all rows of equal epochs each time, each part
    that is only described in a family of its own.
    """
    of = [dataclasses.replace(one, cell=dataclasses.replace(one.cell, best=best)) for one in planned]
    data = frame(of, source, others=LONGER)
    more = [_more(one, configs, source, best) for one in of for configs in one.reported.values()]
    data = pd.concat([data, pd.DataFrame(more)], axis=1)
    families = by_family(data)
    for other in ("baseline", "longer"):
        families = [judge(own, of[0].study.margin, other, family=lambda row: row.entry not in DOUBLES) for own in families]
    return pd.concat(families).sort_index()


def _more(one: Planned, configs: list[Config], source: Source, best: bool) -> dict[str, Any]:
    config = configs[0]
    loss = estimate([_loss(source.summary(c), best) for c in configs])
    shares = [source.metrics(c, "decompose")[-1:] for c in configs]
    last = [float(lines[0]["gradient"]["share"]) for lines in shares if lines and lines[0]["step"] == config.training.steps]
    return {
        "model": TASKS[config.kind].model_name(config),
        "activation": config.model.activation,
        "noise": config.data.noise,
        "test_loss": loss.mean,
        "test_loss_stderr": loss.stderr,
        "share_func_last": estimate(last).mean if last else math.nan,
    }


def _loss(summary: dict[str, Any], best: bool) -> float:
    value = summary.get(f"test_{'best_' if best else ''}loss")
    return math.inf if value is None else float(value)


def baseline(data: pd.DataFrame) -> str:
    """What rows are compared with, the first entry of each cell: AdamW; where it is not one for all, whose is which."""
    own = {row.model: label(row.entry, row.label) for row in data.drop_duplicates("cell").itertuples()}
    first, *others = dict.fromkeys(own.values())
    apart = ", ".join(f"{name} for {model}" for model, name in own.items() if name != first)
    return f"{first} ({apart})" if others else first


def gained(row: Any, other: str = "baseline") -> str:
    """Points of accuracy over AdamW and their 95 % interval, to a tenth even of what rounds to zero; or that a run diverged."""
    found = difference(row, other)
    if not math.isfinite(found.mean):
        return "(diverged)"
    text = f"{POINTS * found.mean:+.1f}"
    text += f" \N{PLUS-MINUS SIGN} {POINTS * found.half_width:.1f}" if math.isfinite(found.half_width) else ""
    return text.replace("-", markdown.MINUS)


def percent(row: Any) -> str:
    """Accuracy in per cent and the 95 % interval of its mean."""
    return level(row, 1, unit=POINTS)


def points(row: Any, other: str) -> str:
    """A difference in points of accuracy, its 95 % interval and verdict."""
    found = difference(row, other)
    if not found.n:
        return ""
    words = (
        "diverged" if math.isinf(found.mean) else markdown.interval(POINTS * found.mean, POINTS * found.half_width, 1, sign=True)
    )
    return f"{words}, {getattr(row, f'verdict_{other}')}"


def published(ids: Sequence[str]) -> str:
    """Rows of paper/numbers.csv as a table, with their ids; what we know from others alone is marked."""
    found = rows(paper_directory() / "numbers.csv")
    cells = [[found[name][key] for key in ("dataset", "model", "method", "value", "unit")] for name in ids]
    standing = {name: "" if found[name]["standing"] == "first-hand" else f", {found[name]['standing']}" for name in ids}
    sources = [[f"{found[name]['source']}{standing[name]}", name] for name in ids]
    lines = [[*row, *more] for row, more in zip(cells, sources, strict=True)]
    columns = ["data", "model", "method", "value", "unit", "source", "id"]
    return markdown.table(columns, lines, text=["model", "method", "unit", "source", "id"])


def setting(planned: Sequence[Planned], scale: str, ns: Sequence[int], family: str) -> str:
    """What was trained on what, in one sentence."""
    config = planned[0].configs[0]
    training, data = config.training, config.data
    images = f"{data.unique_images:,} images of {data.images}" if data.unique_images else data.images
    n = "/".join(str(value) for value in sorted(set(ns)))
    return (
        f"Scale {scale}: {images}{_augmented(planned)}, in {training.precision}; checkpoints chosen on clean validation images, "
        f"95 % intervals of differences paired by seed, n = {n}, Holm's correction within {family}."
    )


def _augmented(planned: Sequence[Planned]) -> str:
    """Which models see other images in each epoch, in brackets; empty where none does."""
    names: dict[str, list[str]] = {}
    for config in (one.configs[0] for one in planned):
        if config.data.augment:
            names.setdefault(AUGMENTED[config.data.augment], []).append(TASKS[config.kind].model_name(config))
    words = "; ".join(f"{', '.join(dict.fromkeys(models))}: {how}" for how, models in names.items())
    return f" ({words})" if words else ""
