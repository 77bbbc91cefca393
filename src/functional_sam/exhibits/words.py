"""Words that several captions share."""

from collections.abc import Sequence

from functional_sam.config import Config


def sizes(configs: Sequence[Config]) -> str:
    """What was trained on each task, one clause a task."""
    return "; ".join(
        f"{task}: {c.model.kind} of width {c.model.width}, depth {c.model.depth}, {c.training.steps} steps of "
        f"{c.training.batch} rows, {data_name(c)}"
        for task, c in firsts(configs).items()
    )


def firsts(configs: Sequence[Config]) -> dict[str, Config]:
    """The first config of each task."""
    found: dict[str, Config] = {}
    for config in configs:
        found.setdefault(config.task, config)
    return found


def data_name(config: Config) -> str:
    """The data of a run."""
    return config.data.images if config.model.kind == "vit" else " + ".join(config.data.sources)
