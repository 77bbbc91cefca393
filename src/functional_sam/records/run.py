"""One run directory: config.yaml, provenance.json, metrics.jsonl (append-only), checkpoint/, and done.json last.

Complete: skipped. Partial: resumed. Another config under the same name, or two processes at once: refused.
"""

import fcntl
import json
import math
import os
import platform
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from functional_sam.config import Config, load, to_yaml
from functional_sam.errors import UserError
from functional_sam.files import atomic_file, explained, sync, write_text
from functional_sam.records.due import at_fault

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

    @classmethod
    def at(cls, directory: Path) -> "Run":
        """The run whose directory this is, by its config.yaml. Raises UserError where that config's run has another name.

        A directory that was renamed, or is of an earlier version, would have the run begun anew, in another place.
        """
        config = load(directory / "config.yaml")
        if config.name != (name := directory.resolve().name):
            raise UserError(
                f"{directory}: its config.yaml is that of {config.name} today, so that {name} was renamed or is of an earlier "
                "version; rename it, or begin the run anew with functional-sam train --task"
            )
        return cls(config, directory.resolve().parent if directory.name in ("", "..") else directory.parent)

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
        except OSError as error:
            raise UserError(f"cannot read {self.directory / '.lock'} ({error.strerror}): is the run another user's?") from error
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
            if not isinstance(content, dict):
                raise ValueError(f"a {type(content).__name__}, no JSON object")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: the run is not complete, or its directory was damaged") from None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): {self._way_out}") from error
        return content

    def summary(self) -> dict[str, Any]:
        """Content of done.json. Raises UserError unless it says that the run diverged, or holds the numbers that it came to."""
        content = self.read("done.json")
        if content.get("diverged") is True:
            return content
        bad = {key: value for key, value in content.items() if isinstance(value, bool) or not isinstance(value, int | float)}
        bad |= {key: value for key, value in content.items() if key not in bad and not math.isfinite(value)}
        if bad or "step" not in content:
            what = ", ".join(f"{key} is {value!r}" for key, value in bad.items()) or "no step"
            raise UserError(f"{self.directory / 'done.json'} is damaged ({what}): {self._way_out}")
        return content

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, those of one kind or all; of a run not yet complete a last line cut by a crash is left out.

        Raises UserError, with the number of the line, for any other that is none, and where a complete run has no such file.
        """
        return [line for line in self._lines() if kind is None or line["kind"] == kind]

    def only(self, kind: str, step: int) -> dict[str, Any]:
        """The line of a kind at a step. Raises UserError where it is lost, or is there twice."""
        found = [line for line in self.metrics(kind) if line["step"] == step]
        if len(found) != 1:
            path = self.directory / "metrics.jsonl"
            raise UserError(f"{path}: {len(found)} lines of kind {kind} at step {step}, where training wrote 1; {self._way_out}")
        return found[0]

    def _lines(self) -> list[dict[str, Any]]:
        path, done = self.directory / "metrics.jsonl", self.done  # asked first: the run may be at work
        try:
            *whole, unfinished = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            if done:
                raise UserError(f"{path} is missing, and the run is complete: {self._way_out}") from None
            return []
        if unfinished and done:  # of a run that was killed it will be measured again; a complete one has lost it
            raise UserError(f"{path}, line {len(whole) + 1} is cut, and the run is complete: {self._way_out}")
        return [self._parsed(line, number) for number, line in enumerate(whole, 1)]

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            content = json.loads(line.decode("utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("kind"), str) or type(content.get("step")) is not int:
                raise ValueError("no JSON object with kind and step")
        except ValueError as error:
            raise UserError(f"{self.directory / 'metrics.jsonl'}, line {number} is damaged ({error}): {self._way_out}") from error
        found: dict[str, Any] = content
        return found

    @property
    def _way_out(self) -> str:
        return f"restore the file, or move {self.directory} away and run again"

    def require_metrics_until(self, step: int) -> None:
        """Raise UserError where metrics.jsonl lacks what training logs until `step` by the config, or has it twice."""
        path, lines = self.directory / "metrics.jsonl", self._lines()
        if not self.released:  # what was released has no training lines
            # Other runtime settings may have begun the run: its name is the same.
            every = max(self.config.runtime.log_every, self._begun_with().runtime.log_every)
            least = step if step == self.config.training.steps else max(min(1, step), step // every * every)
            reached = max((line["step"] for line in lines if line["kind"] == "train"), default=0)
            if reached < least:
                raise UserError(
                    f"{path}: its lines of kind train end at step {reached}, and step {step} was done, so that some are lost; "
                    f"{self._way_out}"
                )
        if found := at_fault(self.config, lines, step):
            raise UserError(f"{path}: {found}; {self._way_out}")

    def _begun_with(self) -> Config:
        path = self.directory / "config.yaml"
        return load(path) if path.is_file() else self.config

    # ------------------------------------------------------------------ writing

    def for_a_process(self) -> None:
        """Write config.yaml for a process that will know the directory alone; of a begun run with the runtime settings of now.

        But for log_every, by which the lines that are there are judged. A file that is damaged or another run's is left alone:
        who does the run says so.
        """
        path, runtime = self.directory / "config.yaml", self.config.runtime
        if path.exists():
            try:
                there = load(path)
            except UserError:
                return
            runtime = replace(runtime, log_every=there.runtime.log_every)
            if there.hash != self.config.hash or there.runtime == runtime:
                return
        write_text(path, to_yaml(replace(self.config, runtime=runtime)))

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
        self._lines()  # damaged ones are refused before the data is prepared
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
        """Drop the lines after `step` (they will be measured again) and open metrics.jsonl to append.

        Raises UserError, and leaves all as it is, where lines until `step` are missing: nobody would measure them again.
        """
        try:
            self.require_metrics_until(step)
        except UserError as error:
            raise UserError(
                f"{error}; or remove the checkpoints from step {step} on, and it goes on from the one before"
            ) from error
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
