"""table-2: the five methods at every size, the same number of steps at each."""

from functional_sam.config import Config
from functional_sam.exhibits import regime_table
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.spec import Spec


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The fixed-length cells of the study."""
    return regime_table.plan(spec, "fixed", overrides)


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """CSV and Markdown table."""
    return regime_table.draw(spec, "fixed")
