"""The one writer of Markdown tables, how a number is written in one, and how a verdict is made visible."""

import math
import re
from collections.abc import Iterable, Sequence

MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"
# What GitHub shows in colour; blue and orange can be told apart by everyone. "inconclusive" stays without a mark.
MARKS = {
    "better": "\N{LARGE BLUE CIRCLE}",
    "worse": "\N{LARGE ORANGE CIRCLE}",
    "no difference": "\N{MEDIUM WHITE CIRCLE}",
}
LEGEND = (
    f"{MARKS['better']} better, {MARKS['worse']} worse, {MARKS['no difference']} no difference (smaller than the margin, by a "
    "test of its own); no mark: inconclusive."
)
VERDICT = re.compile(rf"(?:^|, )({'|'.join(MARKS)})(?: \([^()]*\))?(?:$|(?=, ))")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], text: Iterable[str] = ()) -> str:
    """A Markdown table. The first column and those of `text` are set to the left, all others to the right; | is escaped.

    A cell that is a verdict, or starts or ends with one ("+0.2, worse"), gets the verdict's mark.
    """
    left = {columns[0], *text}
    lines = [_line(columns), "|" + "|".join(":---" if column in left else "---:" for column in columns) + "|"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
        lines.append(_line([marked(str(cell)) for cell in row]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def marked(cell: str) -> str:
    """A cell with the mark of its verdict in front, where it has one."""
    found = VERDICT.search(cell)
    return f"{MARKS[found[1]]} {cell}" if found else cell


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
    """With so many significant digits; thousands with a comma, powers of ten only beyond a million and below a ten-thousandth."""
    if not math.isfinite(value):
        return number(value)
    text = f"{value:.{digits}g}"
    if "e" in text and 1 <= abs(value) < 1e6:
        text = f"{float(text):.0f}"
    whole, point, rest = text.partition(".")
    if "e" not in text and abs(value) >= 1e4:
        whole = f"{int(whole):,}"
    return f"{whole}{point}{rest}".replace("-", MINUS)


def interval(mean: float, half: float, digits: int | None = None, sign: bool = False) -> str:
    """mean and half width of its interval; the mean alone where there is no interval (one seed, or infinite).

    Unless told how many decimals: three significant digits of the half width, or of the mean alone; 2 to 4 decimals.
    """
    own = decimals(mean, half) if digits is None else digits
    spread = f" {PLUS_MINUS} {number(half, own)}" if math.isfinite(half) and math.isfinite(mean) else ""
    return number(mean, own, sign) + spread


def decimals(mean: float, half: float) -> int:
    """How many decimals of a mean its interval leaves worth showing: 2 to 4."""
    size = half if math.isfinite(half) and half > 0 else abs(mean)
    if not math.isfinite(size) or size == 0:
        return 4
    return min(4, max(2, 2 - math.floor(math.log10(size))))
