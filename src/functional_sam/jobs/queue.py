"""What SLURM knows of the runs that were submitted: cheap, and silent where there is no SLURM."""

import json
import shutil
from pathlib import Path

from functional_sam.jobs.profile import ask


def states(runs: Path = Path("runs")) -> dict[str, str]:
    """Run directory's name -> state of its newest job, such as `PENDING (Priority)`, `RUNNING` or `CANCELLED`.

    A run that is complete, or whose job SLURM no longer knows, is left out. At most two commands, whatever the number of runs.
    """
    newest = {name: job for name, (job, _) in _newest(runs).items() if not (runs / name / "done.json").is_file()}
    if not newest or shutil.which("squeue") is None:
        return {}
    found: dict[str, str] = {}
    for line in (ask("squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r") or "").splitlines():
        job, state, reason = line.split("|", 2)
        found[job] = f"{state} ({reason})" if state == "PENDING" and reason != "None" else state
    ended = sorted({job.split("_")[0] for job in newest.values() if job not in found})
    if ended and shutil.which("sacct") is not None:
        command = ("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(ended)}")
        for line in (ask(*command) or "").splitlines():
            job, state = line.split("|", 1)
            found.setdefault(job, state.split(" by ")[0])
    return {name: found[job] for name, job in newest.items() if job in found}


def log_of(name: str, runs: Path = Path("runs")) -> Path | None:
    """The log of a run's newest job, None where there is none."""
    job, stage = _newest(runs).get(name, ("", Path()))
    path = stage / f"{job}_0_log.out"
    return path if job and path.is_file() else None


def jobs(stage: Path) -> dict[str, str]:
    """Job id -> name of the run, of a stage's folder; empty where nothing was submitted."""
    try:
        content: dict[str, dict[str, str]] = json.loads((stage / "jobs.json").read_text(encoding="utf-8"))
        return content["runs"]
    except (OSError, ValueError, KeyError):
        return {}


def _newest(runs: Path) -> dict[str, tuple[str, Path]]:
    """Run directory's name -> its newest job, and the folder of that job's stage."""
    stages = sorted(runs.glob(".jobs/*/stage-*"), key=lambda path: (path.parent.name, int(path.name.split("-")[1])))
    return {name: (job, stage) for stage in stages for job, name in jobs(stage).items()}
