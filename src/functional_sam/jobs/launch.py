"""`functional-sam submit`: everything that can be wrong is found out first, then the code is copied and the jobs are submitted."""

import datetime
import subprocess
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from functional_sam.config import PLACES, Config, settings_of
from functional_sam.errors import UserError
from functional_sam.exhibits import needed, packs_of, take_released
from functional_sam.jobs.profile import PATIENCE, Profile, check_site, load_profile
from functional_sam.jobs.queue import states
from functional_sam.jobs.snapshot import snapshot
from functional_sam.jobs.submission import Submission, refusal
from functional_sam.records import Run
from functional_sam.tasks import prepare
from functional_sam.training.distributed import require_divisible

OF_PROFILE = {"runtime.device": "gpus_per_node", "runtime.threads": "cpus_per_task"}  # a setting -> what says it of a job
LIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED", "REQUEUE_HOLD")


def submit(
    exhibit: str,
    scale: str,
    cluster: str,
    overrides: list[str],
    dry_run: bool,
    console: Console,
    released: bool = False,
    warn: Callable[[list[Config], Profile, str], None] | None = None,
) -> None:
    """Submit the missing runs of an exhibit and the job that draws it, or print their scripts.

    released: runs that were released are taken as they are, now and as later stages name more; a dry run only counts them.
    warn: called with the missing runs, the profile and its name, before anything is submitted.
    Raises UserError for a profile that cannot be, an absent SLURM, an unknown partition, runs that are queued already, or what
    sbatch refuses; nothing is queued then.
    """
    profile = load_profile(cluster)
    overrides = [_absolute(override) for override in overrides]
    configs = needed(exhibit, scale, tuple(overrides))
    packs = packs_of(exhibit, scale) if released else []
    missing = [c for c in configs if not Run(c).done and not (Run(c).state == "missing" and any(pack.done(c) for pack in packs))]
    for config in missing:
        _require_processes(config, profile, cluster)
    if warn is not None:
        warn(missing, profile, cluster)
    runs = Path(configs[0].runtime.runs).resolve()
    directory = _unused(runs / ".jobs", exhibit)
    submission = Submission(directory, exhibit, scale, overrides, profile, released)
    scripts = submission.scripts(len(missing))
    if dry_run:
        for title, script in zip(("the runs", "after them"), scripts[-2:] if missing else ["", *scripts], strict=True):
            if script:
                console.print(f"# ---- {title}", highlight=False, markup=False)
                console.print(script, highlight=False, markup=False, soft_wrap=True)
        console.print(f"# dry run, nothing submitted: {len(missing)} of {len(configs)} known runs are missing", highlight=False)
        return
    check_site(profile, cluster)
    _refuse_queued(missing, runs)
    _try(scripts[0], profile)
    if released:  # what the site or sbatch refuses leaves nothing behind: only now
        configs = take_released(exhibit, scale, tuple(overrides), lambda line: console.print(line, highlight=False, soft_wrap=True))
        missing = [config for config in configs if not Run(config).done]
    for config in {repr((c.task, c.data, c.runtime.cache)): c for c in missing}.values():  # here, where there is a network
        prepare(config, lambda line: console.print(line, style="dim", highlight=False))
    snapshot(directory / "code")
    submission.save()
    ids, after = submission.submit(1)
    array = ids[0].split("_")[0] if ids else ""
    done = f"submitted {len(ids)} runs as job {array}, then" if ids else f"all {len(configs)} known runs are complete; submitted"
    lines = [
        f"{done} job {after}, which draws {exhibit}, once runs that are known only then are complete too",
        f"code, scripts and logs: {directory}",
    ]
    lines.append(f"follow: functional-sam status; cancel: scancel {' '.join(filter(None, (array, after)))}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _absolute(override: str) -> str:
    """A job runs elsewhere than where a directory was named."""
    key, _, value = override.partition("=")
    given = settings_of((override,))
    for setting, own in OF_PROFILE.items():
        if setting in given:
            raise UserError(f"override {override!r}: a job has it from the cluster's profile: set {own} there, leave it out here")
    if key not in PLACES and (places := [place for place in PLACES if place in given]):
        raise UserError(f"override {override!r}: say it as {places[0]}=DIRECTORY, for a job runs elsewhere than here")
    return f"{key}={Path(value).expanduser().resolve()}" if key in PLACES and value not in ("", "null") else override


def _require_processes(config: Config, profile: Profile, cluster: str) -> None:
    """Now, and not once the job has waited for its turn."""
    processes, parallel = profile.nodes * profile.tasks, config.runtime.parallel
    if processes > 1 and parallel == "none":
        raise UserError(
            f"runtime.parallel=none: cluster {cluster} gives a run {processes} processes (nodes, tasks_per_node), not 1"
        )
    if processes > 1:
        require_divisible(config, processes, "ddp" if parallel == "auto" else parallel)


def _unused(parent: Path, exhibit: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = (f"{stamp}-{exhibit}" + (f"-{number}" if number else "") for number in range(1000))
    return next(parent / name for name in names if not (parent / name).exists())


def _refuse_queued(missing: list[Config], runs: Path) -> None:
    now = states(runs)
    queued = [config.name for config in missing if now.get(config.name, "").split(" ")[0] in LIVE]
    if queued:
        raise UserError(
            f"{len(queued)} of the runs are in the queue already (first: {queued[0]}, {now[queued[0]]}): "
            "wait for them, or scancel their jobs"
        )


def _try(script: str, profile: Profile) -> None:
    """Ask sbatch whether it would take the script: account, constraint, memory and GPUs are known to it alone."""
    command = ["sbatch", "--test-only"]
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"sbatch did not answer within {PATIENCE} seconds: is the controller of the cluster up?") from error
    if done.returncode:
        raise UserError(f"sbatch would refuse the job, nothing was submitted: {refusal(done.stderr)}")
