"""tables, figures: a command on every exhibit of a kind that has the scale."""

import argparse
from collections.abc import Callable

from functional_sam.commands import console
from functional_sam.errors import UserError
from functional_sam.exhibits import NotComplete, known, scales

KINDS = {"tables": "table-", "figures": "figure-"}


def members(name: str, scale: str) -> list[str]:
    """The exhibits that a name stands for: all tables, all figures, or one. Raises UserError where none has the scale."""
    if name not in KINDS:
        return [name]
    found = [one for one in known() if one.startswith(KINDS[name]) and scale in scales(one)]
    if not found:
        there = sorted({one for exhibit in known() if exhibit.startswith(KINDS[name]) for one in scales(exhibit)})
        raise UserError(f"none of the {name} has a scale {scale!r}: {', '.join(there)}")
    return found


def each(function: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The command on each member in turn; the highest exit code.

    The first is told of all, as options.together, and may act for all. Members that cannot be drawn, because runs are missing here
    and in results/, are named at the end; UserError if all are.
    """
    names = members(options.exhibit, options.scale)
    if len(names) == 1:
        return function(argparse.Namespace(**{**vars(options), "exhibit": names[0], "together": names}))
    code, left = 0, []
    for number, name in enumerate(names):
        together = names if number == 0 else []
        try:
            code = max(code, function(argparse.Namespace(**{**vars(options), "exhibit": name, "together": together})))
        except NotComplete as error:
            left.append(str(error))
    for text in left:
        console.print(f"left out: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if len(left) == len(names):
        raise UserError(f"nothing to draw of the {options.exhibit} at scale {options.scale}")
    return code
