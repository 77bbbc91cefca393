"""One run directory: config.yaml, provenance.json, metrics.jsonl (append-only), checkpoint/, and done.json last.

Complete: skipped. Partial: resumed. Another config under the same name, or two processes at once: refused.
"""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from functional_sam.config import Config, load, to_yaml
from functional_sam.errors import UserError
from functional_sam.files import atomic_file, explained, sync, write_text

RELEASED = ".released"  # a file of a run that was not trained here: its records were taken from those that are released
LOCK_WAIT = 0.5  # seconds: a reader that asks whether the run is locked holds the lock for an instant


class RunLocked(UserError):
    """Another process is at work in this run directory."""


class Run:
    """The directory of one config's run."""

    def __init__(self, config: Config, root: Path | None = None):
        self.config = config
        self.directory = (root or Path(config.runtime.runs)) / config.name
        self._metrics: TextIO | None = None
        self._lock: FileLock | None = None

    # ------------------------------------------------------------------ reading

    @property
    def done(self) -> bool:
        """True when the run is complete: done.json is written last, whole."""
        return (self.directory / "done.json").is_file()

    @property
    def released(self) -> bool:
        """True when the records were not made here but taken from the released ones."""
        return (self.directory / RELEASED).is_file()

    @property
    def running(self) -> bool:
        """True while a process holds the run's lock."""
        try:
            with (self.directory / ".lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @property
    def state(self) -> str:
        """done, running (a process holds its lock), partial (started, resumable) or missing."""
        if self.done:
            return "done"
        if self.running:
            return "running"
        return "partial" if (self.directory / "metrics.jsonl").is_file() else "missing"

    @property
    def holder(self) -> dict[str, Any]:
        """Process, host and, under SLURM, job of who opened the run last: at work while `running`, or dead without a good-bye."""
        try:
            content: dict[str, Any] = json.loads((self.directory / ".holder").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content

    def read(self, name: str) -> dict[str, Any]:
        """Content of the run's file NAME, such as curvature.json. Raises UserError when there is none."""
        path = self.directory / name
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: the run is not complete, or its directory was damaged") from None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): move {self.directory} away and run again") from error
        return content

    def summary(self) -> dict[str, Any]:
        """Content of done.json."""
        return self.read("done.json")

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, those of one kind or all; a line cut by a crash is left out."""
        return [line for line in self._lines() if kind is None or line["kind"] == kind]

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            text = (self.directory / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    # ------------------------------------------------------------------ writing

    def open(self) -> None:
        """Lock the directory and write config.yaml. Raises RunLocked, or UserError when it holds another config's run."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {self.directory} ({error.strerror}): choose another with runtime.runs=DIRECTORY"
            ) from error
        self._lock = FileLock(self.directory / ".lock")
        try:
            self._lock.acquire(timeout=LOCK_WAIT)
        except Timeout:
            self._lock = None
            raise RunLocked(f"{self.directory} is being written by {self._who()}: wait for it, or stop it") from None
        except OSError as error:
            raise UserError(
                f"cannot write in {self.directory} ({error.strerror}): choose another with runtime.runs=DIRECTORY"
            ) from error
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        path = self.directory / "config.yaml"
        if path.exists():
            there = load(path)
            if there.hash != self.config.hash:
                raise UserError(f"{self.directory} holds the run of another config (hash {there.hash}): move it away")
        else:
            write_text(path, to_yaml(self.config))
        job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        self.write(".holder", {"pid": os.getpid(), "host": platform.node(), **job})
        for leftover in self.directory.rglob(".*.tmp"):  # of a process killed while it wrote
            leftover.unlink(missing_ok=True)

    def _who(self) -> str:
        holder = self.holder
        if not holder:
            return "another process"
        job = f", job {holder['job']}" if "job" in holder else ""
        return f"another process ({holder['pid']} on {holder['host']}{job})"

    def restart_at(self, step: int) -> None:
        """Drop the lines after `step` (they will be measured again) and open metrics.jsonl to append."""
        (self.directory / RELEASED).unlink(missing_ok=True)  # from here on it is trained here
        path = self.directory / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._metrics = path.open("a", encoding="utf-8")

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append one line; it reaches the file at once. Raises UserError when the disk is full."""
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise explained(error, self.directory / "metrics.jsonl") from error

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write NAME as JSON, whole or not at all."""
        write_text(self.directory / name, json.dumps(content, indent=1) + "\n")

    def sync(self) -> None:
        """Make the metrics written so far survive a power cut."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
            sync(self.directory)

    def close(self) -> None:
        """Release the lock."""
        if self._metrics is not None:
            with suppress(OSError):  # a full disk: log() has said so
                self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            with suppress(OSError):
                (self.directory / ".holder").unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
