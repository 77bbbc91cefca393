"""A fresh result against the released one, cell by cell, within the tolerance that configs/exhibits/NAME.yaml states."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from functional_sam.config import nearest
from functional_sam.errors import UserError
from functional_sam.exhibits.spec import Bound, Spec, Tolerance
from functional_sam.records.released import results_directory


@dataclass(frozen=True)
class Mismatch:
    """One cell; tolerance in words."""

    row: str
    column: str
    fresh: str
    released: str
    tolerance: str
    excess: float = math.inf  # difference in units of the tolerance

    def __str__(self) -> str:
        return f"{self.row}: {self.column} {self.fresh}, released {self.released} {self.tolerance}".strip()


@dataclass(frozen=True)
class Checked:
    """What a comparison found."""

    mismatches: list[Mismatch]
    rows: int  # compared
    cells: int
    same: bool  # to the last digit, but for what is ignored

    @property
    def furthest(self) -> Mismatch:
        """The cell that is furthest from its released value."""
        return max(self.mismatches, key=lambda one: one.excess)


def released_path(name: str, scale: str) -> Path:
    """The released CSV of an exhibit."""
    return results_directory() / f"{name}-{scale}.csv"


def load_released(spec: Spec) -> tuple[pd.DataFrame, Tolerance]:
    """The released numbers and their tolerance, its patterns spelled out. Raises UserError when either cannot be used."""
    csv, where = released_path(spec.name, spec.scale), f"configs/exhibits/{spec.name}.yaml, tolerance"
    if not csv.is_file():
        make = f"functional-sam release {spec.name} --scale {spec.scale}"
        raise UserError(f"{csv} is missing, so there is nothing to check against: make it with: {make}")
    frame = pd.read_csv(csv)
    if not spec.tolerance.keys:
        raise UserError(f"{where}: keys are missing: state there what counts as the same result, as the other exhibits do")
    tolerance = spelled_out(spec.tolerance, list(frame))
    stated = [*tolerance.keys, *tolerance.bounds, *tolerance.exact, *tolerance.ignored]
    twice = sorted({column for column in stated if stated.count(column) > 1})
    compared = {*tolerance.keys, *tolerance.bounds, *tolerance.exact}  # of a part that is not complete others may be missing
    unstated, unknown = sorted(set(frame) - set(stated)), sorted(compared - set(frame))
    for columns, what in ((twice, "stated twice"), (unstated, "without a tolerance"), (unknown, f"not in {csv.name}")):
        if columns:
            raise UserError(f"{where}: columns {what}: {', '.join(columns)}")
    if frame.duplicated(tolerance.keys).any():
        raise UserError(f"{where}: keys {tolerance.keys} do not name each row of {csv.name}")
    for row in tolerance.rows_ignored:
        if row not in _by_key(frame, tolerance.keys):
            raise nearest(f"row in {where}, rows_ignored:", row, _by_key(frame, tolerance.keys))
    return frame, tolerance


def spelled_out(tolerance: Tolerance, columns: list[str]) -> Tolerance:
    """With names such as *_residual replaced by the columns they match, but for those that are named in full elsewhere."""
    fields = (tolerance.keys, tolerance.bounds, tolerance.exact, tolerance.ignored)
    named = {name for names in fields for name in names if name in columns}

    def matched(name: str) -> list[str]:
        found = [column for column in columns if column not in named and fnmatchcase(column, name)]
        return found if "*" in name and found else [name]

    def each(names: Iterable[str]) -> list[str]:
        return [column for name in names for column in matched(name)]

    def of(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {column: value for name, value in mapping.items() for column in matched(name)}

    bounds, ignored = of(tolerance.bounds), of(tolerance.ignored)
    return dataclasses.replace(tolerance, bounds=bounds, exact=each(tolerance.exact), ignored=ignored)


def check(fresh: pd.DataFrame, released: pd.DataFrame, tolerance: Tolerance) -> Checked:
    """Compare, and count."""
    rows = len(released) - len(tolerance.rows_ignored)
    cells = rows * (len(tolerance.bounds) + len(tolerance.exact))
    ignored = list(tolerance.ignored)
    same = fresh.drop(columns=ignored, errors="ignore").equals(released.drop(columns=ignored, errors="ignore"))
    return Checked(compare(fresh, released, tolerance), rows, cells, same)


def compare(fresh: pd.DataFrame, released: pd.DataFrame, tolerance: Tolerance) -> list[Mismatch]:
    """Every cell of either frame that is not the same within the tolerance; a missing cell matches a missing one only."""
    found = [Mismatch("all", c, "no such column", "present", "") for c in released if c not in fresh and c not in tolerance.ignored]
    found += [Mismatch("all", c, "present", "no such column", "") for c in fresh if c not in released]
    if any(key not in fresh for key in tolerance.keys):
        return found
    rows: tuple[dict[str, Any], dict[str, Any]] = (_by_key(fresh, tolerance.keys), _by_key(released, tolerance.keys))
    twice = fresh[fresh.duplicated(tolerance.keys)]  # load_released refuses a released one
    found += [Mismatch(name, "", "there more than once", "once", "") for name in _by_key(twice, tolerance.keys)]
    for name in dict.fromkeys([*rows[1], *rows[0]]):
        if name not in rows[0] or name not in rows[1]:
            fresh_has, released_has = ("present" if name in side else "no such row" for side in rows)
            found.append(Mismatch(name, "", fresh_has, released_has, ""))
            continue
        compared = () if name in tolerance.rows_ignored else (*tolerance.bounds, *tolerance.exact)
        for column in [c for c in compared if c in fresh]:
            ours, theirs = rows[0][name][column], rows[1][name][column]
            bound = tolerance.bounds.get(column, Bound())
            excess = _excess(ours, theirs, bound)
            if excess > 1:
                found.append(Mismatch(name, column, _cell(ours), _cell(theirs), _words(bound), excess))
    return found


def _by_key(frame: pd.DataFrame, keys: list[str]) -> dict[str, Any]:
    return {", ".join(f"{key} {row[key]}" for key in keys): row for row in frame.to_dict("records")}


def _excess(fresh: Any, released: Any, bound: Bound) -> float:
    """Difference of two cells in units of the bound: more than 1 is a mismatch."""
    if pd.isna(fresh) or pd.isna(released):
        return 0.0 if pd.isna(fresh) and pd.isna(released) else math.inf
    if fresh == released:  # text, and infinities
        return 0.0
    if isinstance(fresh, str) or isinstance(released, str) or math.isinf(released):
        return math.inf
    allowed = bound.absolute + bound.relative * abs(released)
    return abs(fresh - released) / allowed if allowed else math.inf


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _words(bound: Bound) -> str:
    parts = [f"{bound.absolute:g}"] if bound.absolute else []
    parts += [f"{bound.relative:.0%}"] if bound.relative else []
    return "+-" + " + ".join(parts) if parts else "exact"
