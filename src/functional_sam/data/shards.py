"""Many files prepared by many processes: one directory a file, whole or absent, so that a killed run goes on where it was."""

import json
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from functional_sam.data.cache import Progress, cached, silent
from functional_sam.errors import UserError

# report(bytes, tokens): more of the file's bytes are done (an estimate until it ends), and more tokens or images made.
Report = Callable[[float, int], None]
Build = Callable[[Path, Report], dict[str, Any]]  # fills a directory, returns what its manifest says


@dataclass(frozen=True)
class Shard:
    """What becomes of one file. `build` must pickle: a functools.partial of a function of a module."""

    directory: Path
    size: int  # bytes of the file
    build: Build


@dataclass
class Status:
    """How far all shards are. done: bytes, with those that were there before; total: bytes; made: tokens or images, here."""

    total: float
    done: float = 0.0
    made: int = 0
    whole: int = 0  # shards
    of: int = 0
    part: dict[Path, float] = field(default_factory=dict)  # bytes of shards at work


Watch = Callable[[Status], None]


def prepare_shards(
    shards: Sequence[Shard],
    processes: int = 0,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """The manifest of each shard, in order; those that are missing are made by so many processes (0: one a core).

    A shard is written by one process alone, into a directory that gets its name when it is whole: the bytes do not depend on
    the number of processes, a kill loses the shards at work, and several machines may share the work.
    Raises UserError as `cached` does, when a file cannot be read, or when a process dies.
    """
    missing = [shard for shard in shards if not shard.directory.exists()]
    if missing:
        processes = min(processes or len(os.sched_getaffinity(0)), len(missing))
        status = Status(float(sum(shard.size for shard in shards)), of=len(shards), whole=len(shards) - len(missing))
        status.done = status.total - sum(shard.size for shard in missing)
        follow = _Follower(status, progress, watch)
        if processes == 1:
            for shard in missing:
                _build(shard, lambda size, made, shard=shard: follow.partly(shard.directory, size, made))  # type: ignore[misc]
                follow.finished(shard)
        else:
            _in_parallel(missing, processes, follow)
    return [cached(shard.directory, _absent, progress, verify=False) for shard in shards]


def write_list(directory: Path, shards: Sequence[Shard], manifests: Sequence[dict[str, Any]]) -> None:
    """Write shards.json of a set: which shards, beside its directory, it is made of."""
    pairs = zip(shards, manifests, strict=True)
    listed = [{"name": shard.directory.name, "sha256": manifest["sha256"]} for shard, manifest in pairs]
    (directory / "shards.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def listed(directory: Path) -> list[Path]:
    """Find the shards of a set by its shards.json. Raises UserError where one is gone or no longer the same."""
    found = []
    for shard in json.loads((directory / "shards.json").read_text(encoding="utf-8")):
        found.append(directory.parent / shard["name"])
        if cached(found[-1], _gone, silent, verify=False)["sha256"] != shard["sha256"]:
            raise UserError(f"{found[-1]} is not the shard that {directory} was made with: delete {directory}")
    return found


class _Follower:
    """Adds up what the workers report."""

    def __init__(self, status: Status, progress: Progress, watch: Watch | None):
        self.status, self.progress, self.watch = status, progress, watch or (lambda _: None)

    def partly(self, directory: Path, size: float, made: int) -> None:
        self.status.part[directory] = self.status.part.get(directory, 0.0) + size
        self.status.made += made
        self.watch(self._with_parts())

    def finished(self, shard: Shard) -> None:
        self.status.part[shard.directory] = float("-inf")  # late reports of it no longer count
        self.status.done += shard.size
        self.status.whole += 1
        self.watch(self._with_parts())
        self.progress(f"{shard.directory.parent.name}: {self.status.whole} of {self.status.of} files")

    def _with_parts(self) -> Status:
        parts = sum(part for part in self.status.part.values() if part > 0)
        return Status(
            self.status.total, min(self.status.done + parts, self.status.total), self.status.made, self.status.whole, self.status.of
        )


def _in_parallel(shards: Sequence[Shard], processes: int, follow: _Follower) -> None:
    # Not fork: torch, arrow and fsspec have threads by now. The server of forks imports them once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["functional_sam.data.c4", "datasets"])
    reports: Any = context.Queue()
    stop: Any = context.Event()
    with ProcessPoolExecutor(processes, context, _start_worker, (reports, stop)) as pool:
        waiting = {pool.submit(_work, shard): shard for shard in shards}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.3, return_when="FIRST_COMPLETED")
                while True:
                    try:
                        follow.partly(*reports.get_nowait())
                    except queue.Empty:
                        break
                for future in done:
                    future.result()
                    follow.finished(waiting.pop(future))
        except BrokenProcessPool as error:
            raise UserError(
                "a process that prepared data died, out of memory perhaps: run the same command again, with fewer --processes"
            ) from error
        finally:
            stop.set()  # after an error: the others give up their shards instead of going on for minutes
            pool.shutdown(wait=False, cancel_futures=True)


_reports: Any = None
_stop: Any = None


class _Stopped(Exception):
    """Another shard failed, or the user interrupted."""


def _start_worker(reports: Any, stop: Any) -> None:
    global _reports, _stop
    _reports, _stop = reports, stop

    def die_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # a worker whose parent was killed would wait for work for ever

    threading.Thread(target=die_with_parent, daemon=True).start()


def _work(shard: Shard) -> None:
    def report(size: float, made: int) -> None:
        if _stop.is_set():
            raise _Stopped
        _reports.put((shard.directory, size, made))

    _build(shard, report)


def _build(shard: Shard, report: Report) -> None:
    cached(shard.directory, lambda temporary: shard.build(temporary, report), silent)


def _absent(directory: Path) -> dict[str, Any]:
    raise UserError(f"{directory} was deleted while it was in use: run the same command again")


def _gone(directory: Path) -> dict[str, Any]:
    raise UserError(f"the shard {directory} is gone: delete {directory.parent} and run `functional-sam data` again")


class Joined:
    """Arrays in files as one array without end marks: joined[positions], len(joined). Nothing is read before it is asked for."""

    def __init__(self, paths: Sequence[Path], dtype: str | np.dtype, row: tuple[int, ...] = ()):
        size = np.dtype(dtype).itemsize * int(np.prod(row, dtype=np.int64))
        paths = [path for path in paths if path.stat().st_size]  # an empty file cannot be mapped
        self.dtype, self.row = np.dtype(dtype), row
        self._starts = np.cumsum([0, *(path.stat().st_size // size for path in paths)], dtype=np.int64)
        self._arrays = [np.memmap(path, dtype=dtype, mode="r").reshape(-1, *row) for path in paths]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions)
        which = np.searchsorted(self._starts, positions, side="right") - 1
        result = np.empty((*positions.shape, *self.row), self.dtype)
        for i in np.unique(which):
            here = which == i
            result[here] = self._arrays[i][positions[here] - self._starts[i]]
        return result
