"""Writing an exhibit: the figure or table, its CSV, and where its numbers come from; each file whole or not at all."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from functional_sam.config import configs_directory
from functional_sam.exhibits.spec import Spec
from functional_sam.files import atomic_file, write_text
from functional_sam.records import Run


@dataclass
class Exhibit:
    """What was drawn: files, caption and the one-line verdict."""

    paths: list[Path]
    caption: str
    verdict: str
    frame: pd.DataFrame
    figure: Any = None
    source: str = "runs"  # or the released records it was drawn from


_into: ContextVar[Path | None] = ContextVar("into", default=None)


@contextmanager
def drawing_into(directory: Path) -> Iterator[None]:
    """Write what is drawn under `directory` instead of paper/."""
    token = _into.set(directory)
    try:
        yield
    finally:
        _into.reset(token)


def paper_directory() -> Path:
    """paper/ of the checkout."""
    return configs_directory().parent / "paper"


def stem(spec: Spec) -> Path:
    """paper/figures/figure-1 or paper/tables/table-1; another scale than quick is part of the name."""
    folder = "figures" if spec.name.startswith("figure") else "tables"
    name = spec.name if spec.scale == "quick" else f"{spec.name}-{spec.scale}"
    return (_into.get() or paper_directory()) / folder / name


def save_figure(spec: Spec, figure: Figure) -> list[Path]:
    """PDF (vector) and PNG."""
    paths = []
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        path = stem(spec).with_suffix(f".{kind}")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=kind, bbox_inches="tight", metadata=metadata)
        paths.append(path)
    return paths


def save_frame(spec: Spec, frame: pd.DataFrame, part: str = "") -> Path:
    """The numbers behind the exhibit, or behind one part of it, as CSV."""
    path = stem(spec).with_suffix(".csv") if not part else stem(spec).with_name(f"{stem(spec).name}-{part}.csv")
    write_text(path, frame.to_csv(index=False, float_format="%.8g"))
    return path


def save_provenance(spec: Spec, exhibit: Exhibit, runs: Sequence[Run]) -> Path:
    """NAME.json: caption, verdict, files, and the runs with config hash, commit, code, versions and data."""
    path = stem(spec).with_suffix(".json")
    root = (_into.get() or paper_directory()).parent
    content = {
        "exhibit": spec.name,
        "scale": spec.scale,
        "verdict": exhibit.verdict,
        "caption": exhibit.caption,
        "files": [str(file.relative_to(root)) for file in exhibit.paths],
        "drawn_from": exhibit.source,
        "runs": [_entry(run) for run in runs],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _entry(run: Run) -> dict[str, Any]:
    record = run.read("provenance.json")
    return {
        "run": run.directory.name,
        "hash": run.config.hash,
        "commit": record["commit"],
        "code": record.get("code", {}).get("sha256"),
        "modified": bool(record["diff"]),
        "resumed_by_other_code": any("code" in part for part in record.get("resumed", [])),
        "versions": record["versions"],
        "machine": record.get("machine"),
        "data": {"name": record["data"]["data"], "sha256": record["data"]["sha256"]},
    }
