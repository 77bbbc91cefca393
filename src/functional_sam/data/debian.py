"""Descriptions of Debian's packages and their translations, from apt's lists; fetched without root.

Debian changes with its releases, so these data are not pinned: their release and the SHA-256 of every list are in the record. A
run is repeated exactly from the lists themselves, which stay in the cache, or lie in a directory of their own (runtime.data=DIR).
"""

import gzip
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_sam.data.cache import Progress, cached
from functional_sam.data.sources import normalize
from functional_sam.errors import UserError

SUITE = "bookworm"
LANGUAGES = ("de", "fr", "it")  # fetched together: a study of several cannot fail at the second one, nor mix releases
NAME = "NAME"  # in the place of a package's own name
_MINUTES = 10  # a stuck mirror must not hang a job for ever


@dataclass(frozen=True)
class Lists:
    """translations, descriptions: by (package, Description-md5); sources: package -> source package."""

    translations: dict[tuple[str, str], str]
    descriptions: dict[tuple[str, str], str]
    sources: dict[str, str]
    release: str
    sha256: dict[str, str]  # of each list


def downloaded(language: str, cache: Path, progress: Progress) -> Lists:
    """The lists of SUITE, fetched once for LANGUAGES into `cache` from where apt is set to get them.

    Raises UserError, with the ways out.
    """

    def build(directory: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="debian-lists-") as name:
            lists = _fetch(Path(name), language, progress)
            for path in [path for path in sorted(lists.iterdir()) if f"dists_{SUITE}_" in path.name and path.is_file()]:
                (directory / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        return {"suite": SUITE, "release": in_directory(directory, language).release}

    directory = cache / f"debian-{SUITE}-lists"
    cached(directory, build, progress)
    return in_directory(directory, language)


def _fetch(work: Path, language: str, progress: Progress) -> Path:
    """The directory that apt-get filled."""
    if shutil.which("apt-get") is None:
        raise _unavailable(language, "apt-get is not on this machine")
    work.chmod(0o755)  # apt run by root downloads as the user _apt, who must be able to enter
    (work / "lists" / "partial").mkdir(parents=True)
    options = {
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work,
        "Acquire::Languages": ",".join(("en", *LANGUAGES)),
        "Acquire::GzipIndexes": "false",  # as plain text, whatever this machine keeps
        "Acquire::Retries": "2",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
    }
    progress(f"fetching the package lists of Debian {SUITE} (30 MB) ...")
    command = ["apt-get", "-q", *(part for key, value in options.items() for part in ("-o", f"{key}={value}")), "update"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60 * _MINUTES)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise _unavailable(language, f"apt-get: {error}") from error
    try:
        in_directory(work / "lists", language)  # apt ends with 0 where a list could not be fetched
    except UserError as error:
        said = [line for line in (done.stderr or "").splitlines() if line.startswith(("E:", "W:"))]
        raise _unavailable(language, (said or [str(error)])[0]) from error
    return work / "lists"


def in_directory(directory: Path, language: str) -> Lists:
    """The lists that apt left in a directory, as they are or in .gz. Raises UserError when one is missing."""
    if not directory.is_dir():
        raise UserError(f"runtime.data={directory}: no such directory; {_command(language)} fills one")
    found: dict[str, Path] = {}
    for what, pattern in {
        f"Translation-{language}": f"_main_i18n_Translation-{language}",
        "Translation-en": "_main_i18n_Translation-en",
        "Packages": "_main_binary-amd64_Packages",
    }.items():
        paths = [path for ending in ("", ".gz") for path in sorted(directory.glob(f"*dists_{SUITE}{pattern}{ending}"))]
        if len(paths) != 1:
            raise UserError(f"{directory} has {len(paths)} lists *dists_{SUITE}{pattern}, one is needed: {_command(language)}")
        found[what] = paths[0]
    texts = {what: _content(path) for what, path in found.items()}
    releases = sorted(directory.glob(f"*dists_{SUITE}_InRelease*"))
    release = re.search(rb"^Version: (\S+)", _content(releases[0]), re.MULTILINE) if releases else None
    return Lists(
        dict(_described(texts[f"Translation-{language}"].decode(), language)),
        dict(_described(texts["Translation-en"].decode(), "en")),
        {part["Package"]: part.get("Source", part["Package"]).split(" ")[0] for part in _parts(texts["Packages"].decode())},
        f"{SUITE} {release[1].decode()}" if release else SUITE,
        {what: hashlib.sha256(text).hexdigest() for what, text in texts.items()},
    )


def _content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def aligned(lists: Lists) -> Iterator[tuple[str, str, str]]:
    """(source package, English, translation): synopsis with synopsis, and paragraphs where both have as many; names masked."""
    for (package, md5), foreign in sorted(lists.translations.items()):
        english = lists.descriptions.get((package, md5))
        if english is None or foreign == english:
            continue
        group = lists.sources.get(package, package)
        both = [paragraphs(english), paragraphs(foreign)]
        together = zip(*both, strict=True) if len(both[0]) == len(both[1]) else [(both[0][0], both[1][0])]
        for one, other in together:
            if one and other and one != other:
                yield group, *masked(one, other, (package, group))


def paragraphs(description: str) -> list[str]:
    """The synopsis, then the paragraphs, each on one line; lists and other lines that are set as they are are left out."""
    synopsis, *lines = description.split("\n")
    found = [[synopsis]]
    fresh = True
    for line in lines:
        if line.strip() == "." or line.startswith(" "):
            fresh = True
            continue
        if fresh:
            found.append([])
            fresh = False
        found[-1].append(line)
    return [normalize(" ".join(part)) for part in found]


def masked(english: str, foreign: str, names: tuple[str, ...]) -> tuple[str, str]:
    """Both texts with NAME for each of the names that stands in both, as a word of its own, whatever its case."""
    for name in sorted(set(names), key=len, reverse=True):
        pattern = re.compile(rf"(?<![\w.+-]){re.escape(name)}(?![\w+])", re.IGNORECASE)
        if pattern.search(english) and pattern.search(foreign):
            english, foreign = pattern.sub(NAME, english), pattern.sub(NAME, foreign)
    return english, foreign


def _described(text: str, language: str) -> Iterator[tuple[tuple[str, str], str]]:
    key = f"Description-{language}"
    for part in _parts(text):
        if key in part and "Description-md5" in part:
            yield (part["Package"], part["Description-md5"]), part[key]


def _parts(text: str) -> Iterator[dict[str, str]]:
    """The paragraphs of a control file: field -> value, lines that go on joined by newlines without their first space."""
    for block in text.split("\n\n"):
        part: dict[str, str] = {}
        key = ""
        for line in block.split("\n"):
            if line.startswith(" ") and key:
                part[key] += "\n" + line[1:]
            elif ":" in line:
                key, _, value = line.partition(":")
                part[key] = value.strip()
        if "Package" in part:
            yield part


def _command(language: str) -> str:
    options = f"-o Dir::State::lists=DIR -o Acquire::GzipIndexes=false -o Acquire::Languages=en,{language}"
    return f"`mkdir -p DIR/partial && apt-get {options} update` on a Debian {SUITE}"


def _unavailable(language: str, why: str) -> UserError:
    return UserError(
        f"Debian's package lists cannot be fetched: {why}. Fetch them elsewhere, {_command(language)}, and set runtime.data=DIR; "
        "or take data.sources=[bible-ja-en], which comes with a package of pip"
    )
