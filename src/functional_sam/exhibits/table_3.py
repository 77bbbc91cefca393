"""table-3: the five methods at every size, each trained on 20 tokens per non-embedding parameter."""

from functional_sam.config import Config
from functional_sam.exhibits import regime_table
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.spec import Spec


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The Chinchilla-style cells of the study."""
    return regime_table.plan(spec, "chinchilla", overrides)


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """CSV and Markdown table."""
    return regime_table.draw(spec, "chinchilla")
