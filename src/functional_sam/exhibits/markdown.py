"""The one writer of Markdown tables, and how a number is written in one."""

import math
from collections.abc import Iterable, Sequence

MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], text: Iterable[str] = ()) -> str:
    """A Markdown table. The first column and those of `text` are set to the left, all others to the right; | is escaped."""
    left = {columns[0], *text}
    lines = [_line(columns), "|" + "|".join(":---" if column in left else "---:" for column in columns) + "|"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
        lines.append(_line(row))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    """With so many decimals; what would be shown as zero and is not, as "< .0001" (with sign: "< +.0001", "> -.0001").

    nan: an empty cell; infinite: the word.
    """
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    if value != 0 and round(abs(value), digits) == 0:
        small = f".{'0' * (digits - 1)}1" if digits else "1"
        return f"> {MINUS}{small}" if value < 0 else f"< {'+' if sign else ''}{small}"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits."""
    if not math.isfinite(value):
        return number(value)
    return f"{value:.{digits}g}".replace("-", MINUS)


def interval(mean: float, half: float, digits: int = 4, sign: bool = False) -> str:
    """mean and half width of its interval; the mean alone where there is no interval (one seed, or infinite)."""
    spread = f" {PLUS_MINUS} {number(half, digits)}" if math.isfinite(half) and math.isfinite(mean) else ""
    return number(mean, digits, sign) + spread
