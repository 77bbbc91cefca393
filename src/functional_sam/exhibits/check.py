"""A fresh result against the released one, cell by cell, within the tolerance that results/NAME-SCALE.yaml states."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from functional_sam.config import nearest
from functional_sam.errors import UserError
from functional_sam.records.released import results_directory


@dataclass
class Bound:
    """|fresh - released| <= absolute + relative * |released|."""

    absolute: float = 0.0
    relative: float = 0.0


@dataclass
class Tolerance:
    """What counts as the same result. Every column is a key, has a bound, is exact, or is ignored for a reason; so may a row be."""

    reason: str = ""  # for the sizes of the bounds
    keys: list[str] = field(default_factory=list)  # columns that name a row
    bounds: dict[str, Bound] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)  # column -> why
    rows_ignored: dict[str, str] = field(default_factory=dict)  # row, as a mismatch names it -> why


@dataclass(frozen=True)
class Mismatch:
    """One cell; tolerance in words."""

    row: str
    column: str
    fresh: str
    released: str
    tolerance: str


def released_paths(name: str, scale: str) -> tuple[Path, Path]:
    """The released CSV of an exhibit, and its tolerance."""
    stem = results_directory() / f"{name}-{scale}"
    return stem.with_name(f"{stem.name}.csv"), stem.with_name(f"{stem.name}.yaml")


def load_released(name: str, scale: str) -> tuple[pd.DataFrame, Tolerance]:
    """The released numbers and their tolerance. Raises UserError when either is missing or cannot be used."""
    csv, yaml = released_paths(name, scale)
    make = f"make it with: functional-sam release {name} --scale {scale}"
    for path, way_out in ((csv, make), (yaml, "state the tolerance there, as the other files of that directory do")):
        if not path.is_file():
            raise UserError(f"{path} is missing, so there is nothing to check against: {way_out}")
    frame = pd.read_csv(csv)
    try:
        tolerance = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Tolerance), OmegaConf.load(yaml)))
    except OmegaConfBaseException as error:
        raise UserError(f"{yaml}: {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(tolerance, Tolerance)
    stated = [*tolerance.keys, *tolerance.bounds, *tolerance.exact, *tolerance.ignored]
    twice = sorted({column for column in stated if stated.count(column) > 1})
    unstated, unknown = sorted(set(frame) - set(stated)), sorted(set(stated) - set(frame))
    for columns, what in ((twice, "stated twice"), (unstated, "without a tolerance"), (unknown, f"not in {csv.name}")):
        if columns:
            raise UserError(f"{yaml}: columns {what}: {', '.join(columns)}")
    if not tolerance.keys or frame.duplicated(tolerance.keys).any():
        raise UserError(f"{yaml}: keys {tolerance.keys} do not name each row of {csv.name}")
    for row in tolerance.rows_ignored:
        if row not in _by_key(frame, tolerance.keys):
            raise nearest(f"row in {yaml}, rows_ignored:", row, _by_key(frame, tolerance.keys))
    return frame, tolerance


def compare(fresh: pd.DataFrame, released: pd.DataFrame, tolerance: Tolerance) -> list[Mismatch]:
    """Every cell of either frame that is not the same within the tolerance; a missing cell matches a missing one only."""
    found = [Mismatch("all", c, "no such column", "present", "") for c in released if c not in fresh and c not in tolerance.ignored]
    found += [Mismatch("all", c, "present", "no such column", "") for c in fresh if c not in released]
    if any(key not in fresh for key in tolerance.keys):
        return found
    rows: tuple[dict[str, Any], dict[str, Any]] = (_by_key(fresh, tolerance.keys), _by_key(released, tolerance.keys))
    for name in dict.fromkeys([*rows[1], *rows[0]]):
        if name not in rows[0] or name not in rows[1]:
            fresh_has, released_has = ("present" if name in side else "no such row" for side in rows)
            found.append(Mismatch(name, "", fresh_has, released_has, ""))
            continue
        compared = () if name in tolerance.rows_ignored else (*tolerance.bounds, *tolerance.exact)
        for column in [c for c in compared if c in fresh]:
            ours, theirs = rows[0][name][column], rows[1][name][column]
            bound = tolerance.bounds.get(column, Bound())
            if not _same(ours, theirs, bound):
                found.append(Mismatch(name, column, _cell(ours), _cell(theirs), _words(bound)))
    return found


def _by_key(frame: pd.DataFrame, keys: list[str]) -> dict[str, Any]:
    return {", ".join(f"{key} {row[key]}" for key in keys): row for row in frame.to_dict("records")}


def _same(fresh: Any, released: Any, bound: Bound) -> bool:
    if pd.isna(fresh) or pd.isna(released):
        return bool(pd.isna(fresh) and pd.isna(released))
    if fresh == released:  # text, and infinities
        return True
    if isinstance(fresh, str) or isinstance(released, str) or math.isinf(released):
        return False
    return bool(abs(fresh - released) <= bound.absolute + bound.relative * abs(released))


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _words(bound: Bound) -> str:
    parts = [f"{bound.absolute:g}"] if bound.absolute else []
    parts += [f"{bound.relative:.0%}"] if bound.relative else []
    return "+-" + " + ".join(parts) if parts else "exact"
