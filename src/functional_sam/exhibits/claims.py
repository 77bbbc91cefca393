"""README's table: what the paper claims, what is found here, and what makes it; no number of it is typed by hand."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from functional_sam.config import configs_directory, read_yaml
from functional_sam.errors import UserError
from functional_sam.exhibits import SCALES, known, markdown
from functional_sam.exhibits.output import paper_directory
from functional_sam.exhibits.words import NOT_TESTED, sentence
from functional_sam.files import write_text

Records = Mapping[tuple[str, str], Mapping[str, Any]]  # (exhibit, scale) -> content of its .json
Facts = Mapping[str, Mapping[str, Any]]  # exhibit -> content of its YAML

CLAIMS = ("<!-- claims -->", "<!-- end of claims -->")
PICTURE = ("<!-- picture -->", "<!-- end of picture -->")
PICTURED = "figure-3"  # the paper's order of methods, and that none is better than AdamW
COLUMNS = ("claim", "here", "verdict", "made by (time at quick), shown at")


def table(claims: Facts, records: Records) -> str:
    """A row an exhibit that was drawn: claim; finding and verdict of the largest scale that tests it; command, its time, links."""
    rows = []
    for name, scales in drawn(records).items():
        record = answering(scales)
        others = [scale for scale in reversed(scales) if scales[scale] is not record]
        best = next(scale for scale in scales if scale not in others)
        links = ", ".join(f"[{scale}]({shown(scales[scale])})" for scale in (best, *others))
        made = f"`make {name}` ({claims[name]['time']}): {links}"
        rows.append((claims[name]["claim"], record["headline"], verdict(record), made))
    return markdown.table(COLUMNS, rows, text=COLUMNS).strip()


def answering(scales: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record that answers the claim of an exhibit: that of the largest scale which tests it, or of the largest."""
    return max(reversed(list(scales.values())), key=lambda record: record.get("answer") != NOT_TESTED)  # of equal ones the first


def picture(claims: Facts, records: Records) -> str:
    """README's one picture, at its largest scale, and its finding."""
    scales = drawn(records).get(PICTURED)
    if not scales:
        return ""
    record = list(scales.values())[-1]
    link = f"[![{PICTURED}]({shown(record)})]({shown(record)})"
    what = f"{claims[PICTURED]['title']}, scale {record['scale']}"
    marks = "means over seeds with 95 % intervals of the difference, the zero line is AdamW"
    so_far = ", so far" if str(record.get("answer")).endswith("so far") else ""
    return f"{link}\n\n*{sentence(record['headline'] + so_far)} {what}: {marks}.*"


def verdict(record: Mapping[str, Any]) -> str:
    """What a record answers to its claim, in bold where it is settled; of an exhibit that tests none: descriptive."""
    answer = record.get("answer") or "descriptive"
    return answer if answer in ("inconclusive", "descriptive", NOT_TESTED) else f"**{answer}**"


def drawn(records: Records) -> dict[str, dict[str, Mapping[str, Any]]]:
    """exhibit -> scale -> record, exhibits by number and scales from the smallest."""
    names = in_order(name for name, _ in records)
    return {name: {scale: records[name, scale] for scale in SCALES if (name, scale) in records} for name in names}


def in_order(names: Iterable[str]) -> list[str]:
    """Names of exhibits, each once: figure-2 before figure-10, figures before tables."""
    return sorted(set(names), key=lambda name: (name.partition("-")[0], int((re.findall(r"\d+", name) or ["0"])[0])))


def shown(record: Mapping[str, Any]) -> str:
    """The file of an exhibit that a reader opens."""
    return str(next(file for file in record["files"] if file.endswith((".png", ".md"))))


def recorded() -> dict[tuple[str, str], dict[str, Any]]:
    """What was drawn: the .json of every exhibit under paper/."""
    found = {}
    for path in sorted(paper_directory().glob("*/*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            place = (record["exhibit"], record["scale"])
            gone = [file for file in record["files"] if not (paper_directory().parent / file).is_file()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}): remove it, and draw the exhibit again"
            ) from error
        if gone:
            raise UserError(f"{path}: {gone[0]} is missing; draw it again: functional-sam draw {place[0]} --scale {place[1]}")
        found[place] = record
    return found


def facts() -> dict[str, dict[str, Any]]:
    """The YAML of every exhibit."""
    return {name: read_yaml("exhibits", name) for name in known()}


WRITTEN = {CLAIMS: table, PICTURE: picture}


def update() -> Path:
    """Write the table and the picture into README.md; its path. Raises UserError where a mark is missing."""
    readme = configs_directory().parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    for (begin, end), make in WRITTEN.items():
        if begin not in text or end not in text:
            raise UserError(f"{readme}: no {begin} and {end} to write between")
        text = f"{text.split(begin)[0]}{begin}\n{make(facts(), recorded())}\n{end}{text.split(end)[1]}"
    write_text(readme, text)
    return readme
