"""Words and numbers that several exhibits share."""

from collections.abc import Sequence

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits.plan import Plan
from functional_sam.tasks import TASKS


def sizes(configs: Sequence[Config]) -> str:
    """What was trained on each task, one clause a task."""
    return "; ".join(
        f"{task}: {model(c)}, {c.training.steps} steps of {c.training.batch} rows of {TASKS[c.kind].data_name(c)} "
        f"in {c.training.precision}"
        for task, c in firsts(configs).items()
    )


def model(config: Config) -> str:
    """The model of a run and its size."""
    return f"{TASKS[config.kind].model_name(config)} of width {config.model.width}, depth {config.model.depth}"


def rows(configs: Sequence[Config]) -> str:
    """The held-out rows of a measurement, task by task."""
    return ", ".join(f"{c.measure.rows} in {task}" for task, c in firsts(configs).items())


def firsts(configs: Sequence[Config]) -> dict[str, Config]:
    """The first config of each task."""
    found: dict[str, Config] = {}
    for config in configs:
        found.setdefault(config.task, config)
    return found


def decompositions(plan: Plan) -> pd.DataFrame:
    """One row per task, seed, step and ascent, of the decompositions that the runs measured on their way.

    The Adam ascent from measure.adam_from on: before, P g is the sign of g, of rounding noise too.
    """
    return pd.DataFrame(
        [
            {"task": config.task, "seed": config.training.init_seed, "step": line["step"], "ascent": ascent, **line[ascent]}
            for config in plan.configs
            for line in plan.source.metrics(config, "decompose")
            for ascent in config.measure.ascents
            if ascent in line and (ascent != "adam" or line["step"] >= config.measure.adam_from)
        ]
    )


def at_the_end(data: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows of a task's last step."""
    own = data[data.task == task]
    return own[own.step == own.step.max()]
