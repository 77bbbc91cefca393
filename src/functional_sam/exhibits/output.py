"""What was drawn, and writing it: figure or table, its numbers as CSV, and where they come from; each file whole or not at all."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from functional_sam.config import Config, configs_directory
from functional_sam.exhibits.markdown import LEGEND, MARKS
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import sentence
from functional_sam.files import atomic_file
from functional_sam.records import Source

METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "png": {"Software": None}}  # no time, no version


@dataclass(frozen=True)
class Exhibit:
    """What was drawn of a plan, in memory: write() makes the files."""

    plan: Plan
    frames: dict[str, pd.DataFrame]  # part -> its numbers; "" is the exhibit itself, which `check` compares
    caption: str  # three sentences at most: finding, setting, n
    verdict: str  # one line; in the record, not in the caption
    figure: Figure | None = None
    markdown: str = ""  # the tables alone; title and caption come from here
    headline: str = ""  # of the frame, in at most 15 words and with a number: a cell of README's table
    answer: str = ""  # to the claim of the YAML: holds, not seen, opposite, inconclusive (words.answer)
    more: dict[str, Figure] = field(default_factory=dict)  # part -> a further figure of the exhibit: NAME-PART.pdf and .png

    @property
    def title(self) -> str:
        """Of the YAML."""
        return self.plan.spec.title

    @property
    def frame(self) -> pd.DataFrame:
        """The numbers of the exhibit itself."""
        return self.frames[""]

    @property
    def page(self) -> str:
        """The Markdown file of a table: what came out, the table, its caption, what was published."""
        found = sentence(self.headline)
        answer = f" The claim, {self.plan.spec.claim}: **{self.answer}**." if self.answer else ""
        above = [f"# {self.plan.spec.name}: {self.title}", *([found + answer] if self.headline else [])]
        legend = [LEGEND] if any(mark in self.markdown for mark in MARKS.values()) else []
        below = [*legend, self.caption.removeprefix(found).strip(), f"Published: {self.plan.spec.published}."]
        return "\n\n".join([*above, self.markdown.strip(), *below]) + "\n"


def paper_directory() -> Path:
    """paper/ of the checkout."""
    return configs_directory().parent / "paper"


def overridden_directory() -> Path:
    """Where drawings of runs with settings of the command line go: those under paper/ are of the exhibit as it is stated."""
    return paper_directory() / "overridden"


def stem(spec: Spec, directory: Path | None = None) -> Path:
    """DIRECTORY/figures/figure-1 or DIRECTORY/tables/table-1 (default: paper/); another scale than quick is part of the name."""
    folder = "figures" if spec.name.startswith("figure") else "tables"
    name = spec.name if spec.scale == "quick" else f"{spec.name}-{spec.scale}"
    return (directory or paper_directory()) / folder / name


def csv_text(frame: pd.DataFrame) -> str:
    """A frame as it is written and released: eight significant digits."""
    text: str = frame.to_csv(index=False, float_format="%.8g")
    return text


def as_written(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame as its CSV holds it."""
    return pd.read_csv(io.StringIO(csv_text(frame)))


def write(exhibit: Exhibit, directory: Path | None = None, overrides: Sequence[str] = ()) -> list[Path]:
    """Write pdf and png of a figure, md of a table, a csv a part, and json under DIRECTORY (default: paper/); the paths, json last.

    overrides: of the command line; the record has them. The same bytes whether the records came from run directories or results/.
    """
    place = stem(exhibit.plan.spec, directory)
    root, record_path = place.parents[1].parent, place.with_suffix(".json")
    with contextlib.ExitStack() as files:
        # All are made before the first takes its place, the record the last: whoever is interrupted leaves what was drawn before.
        record_file, paths = files.enter_context(atomic_file(record_path)), []
        if exhibit.figure is not None:
            paths += _save(exhibit.figure, place, files)
        for part, figure in exhibit.more.items():
            paths += _save(figure, place.with_name(f"{place.name}-{part}"), files)
        texts = {place.with_suffix(".md"): exhibit.page} if exhibit.markdown else {}
        for part, frame in exhibit.frames.items():
            texts[place.with_name(f"{place.name}-{part}.csv" if part else f"{place.name}.csv")] = csv_text(frame)
        for path, text in texts.items():
            files.enter_context(atomic_file(path)).write_text(text, encoding="utf-8")
        paths += texts
        told = {"overrides": list(overrides)} if overrides else {}
        content = {**record(exhibit), **told, "files": [str(path.relative_to(root)) for path in paths]}
        record_file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*paths, record_path]


def save_figure(figure: Figure, place: Path) -> list[Path]:
    """PLACE.pdf (vector) and PLACE.png."""
    with contextlib.ExitStack() as files:
        return _save(figure, place, files)


def _save(figure: Figure, place: Path, files: contextlib.ExitStack) -> list[Path]:
    """The same, which take their places when `files` is closed."""
    paths = {kind: place.with_suffix(f".{kind}") for kind in METADATA}
    for kind, path in paths.items():
        figure.savefig(files.enter_context(atomic_file(path)), format=kind, bbox_inches="tight", metadata=METADATA[kind])
    return list(paths.values())


def record(exhibit: Exhibit) -> dict[str, Any]:
    """The content of NAME.json but for its files: title, verdict, caption, and the runs with config hash, commit, code, data."""
    plan = exhibit.plan
    return {
        "exhibit": plan.spec.name,
        "scale": plan.spec.scale,
        "title": exhibit.title,
        "headline": exhibit.headline,
        "claim": plan.spec.claim,
        "answer": exhibit.answer,
        "published": plan.spec.published,
        "verdict": exhibit.verdict,
        "caption": exhibit.caption,
        "runs": [_entry(plan.source, config) for config in plan.shown],
    }


def _entry(source: Source, config: Config) -> dict[str, Any]:
    found = source.read(config, "provenance.json")
    return {
        "run": config.name,
        "hash": config.hash,
        "commit": found["commit"],
        "code": found.get("code", {}).get("sha256"),
        "modified": bool(found["diff"]),
        "resumed_by_other_code": any("code" in part for part in found.get("resumed", [])),
        "versions": found["versions"],
        "machine": found.get("machine"),
        "data": {"name": found["data"]["data"], "sha256": found["data"]["sha256"]},
    }
