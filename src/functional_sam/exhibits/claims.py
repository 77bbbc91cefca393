"""README's table of claims, from the exhibits' YAML and the records of what was drawn; no number of it is typed by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functional_sam.config import configs_directory, read_yaml
from functional_sam.errors import UserError
from functional_sam.exhibits import known, markdown
from functional_sam.exhibits.output import paper_directory
from functional_sam.files import write_text

BEGIN, END = "<!-- claims -->", "<!-- end of claims -->"
SCALES = ("quick", "laptop", "paper")
COLUMNS = ("exhibit", "what the paper says", "here", "make it, time")


def table(claims: Mapping[str, Mapping[str, Any]], records: Mapping[tuple[str, str], Any]) -> str:
    """The rows between the marks: exhibit, what the paper says, what we measured, command and time.

    Of the largest scale that was drawn, with links to the others. claims: exhibit -> content of its YAML; records: (exhibit,
    scale) -> content of its .json. An exhibit that was not drawn has no row.
    """
    rows = []
    for name, claim in claims.items():
        drawn = {scale: records[name, scale] for scale in SCALES if (name, scale) in records}
        if not drawn:
            continue
        links = {scale: f"[{scale}]({shown(record)})" for scale, record in drawn.items()}
        scale, record = list(drawn.items())[-1]
        others = ", ".join(link for other, link in links.items() if other != scale)
        ours = f"{record['headline']} ({links[scale]}{f'; {others}' if others else ''})"
        rows.append((name, claim["claim"], ours, f"`make {name}`, {claim['time']}"))
    return markdown.table(COLUMNS, rows, text=COLUMNS).strip()


def shown(record: dict[str, Any]) -> str:
    """The file of an exhibit that a reader opens."""
    return str(next(file for file in record["files"] if file.endswith((".png", ".md"))))


def update() -> Path:
    """Write the table into README.md; its path. Raises UserError where a mark is missing."""
    readme = configs_directory().parent / "README.md"
    records = {}
    for path in sorted(paper_directory().glob("*/*.json")):
        record = json.loads(path.read_text())
        records[record["exhibit"], record["scale"]] = record
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: no {BEGIN} and {END} to write the table between")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    claims = {name: read_yaml("exhibits", name) for name in known()}
    write_text(readme, f"{before}{BEGIN}\n{table(claims, records)}\n{END}{after}")
    return readme
