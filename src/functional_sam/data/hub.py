"""Data sets in the layout of the Hugging Face hub: the files of a split, in a local directory or on the hub itself.

A set that its owner published in another form has parquet files that the hub made, on a branch of their own and named otherwise:
owner/name@refs/convert/parquet, FOLDER/SPLIT/0000.parquet.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_sam.errors import UserError

NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # of a repository, with or without a revision


@dataclass(frozen=True)
class File:
    """One file of a split. url: what `datasets` and fsspec open (a path, or hf://...); size: bytes, compressed."""

    url: str
    size: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def layout(
    location: str, folder: str, split: str, suffix: str, first: int | None = None, published: str = "OWNER/NAME"
) -> list[File]:
    """The first so many files (none: all) of FOLDER/*SPLIT*-00000-of-01024SUFFIX, or of FOLDER/SPLIT/0000SUFFIX, by number.

    location: a directory with that layout, or a repository of the hub, `owner/name` or `owner/name@revision`. published: the one
    to fetch where a directory lacks the files.
    Raises UserError when a file that is asked for is missing there, or the hub cannot be reached.
    """
    where = f"{location}/{folder}"
    remedy = _remedy(location, published)
    numbered = _numbered(location, folder, split, suffix, remedy)
    if not numbered:
        raise UserError(f"no {split} file (*{split}*-00000-of-*{suffix}) in {where}: {remedy}")
    total = max(of for _, of in numbered)
    wanted = first or total
    if wanted > total:
        raise UserError(f"data.files={first}, but {where} has {total} {split} files")
    missing = [number for number in range(wanted) if (number, total) not in numbered]
    if missing:
        raise UserError(
            f"{split} file {missing[0]} of {total} is not in {where} ({len(missing)} of the first {wanted} are missing): "
            f"fetch them, or set data.files to the number of files that are there"
        )
    return [numbered[number, total] for number in range(wanted)]


def rows(file: File, builder: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of one file in their order, read as a stream. builder: "json" or "parquet" of `datasets`."""
    import datasets

    columns = options.pop("columns")
    try:
        stream = datasets.load_dataset(builder, data_files=[file.url], split="train", streaming=True, **options)
        yield from stream.select_columns(columns)
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # of fsspec, arrow, zlib or the network: none of them names the file
        raise UserError(f"cannot read {file.url}: {type(error).__name__}: {error}. Fetch it again") from error


def _numbered(location: str, folder: str, split: str, suffix: str, remedy: str) -> dict[tuple[int, int], File]:
    """(number, of how many) -> file: as owners name them, or, where there is none of these, as the hub names what it converts."""
    owners = re.compile(rf"(?:.*[.-])?{split}[.-](\d+)-of-(\d+){re.escape(suffix)}")
    found = ((owners.fullmatch(file.name), file) for file in _listed(location, folder, suffix, remedy))
    if numbered := {(int(match[1]), int(match[2])): file for match, file in found if match}:
        return numbered
    hubs = re.compile(rf"(\d+){re.escape(suffix)}")
    found = ((hubs.fullmatch(file.name), file) for file in _listed(location, f"{folder}/{split}", suffix, remedy))
    converted = {int(match[1]): file for match, file in found if match}
    return {(number, max(converted) + 1): file for number, file in converted.items()}


def _listed(location: str, folder: str, suffix: str, remedy: str) -> Iterable[File]:
    return _local(Path(location), folder, suffix) if Path(location).is_dir() else _remote(location, folder, suffix, remedy)


def _local(root: Path, folder: str, suffix: str) -> Iterator[File]:
    for path in sorted((root / folder).glob(f"*{suffix}")):  # not resolved: in the hub's own cache names are links to blobs
        yield File(str(path.absolute()), path.stat().st_size)


def _remote(location: str, folder: str, suffix: str, remedy: str) -> list[File]:
    if not NAME.fullmatch(location):
        raise UserError(f"{location} is neither a directory nor a data set of the hub (owner/name): {remedy}")
    from huggingface_hub import HfFileSystem

    try:
        entries: Any = HfFileSystem().glob(f"datasets/{location}/{folder}/*{suffix}", detail=True)
    except Exception as error:  # every kind of network error, and OfflineModeIsEnabled
        raise UserError(f"the hub's {location} cannot be listed ({type(error).__name__}: {error}): {remedy}") from error
    return [File(f"hf://{name}", int(entry["size"])) for name, entry in sorted(entries.items())]


def _remedy(location: str, published: str) -> str:
    named = NAME.fullmatch(location) and not Path(location).is_dir()
    name, _, revision = (location if named else published).partition("@")
    which = f" --revision {revision}" if revision else ""
    return f"`hf download {name}{which} --repo-type dataset --local-dir DIR` where the network is, then runtime.data=DIR"
