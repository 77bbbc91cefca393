"""How far a run is, and whether what made it is still what is here."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from functional_sam.config import load
from functional_sam.errors import UserError
from functional_sam.records.code import differences
from functional_sam.records.run import Run, RunLocked


@dataclass(frozen=True)
class Status:
    """state: done, stale (done by other code or data than is here), damaged, running, partial or missing."""

    state: str
    step: int  # steps done
    differs: list[str]  # what differs, in words; of partial runs too
    loss: float | None = None  # of the last training line
    diverged: bool = False

    def words(self, run: Run) -> str:
        """One cell of a table."""
        holder, text = run.holder, self.state
        if self.state == "running" and holder:
            job = f", job {holder['job']}" if "job" in holder else ""
            text += f" (process {holder['pid']} on {holder['host']}{job})"
        if run.released:
            text += " (released)"
        if self.diverged:
            text += " (diverged)"
        return f"{text}: {'; '.join(self.differs)}" if self.differs else text


def status(run: Run, present: str | None = None) -> Status:
    """The status of a run; present: `content` of the present data, None when that is not prepared and cannot be compared."""
    state = run.state
    if state == "missing":
        return Status(state, 0, [])
    try:
        differs = differences(run.read("provenance.json"), present)
    except UserError as error:
        differs = [] if state == "running" else [str(error)]
    try:
        lines = run.metrics("train")
        diverged = state == "done" and bool(run.summary().get("diverged"))
    except UserError as error:
        return Status("damaged", 0, [str(error)])
    step, loss = (lines[-1]["step"], lines[-1].get("loss")) if lines else (0, None)
    return Status("stale" if state == "done" and differs else state, step, differs, loss, diverged)


def found_in(root: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs in a directory of runs, and of what cannot be one today, name -> why, such as a run of an earlier version."""
    runs, others = [], {}
    for path in sorted(root.glob("*/config.yaml")):
        name = path.parent.name
        try:
            config = load(path)
        except UserError as error:
            others[name] = f"of an earlier version, or damaged: {str(error).removeprefix(f'{path}: ')}"
            continue
        if config.name == name:
            runs.append(Run(config, root))
        else:
            others[name] = f"of an earlier version, or renamed: today its settings are those of {config.name}"
    return runs, others


def move_aside(runs: Iterable[Run], root: Path) -> Path | None:
    """Move run directories into a new directory under root/aside, and return it; None when there is none to move.

    Raises RunLocked, before anything is moved, when a process is at work on one of them.
    """
    there = [run for run in runs if run.directory.is_dir()]
    for run in there:
        if run.running:
            raise RunLocked(f"{run.directory} is being written by another process: wait for it, or stop it")
    if not there:
        return None
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    number = 0
    while True:
        aside = root / "aside" / (f"{stamp}-{number}" if number else stamp)
        try:
            aside.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot make {aside} ({error.strerror}): make {root} writable") from error
    for run in there:
        run.directory.rename(aside / run.directory.name)
    return aside
