"""One run directory: config.yaml, provenance.json, metrics.jsonl (append-only), checkpoint/, and done.json last.

Complete: skipped. Partial: resumed. Another config under the same name, or two processes at once: refused.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from functional_sam.config import Config, load, to_yaml
from functional_sam.errors import UserError
from functional_sam.files import atomic_file, sync, write_text


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
    def state(self) -> str:
        """done, partial (started, resumable) or missing."""
        if self.done:
            return "done"
        return "partial" if (self.directory / "metrics.jsonl").is_file() else "missing"

    def summary(self) -> dict[str, Any]:
        """Content of done.json."""
        content: dict[str, Any] = json.loads((self.directory / "done.json").read_text())
        return content

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
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RunLocked(f"{self.directory} is being written by another process: wait for it, or stop it") from None
        except OSError as error:
            raise UserError(
                f"cannot write in {self.directory} ({error.strerror}): choose another with runtime.runs=DIRECTORY"
            ) from error
        path = self.directory / "config.yaml"
        if path.exists():
            there = load(path)
            if there.hash != self.config.hash:
                self.close()
                raise UserError(f"{self.directory} holds the run of another config (hash {there.hash}): move it away")
        else:
            write_text(path, to_yaml(self.config))

    def restart_at(self, step: int) -> None:
        """Drop the lines after `step` (they will be measured again) and open metrics.jsonl to append."""
        path = self.directory / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._metrics = path.open("a", encoding="utf-8")

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append one line; it reaches the file at once."""
        assert self._metrics is not None
        self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._metrics.flush()

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
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
