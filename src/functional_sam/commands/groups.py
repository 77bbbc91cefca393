"""draw, check and release of tables or figures: each of them in turn."""

import argparse
from collections.abc import Callable

from functional_sam.commands import console
from functional_sam.errors import UserError
from functional_sam.exhibits import NotComplete, members


def each(function: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The command on each exhibit that a name stands for; the highest exit code.

    Those that cannot be drawn, because runs are missing here and in results/, are named at the end; UserError if all are.
    """
    names = members(options.exhibit, options.scale)
    if names == [options.exhibit]:
        return function(options)
    code, left = 0, []
    for name in names:
        try:
            code = max(code, function(argparse.Namespace(**{**vars(options), "exhibit": name})))
        except NotComplete as error:
            left.append(str(error))
    for text in left:
        console.print(f"left out: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if len(left) == len(names):
        raise UserError(f"nothing to draw of the {options.exhibit} at scale {options.scale}")
    return code
