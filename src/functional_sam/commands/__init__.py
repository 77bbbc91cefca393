"""The commands of functional-sam that are more than one call."""

import os
from pathlib import Path

from rich.console import Console

console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of many processes the first one speaks


def wide() -> Console:
    """The console; where it is no terminal, one wide enough not to cut a cell."""
    return console if console.is_terminal else Console(width=200)


def shown(path: Path) -> Path:
    """A path as short as it can be read from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
