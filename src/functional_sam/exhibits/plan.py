"""What an exhibit module's plan() finds out, and its draw() draws."""

from dataclasses import dataclass
from typing import Any

from functional_sam.config import Config
from functional_sam.exhibits.spec import Spec
from functional_sam.records import Source


@dataclass(frozen=True)
class Plan:
    """The runs of one exhibit at one scale, as far as the records of a source tell them."""

    spec: Spec
    configs: list[Config]  # every run known so far, in the order in which they are best done
    content: Any  # what the exhibit made of them, for drawing; of a study its complete cells
    source: Source
    drawable: bool
    drawn: list[Config] | None = None  # the runs that a drawing shows; none: all that are complete
    left: tuple[str, ...] = ()  # of a study: the cells of the exhibit that are not complete, or not asked for, and not shown
    growing: bool = False  # with some of them the family of the exhibit's comparisons grows

    @classmethod
    def of_known_runs(cls, spec: Spec, configs: list[Config], source: Source) -> "Plan":
        """Of an exhibit all of whose runs are known from the start: it can be drawn once all are complete."""
        return cls(spec, configs, None, source, all(source.done(config) for config in configs))

    @property
    def missing(self) -> list[Config]:
        """The runs that are not complete."""
        return [config for config in self.configs if not self.source.done(config)]

    @property
    def shown(self) -> list[Config]:
        """The runs that a drawing shows."""
        return [config for config in self.configs if self.source.done(config)] if self.drawn is None else self.drawn
