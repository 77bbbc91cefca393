"""Overrides of the command line that would change the names of an exhibit's runs, and nothing else of them."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from omegaconf import OmegaConf

from functional_sam.config import Config, settings_of
from functional_sam.errors import UserError
from functional_sam.tasks.settings import ON_BY, ONLY_OF, readers


def require_read_by_one(name: str, configs: Sequence[Config], overrides: Sequence[str]) -> None:
    """Raise UserError for one of the overrides, key=value, that none of the configs of an exhibit reads.

    An exhibit's overrides are for all its runs, so that one of them suffices; of a single run see tasks/settings.py.
    """
    default = Config()
    kinds, names = {config.model.kind for config in configs}, {config.optimizer.name for config in configs}
    retrained = any(config.measure.robustness for config in configs)  # training/robustness.py has an AdamW of its own

    def refuse(override: str, what: str, there: set[str], known: Sequence[str]) -> None:
        if not there & set(known):
            here, others = ", ".join(sorted(there)), ", ".join(known)
            raise UserError(f"override {override!r} does nothing in {name}, whose {what} are {here}; it is for {others}")

    for override in overrides:
        layer: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        for section in ("model", "data"):
            for key, value in layer.get(section, {}).items():
                if value != getattr(getattr(default, section), key) and key != "kind":
                    refuse(override, "models", kinds, readers(section, key))
        for key, value in layer.get("optimizer", {}).items():
            only = ONLY_OF.get(key)
            if only and value != getattr(default.optimizer, key) and not (retrained and only == "adamw"):
                refuse(override, "optimizers", names, [only])
        for setting in set(settings_of((override,))) & set(ON_BY):
            switch, by = ON_BY[setting]
            if OmegaConf.select(OmegaConf.create(layer), setting) != attrgetter(setting)(default):
                refuse(override, f"values of {switch}", {str(attrgetter(switch)(config)) for config in configs}, by)
