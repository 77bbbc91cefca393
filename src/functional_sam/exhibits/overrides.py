"""Overrides of the command line that would change the names of an exhibit's runs, and nothing else of them."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from functional_sam.config import Config
from functional_sam.errors import UserError
from functional_sam.tasks.settings import readers


def require_read_by_one(name: str, kinds: set[str], overrides: Sequence[str]) -> None:
    """Raise UserError for one of the overrides, key=value, that none of the kinds of model in an exhibit reads.

    An exhibit's overrides are for all its tasks, so that one of them suffices; of a single run see tasks/settings.py.
    """
    default = Config()
    for override in overrides:
        layer: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        for section in ("model", "data"):
            for key, value in layer.get(section, {}).items():
                known = readers(section, key)
                if value != getattr(getattr(default, section), key) and key != "kind" and not kinds & set(known):
                    raise UserError(
                        f"override {override!r} does nothing in {name}, whose models are {', '.join(sorted(kinds))}; "
                        f"it is for {', '.join(known)}"
                    )
