"""Words and numbers that several exhibits share."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.style import named
from functional_sam.study.compare import Verdict
from functional_sam.tasks import TASKS

NOT_TESTED = "not tested"


def sizes(configs: Sequence[Config]) -> str:
    """What was trained on each task, one clause a task."""
    return "; ".join(
        f"{task}: {model(c)}, {c.training.steps} steps of {c.training.batch} {row_name(c)} of {data_name(c)} "
        f"in {c.training.precision}"
        for task, c in firsts(configs).items()
    )


def model(config: Config) -> str:
    """The model of a run and its size."""
    return f"{model_name(config)} of width {config.model.width}, depth {config.model.depth}"


def model_name(config: Config) -> str:
    """The kind of a run's model as readers know it: ViT, decoder."""
    return named(TASKS[config.kind].model_name(config))


def data_name(config: Config) -> str:
    """A run's data as readers know them: Fashion-MNIST, news + encyclopedia."""
    return named(TASKS[config.kind].data_name(config))


def metric_label(name: str) -> str:
    """A metric with its unit, as an axis has it."""
    return next(task.metric.label for task in TASKS.values() if task.metric.name == name)


def row_name(config: Config) -> str:
    """What a row of a batch is: an image, or a row of tokens."""
    return "images" if TASKS[config.kind].unit == "images" else "rows"


def rows(configs: Sequence[Config]) -> str:
    """The held-out rows of a measurement, task by task."""
    return ", ".join(f"{c.measure.rows} in {task}" for task, c in firsts(configs).items())


def firsts(configs: Sequence[Config]) -> dict[str, Config]:
    """The first config of each task."""
    found: dict[str, Config] = {}
    for config in configs:
        found.setdefault(config.task, config)
    return found


def by_targets(plan: Plan, about: Callable[[Config], dict[str, Any]] = lambda _: {}) -> pd.DataFrame:
    """One row per task, seed, step, number of targets, temperature, ascent and origin of eps (the same batch, or another).

    share_logit is |delta_logit| / (|delta_logit| + |delta_func|). ..._without_noise: by the inner products of two half batches, of
    which one that came out negative counts as zero; nan where eps is of the same batch. square_...: these products as they are, of
    the gradient too. about: more columns of a run.
    """
    rows = []
    for config in plan.configs:
        own = {"task": config.task, "seed": config.training.init_seed, **about(config)}
        for line in plan.source.metrics(config, "targets"):
            place = {key: line[key] for key in ("step", "targets", "temperature")}
            seen = {key: line[key] for key in ("loss", "entropy", "norm")}
            # Records released before these were measured lack them; figure-8 draws without.
            seen |= {key: line.get(key, math.nan) for key in ("norm_gradient", "square_gradient")}
            for ascent in config.measure.ascents:
                for origin, found in line.get(ascent, {}).items():
                    rows.append({**own, **place, "ascent": ascent, "origin": origin, **seen, **found})
    data = pd.DataFrame(rows)
    data["share_logit"] = 1.0 - data.pop("share")
    for part in ("logit", "func"):
        data[f"norm_{part}_without_noise"] = np.sqrt(data[f"square_{part}"].clip(lower=0.0))
    data["share_logit_without_noise"] = data.norm_logit_without_noise / (
        data.norm_logit_without_noise + data.norm_func_without_noise
    )
    return data


def answer(verdicts: Iterable[object], wanted: Verdict) -> str:
    """What comparisons say to a claim of better (or worse): all of them are asked; empty and missing verdicts are none.

    holds: so in every one; holds in k of n: in some, the opposite in none; opposite, opposite in k of n: the other way round.
    mixed: both are there. not seen: no difference in every one. not tested: nothing is asked. Else inconclusive.
    """
    words = [Verdict(word) for word in verdicts if isinstance(word, str) and word]
    if not words:
        return NOT_TESTED
    sign = wanted.sign
    agree, against = (sum(word.sign == value for word in words) for value in (sign, -sign))
    if agree and against:
        return "mixed"
    for word, count in (("holds", agree), ("opposite", against)):
        if count:
            return word if count == len(words) else f"{word} in {count} of {len(words)}"
    return "not seen" if all(word == Verdict.SAME for word in words) else "inconclusive"


def so_far(answer: str, plan: Plan) -> str:
    """An answer, marked where cells of the exhibit are not complete with which the family of its comparisons grows."""
    return f"{answer} so far" if plan.growing and answer not in ("", "inconclusive", NOT_TESTED) else answer


def tally(verdicts: Iterable[object]) -> str:
    """How many comparisons came out how: "1 worse, 3 inconclusive"."""
    words = [word for word in verdicts if isinstance(word, str) and word]
    return ", ".join(f"{words.count(str(word))} {word}" for word in Verdict if str(word) in words) or "nothing to compare"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
