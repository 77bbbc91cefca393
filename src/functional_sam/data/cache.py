"""Prepared data on disk: a directory named by what it was made from, whole or absent, with the SHA-256 of every file in it."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from functional_sam.errors import UserError
from functional_sam.files import atomic_directory, sha256

Progress = Callable[[str], None]
MANIFEST = "manifest.json"
SMALL = 2**28  # bytes, whose SHA-256 takes a fraction of a second
_VERIFIED: set[tuple[str, int, int]] = set()  # files whose content this process has read: path, inode, time of change


def silent(line: str) -> None:
    """The Progress that says nothing."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cached(
    directory: Path, build: Callable[[Path], dict[str, Any]], progress: Progress, verify: bool | None = None
) -> dict[str, Any]:
    """The manifest of `directory`, which `build(temporary directory)` fills once; what `build` returns goes into the manifest.

    The manifest also holds `files` (name -> bytes, sha256) and `sha256`, one digest of the content of all files. One process
    builds while the others wait and then use its result. Sizes are checked at every load. Contents, which the records of runs
    name, at every one when `verify`, never when it is false, and by default at the first of a process, up to SMALL bytes.
    Raises UserError when the directory is damaged, cannot be written or the disk is full.
    """
    directory = Path(directory)
    if not directory.exists():  # no lock for what is there: the directory may be read-only and shared
        with _lock(directory, progress):
            if not directory.exists():
                for left in directory.parent.glob(f".{directory.name}.*.tmp"):  # by a process that was killed: we hold the lock
                    shutil.rmtree(left, ignore_errors=True)
                with atomic_directory(directory) as temporary:
                    manifest = build(temporary)
                    files = sorted(temporary.iterdir())
                    manifest["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
                    manifest["sha256"] = _content(manifest["files"])
                    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
                progress(f"prepared {directory}")
    return _load(directory, verify)


def write_array(path: Path, array: np.ndarray) -> None:
    """The raw bytes of `array`. Not `array.tofile`: its error on a full disk does not say that the disk is full."""
    with path.open("wb") as file:
        file.write(np.ascontiguousarray(array).data)


@contextlib.contextmanager
def _lock(directory: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock beside `directory`, which outlives it: removing a lock file while others wait on it is a race."""
    lock = filelock.FileLock(directory.parent / f".{directory.name}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress(f"another process is preparing {directory}: waiting for it ...")
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {directory.parent} ({error.strerror}): "
            "free some space, make it writable or choose another cache directory"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _load(directory: Path, verify: bool | None) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["sha256"] != _content(files):
            raise ValueError("its digest is not that of its files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, f"{MANIFEST} cannot be used ({error})") from error
    small = sum(expected["bytes"] for expected in files.values()) <= SMALL
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise _damaged(directory, f"{name} is missing")
        found = file.stat()
        if found.st_size != expected["bytes"]:
            raise _damaged(directory, f"{name} has {found.st_size} bytes instead of {expected['bytes']}")
        seen = (str(file.resolve()), found.st_ino, found.st_mtime_ns)
        if verify or (verify is None and small and seen not in _VERIFIED):
            if sha256(file) != expected["sha256"]:
                raise _damaged(directory, f"the content of {name} is not the one that was written (SHA-256 differs)")
            _VERIFIED.add(seen)
    return manifest


def _content(files: dict[str, dict[str, Any]]) -> str:
    return digest({name: file["sha256"] for name, file in files.items()})


def _damaged(directory: Path, what: str) -> UserError:
    return UserError(f"the data cache {directory} is damaged: {what}. Delete that directory and run the same command again")
