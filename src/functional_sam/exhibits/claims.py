"""README's table of claims, from paper/claims.yaml and the records of what was drawn; no number of it is typed by hand."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from functional_sam.config import configs_directory
from functional_sam.errors import UserError
from functional_sam.exhibits.output import paper_directory
from functional_sam.files import write_text

BEGIN, END = "<!-- claims -->", "<!-- end of claims -->"


SCALES = ("quick", "laptop", "paper")


def table(claims: dict[str, Any], records: dict[tuple[str, str], Any]) -> str:
    """The rows between the marks: exhibit, what the paper says, command and time, published value, what we measured.

    Of the largest scale that was drawn, with links to the others. records: (exhibit, scale) -> content of its .json.
    """
    lines = ["| exhibit | claim | command, time | published | ours |", "|---|---|---|---|---|"]
    for name, claim in claims.items():
        if (name, "quick") not in records:
            raise UserError(f"paper/claims.yaml: {name} has not been drawn at scale quick: make {name}, or take the claim out")
        drawn = {scale: records[name, scale] for scale in SCALES if (name, scale) in records}
        links = {scale: f"[{scale}]({shown(record)})" for scale, record in drawn.items()}
        scale, record = list(drawn.items())[-1]
        others = ", ".join(link for other, link in links.items() if other != scale)
        ours = f"{links[scale]}: {record['verdict'].replace('|', chr(92) + '|')}" + (f" Also at {others}." if others else "")
        command = f"`make {name}`, {claim['time']}"
        lines.append(f"| {name} | {claim['claim']} | {command} | {claim['published']} | {ours} |")
    return "\n".join(lines)


def shown(record: dict[str, Any]) -> str:
    """The file of an exhibit that a reader opens."""
    return str(next(file for file in record["files"] if file.endswith((".png", ".md"))))


def update() -> Path:
    """Write the table into README.md; its path. Raises UserError where a mark is missing or a claim has no record."""
    readme = configs_directory().parent / "README.md"
    claims: Any = OmegaConf.to_container(OmegaConf.load(paper_directory() / "claims.yaml"))
    records = {}
    for path in sorted(paper_directory().glob("*/*.json")):
        record = json.loads(path.read_text())
        records[record["exhibit"], record["scale"]] = record
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: no {BEGIN} and {END} to write the table between")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(readme, f"{before}{BEGIN}\n{table(claims, records)}\n{END}{after}")
    return readme
