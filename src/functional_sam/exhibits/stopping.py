"""Early stopping on repeated data, where AdamW overfits: the lowest validation loss that a run met on its way."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits.comparison import differences, label, pair
from functional_sam.exhibits.statistics import estimate
from functional_sam.exhibits.study import Planned
from functional_sam.records import Run


def lowest(config: Config) -> tuple[float, int]:
    """The lowest validation loss of a run in nats per token, and its step: what stopping there would have given, schedule uncut.

    Losses before a divergence count, since a run stopped there would not have met it; inf at step 0 where there is none.
    """
    lines = Run(config).metrics("validation")
    return min(((float(line["loss"]), int(line["step"])) for line in lines), default=(math.inf, 0))


def stopped(one: Planned) -> list[dict[str, Any]]:
    """One row a method of a cell: mean of the lowest losses and of their steps, and differences paired by seed."""
    found = []
    of = {name: [lowest(config) for config in configs] for name, configs in one.reported.items()}
    losses = {name: [loss for loss, _ in values] for name, values in of.items()}
    for name, values in of.items():
        mean = estimate(losses[name])
        row: dict[str, Any] = {"regime": one.cell.regime, "size": one.cell.task, "method": name}
        row |= {"stopped_loss": mean.mean, "stopped_loss_stderr": mean.stderr}
        row["stopped_step"] = estimate([step for _, step in values]).mean
        row |= differences(name, losses, "stopped_")
        found.append(row)
    return found


def with_stopping(data: pd.DataFrame, planned: Sequence[Planned]) -> pd.DataFrame:
    """A comparison with the columns of `stopped` for its cells on repeated data; unchanged where it has none."""
    rows = pd.DataFrame([row for one in planned if one.cell.unique_tokens for row in stopped(one)])
    return data if rows.empty else data.merge(rows, how="left", on=["regime", "size", "method"], sort=False)


def markdown(part: pd.DataFrame) -> list[str]:
    """A cell's rows as a Markdown table."""
    lines = [
        "| method | lowest validation loss on the way (nats/token) | at step | minus AdamW (paired) | verdict "
        "| minus SAM (paired) | verdict |",
        "|" + "---|" * 7,
    ]
    for row in part.itertuples():
        cells = [label(row.method), pair(row.stopped_loss, row.stopped_loss_stderr), f"{row.stopped_step:.0f}"]
        for other in ("adamw", "sam"):
            word = getattr(row, f"stopped_verdict_{other}")
            mean, stderr = (getattr(row, f"stopped_minus_{other}{ending}") for ending in ("", "_stderr"))
            cells += [pair(mean, stderr, "+") if word else "", word]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
