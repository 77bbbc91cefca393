"""paper/report.pdf, and the galleries paper/figures/README.md and paper/tables/README.md: all that was drawn, from its records.

paper/report.typ is the report. It reads the .json and .pdf of exhibits itself; from here it gets their names, and pages as trees.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functional_sam.config import configs_directory
from functional_sam.exhibits import notebook
from functional_sam.exhibits.claims import Records, answering, drawn, recorded, shown, verdict
from functional_sam.exhibits.output import paper_directory
from functional_sam.exhibits.words import sentence
from functional_sam.files import atomic_file, write_text

PAGES = ("PROTOCOL.md", "README.md")  # of paper/, whose text the report takes
ROUNDED = "The numbers are rounded here; each CSV holds them in full, with every column."
KEPT = ("text", "code_inline", "fence", "code_block")  # Markdown nodes whose content is shown


def make() -> list[Path]:
    """Write both galleries and the report; their paths."""
    records = recorded()
    paths = []
    for kind in ("figures", "tables"):
        paths.append(paper_directory() / kind / "README.md")
        write_text(paths[-1], gallery(kind, records))
    return [*paths, compiled(records)]


def compiled(records: Records, path: Path | None = None) -> Path:
    """The report as a PDF (default: paper/report.pdf); the same records make the same bytes."""
    import typst

    paper, root = paper_directory(), configs_directory().parent
    largest = [list(scales.values())[-1] for scales in drawn(records).values()]
    tables = [shown(record) for record in largest if shown(record).endswith(".md")]
    pages = {name: tree((root / name).read_text(encoding="utf-8")) for name in [*tables, *(f"paper/{page}" for page in PAGES)]}
    shows = [str(Path(record["files"][-1]).parent / f"{_stem(record)}.json") for record in largest]
    verdicts = [
        {key: record[key] for key in ("exhibit", "scale", "headline")}
        | {"claim": record.get("claim") or record["title"], "answer": record.get("answer") or "descriptive"}
        for record in map(answering, drawn(records).values())
    ]
    inputs = {"exhibits": json.dumps(shows), "pages": json.dumps(pages), "verdicts": json.dumps(verdicts)}
    path = path or paper / "report.pdf"
    with atomic_file(path) as temporary:
        typst.compile(
            str(paper / "report.typ"),
            output=str(temporary),
            root=str(root),
            sys_inputs=inputs,
            format="pdf",
            ignore_system_fonts=True,
        )
    return path


def _stem(record: Mapping[str, Any]) -> str:
    return str(record["exhibit"]) if record["scale"] == "quick" else f"{record['exhibit']}-{record['scale']}"


def gallery(kind: str, records: Records) -> str:
    """The page of all figures, or of all tables: what each found, the picture, its caption, and the files behind it."""
    parts = [f"# All {kind}\n\nMade by `make report` from the records beside them. {ROUNDED}"]
    for name, scales in drawn(records).items():
        if not name.startswith(kind[:-1]):
            continue
        record = list(scales.values())[-1]
        found, answers = sentence(record["headline"]), answering(scales)
        if record.get("answer"):
            where = "" if answers is record else f" (scale {answers['scale']}: {answers['headline']})"
            found += f" Claim: {record['claim']}: {verdict(answers)}{where}."
        pictures = [Path(file).name for file in record["files"] if file.endswith(".png")]
        links = [f"[{Path(file).name}]({Path(file).name})" for file in record["files"] if file.endswith((".md", ".csv", ".pdf"))]
        links += [f"[{scale}]({Path(shown(other)).name})" for scale, other in scales.items() if other is not record]
        links += [f"[notebook](../../analysis/{notebook(name, record['scale']).name})"]
        shows = [f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures]
        parts.append(
            "\n\n".join([f"## {name}: {record['title']}", found, *shows, record["caption"], " \N{MIDDLE DOT} ".join(links)])
        )
    return "\n\n".join(parts) + "\n"


def tree(text: str) -> dict[str, Any]:
    """A Markdown page as nested nodes, which report.typ shows: type, children, and what else the type has."""
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

    def node(one: SyntaxTreeNode) -> dict[str, Any]:
        found: dict[str, Any] = {"type": one.type, "children": [node(child) for child in one.children]}
        if one.type in KEPT:
            found["text"] = one.content
        if one.type == "heading":
            found["level"] = int(one.tag[1])
        if one.type in ("th", "td"):
            found["right"] = "right" in str(one.attrs.get("style", ""))
        return found

    return node(SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(text)))
