"""Whether what lies under a run's name is that run: its config.yaml, and what its provenance.json says it is."""

import functools
import re
from pathlib import Path
from typing import Any

import yaml

from functional_sam.config import Config, load
from functional_sam.config.schema import keys
from functional_sam.errors import UserError
from functional_sam.records.run import Run

NEEDED = ("commit", "diff", "versions", "data")  # of provenance.json


def require_own(run: Run) -> None:
    """Raise UserError where the directory of a run holds another one's files, or some of them.

    A directory is looked at once, and again when one of the two files has changed.
    """
    path, record = run.directory / "config.yaml", run.directory / "provenance.json"
    try:
        seen = (str(run.directory), *(number for one in (path, record) for number in _version(one)))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {_way_out(run)}") from None
    if seen in _OWN:
        return
    if not _says(path, run.config) and load(path).hash != run.config.hash:
        raise UserError(f"{path} is that of another run ({load(path).name}): {_way_out(run)}")
    made = run.read("provenance.json")
    if missing := [key for key in NEEDED if key not in made]:
        raise UserError(f"{record} is damaged (no {', '.join(missing)}): {_way_out(run)}")
    if made.get("hash", run.config.hash) != run.config.hash:
        raise UserError(f"{record} is that of another run (hash {made['hash']}): {_way_out(run)}")
    _OWN.add(seen)


_OWN: set[tuple[Any, ...]] = set()


def _way_out(run: Run) -> str:
    return f"move {run.directory} away and run again"


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _says(path: Path, config: Config) -> bool:
    """Whether a config.yaml is that of a config, but for runtime settings: `load` takes 30 times as long, and settles the rest."""
    try:
        parts = re.split(r"(?m)^(?=\w)", path.read_text(encoding="utf-8"))
        content: dict[str, Any] = {}
        for part in parts:
            content |= _parsed(part) or {}
    except (ValueError, TypeError, yaml.YAMLError):
        return False
    for name, usual in keys().items():
        own, there = getattr(config, name), content.get(name, usual)
        if name != "runtime" and (({**usual, **there} != vars(own)) if isinstance(usual, dict) else there != own):
            return False
    return True


@functools.lru_cache(maxsize=4096)
def _parsed(part: str) -> Any:
    """A section: most runs of a study share most of them."""
    return yaml.load(part, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
