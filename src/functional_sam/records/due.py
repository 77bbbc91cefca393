"""The lines of metrics.jsonl that training writes by a config: a file that lacks one of them, or has one twice, is not whole."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from functional_sam.config import Config
from functional_sam.log_spaced import measure_steps

PLAIN = ("adamw", "plain")  # methods without a dose


def lines_due(config: Config) -> Counter[tuple[str, int]]:
    """(kind, step) -> how many lines a complete run has, of the kinds whose steps its config says.

    Not of "train", which go by runtime.log_every, that another attempt at the run may have set otherwise, nor of "test", which are
    where the validation improved.
    """
    training, measure = config.training, config.measure
    every = training.eval_every or training.steps
    found = Counter({("validation", step): 1 for step in (*range(every, training.steps, every), training.steps)})
    if config.method.name not in PLAIN:
        found.update(("dose", step) for step in measure_steps(measure.doses, training.steps))
    points = sorted(measure_steps(measure.points, training.steps))
    for step in points:
        if measure.targets:
            numbers = len(measure.targets) + (len(measure.more_targets) if step in points[::-1][::2] else 0)
            found["targets", step] = numbers * len(measure.temperatures)
        elif "gradient" in measure.ascents or step >= measure.adam_from:
            found["decompose", step] = 1
    return found


def at_fault(config: Config, lines: Iterable[dict[str, Any]], until: int) -> str:
    """In words, the first step up to `until` of which lines are lost, or are there more than once; "" where there is none."""
    due = {place: number for place, number in lines_due(config).items() if place[1] <= until}
    there = Counter((line["kind"], line["step"]) for line in lines)
    for (kind, step), number in sorted(due.items(), key=lambda item: item[0][1]):
        if there[kind, step] != number:
            return f"{there[kind, step]} lines of kind {kind} at step {step}, where training wrote {number}"
    return ""
