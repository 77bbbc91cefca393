"""Writing an exhibit: the figure or table, its CSV, and where its numbers come from; each file whole or not at all."""

import json
from collections.abc import Sequence
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


def paper_directory() -> Path:
    """paper/ of the checkout."""
    return configs_directory().parent / "paper"


def stem(spec: Spec) -> Path:
    """paper/figures/figure-1 or paper/tables/table-1; another scale than quick is part of the name."""
    folder = "figures" if spec.name.startswith("figure") else "tables"
    name = spec.name if spec.scale == "quick" else f"{spec.name}-{spec.scale}"
    return paper_directory() / folder / name


def save_figure(spec: Spec, figure: Figure) -> list[Path]:
    """PDF (vector) and PNG."""
    paths = []
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        path = stem(spec).with_suffix(f".{kind}")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=kind, bbox_inches="tight", metadata=metadata)
        paths.append(path)
    return paths


def save_frame(spec: Spec, frame: pd.DataFrame) -> Path:
    """The numbers behind the exhibit, as CSV."""
    path = stem(spec).with_suffix(".csv")
    write_text(path, frame.to_csv(index=False, float_format="%.8g"))
    return path


def save_provenance(spec: Spec, exhibit: Exhibit, runs: Sequence[Run]) -> Path:
    """NAME.json: caption, verdict, files, and the runs with config hash, commit and data."""
    entries = []
    for run in runs:
        record = json.loads((run.directory / "provenance.json").read_text())
        entries.append(
            {
                "run": run.directory.name,
                "commit": record["commit"],
                "modified": bool(record["diff"]),
                "versions": record["versions"],
                "data": {"name": record["data"]["data"], "sha256": record["data"]["sha256"]},
            }
        )
    path = stem(spec).with_suffix(".json")
    root = paper_directory().parent
    content = {
        "exhibit": spec.name,
        "scale": spec.scale,
        "verdict": exhibit.verdict,
        "caption": exhibit.caption,
        "files": [str(file.relative_to(root)) for file in exhibit.paths],
        "runs": entries,
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path
