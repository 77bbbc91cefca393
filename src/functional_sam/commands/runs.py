"""plan, status, run: how far the runs are, and doing those that are missing."""

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from functional_sam.commands import console, wide
from functional_sam.commands.scale import show_on
from functional_sam.config import Config
from functional_sam.errors import Interrupted, UserError
from functional_sam.exhibits import needed, packs_of, take_released, way
from functional_sam.jobs.queue import log_of, states
from functional_sam.records import Run, Status, content, found_in, move_aside, status
from functional_sam.tasks import prepared_manifest

STATES = ("done", "stale", "damaged", "running", "partial", "missing")


def plan_command(options: argparse.Namespace) -> int:
    """Every run the exhibit is known to need: state, steps, tokens, and how long it takes by speeds measured here."""
    from functional_sam.training.speed import Measured, estimate, measured, seen

    configs = needed(options.exhibit, options.scale, tuple(options.overrides))
    tasks = {config.task for config in configs if not Run(config).done}
    speeds = [speed for root in sorted({Path(c.runtime.runs) for c in configs}) for speed in measured(root, tasks)]
    table = Table("run", "rho", "seed", "steps", "trained on", "time", "state", title=f"{options.exhibit}, scale {options.scale}")
    found = statuses([Run(config) for config in configs])
    left: list[Measured | None] = []  # what is still to do: seconds of a run, and its threads
    for run, now in found:
        config = run.config
        amount, unit = seen(config)
        speed = estimate(config, speeds)
        took = run.summary().get("seconds") if now.state in ("done", "stale") else None
        if took is not None:
            time = f"{took_words(took)}, measured"
        elif run.done:
            time = ""
        else:
            steps = config.training.steps - now.step
            left.append(speed and Measured(config, speed.seconds * steps, speed.threads))
            time = f"{took_words(speed.seconds * steps)}{' left' if now.step else ''}, estimated" if speed else "unknown"
        rho = "" if config.method.rho is None else f"{config.method.rho:g}"
        steps_text = str(config.training.steps) if now.step in (0, config.training.steps) else f"{now.step}/{config.training.steps}"
        seed = str(config.training.init_seed)
        table.add_row(run.directory.name, rho, seed, steps_text, f"{amount:,} {unit}", time, now.words(run))
    wide().print(table)
    console.print(
        f"{len(found) - len(left)} of {len(found)} known runs complete" + stale_words(options.exhibit, options.scale, found),
        soft_wrap=True,
    )
    if left:
        known = [(part.seconds, part.threads) for part in left if part is not None]
        console.print(left_words(known, len(left) - len(known)), soft_wrap=True)
    packs = packs_of(options.exhibit, options.scale)
    waiting = sum(now.state == "missing" and any(pack.done(run.config) for pack in packs) for run, now in found)
    if waiting:
        command = way("run", options.exhibit, options.scale, options.overrides, "--released")
        console.print(f"{waiting} of them are released: `{command}` takes them as they are, and does the rest", soft_wrap=True)
    if options.cluster:
        show_on(configs, options.cluster)
    return 0


def status_command(options: argparse.Namespace) -> int:
    """The same of all runs in a directory of runs."""
    root = Path(options.directory)
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; runs are made there by functional-sam run or train, or give another directory")
    table = Table("run", "step", "of", "loss", "state")
    runs, others = found_in(root)
    found, queued = statuses(runs), states(root)
    if queued:
        table.add_column("queue")
    for run, now in found:
        loss = "" if now.loss is None else f"{now.loss:.4f}"
        cells = (run.directory.name, str(now.step or ""), str(run.config.training.steps), loss, now.words(run))
        table.add_row(*cells, *([queued.get(run.directory.name, "")] if queued else []))
    for name, why in others.items():
        table.add_row(name, "", "", "", why)
    wide().print(table)
    for run, now in found:
        reason = run.directory / "error.txt"
        if now.state in ("partial", "missing") and reason.is_file():
            log = log_of(run.directory.name, root)
            text = f"{run.directory.name} failed: {reason.read_text().strip()}" + (f"; log: {log}" if log else "")
            console.print(text, style="red", highlight=False, soft_wrap=True, markup=False)
    counts = {state: sum(now.state == state for _, now in found) for state in STATES}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{root}: {len(found)} runs; {text}", highlight=False, soft_wrap=True)
    if others:
        text = f"{len(others)} directories hold no run of this version, which leaves them alone: delete them or move them away"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)
    return 0


def run_command(options: argparse.Namespace) -> int:
    """Do what is missing; 1 with a table of what failed and why when not all is complete at the end."""
    from functional_sam.training.pool import AGAIN, execute
    from functional_sam.training.signals import Stop

    if options.jobs < 0:
        raise UserError(f"--jobs {options.jobs}: a number of processes, or 0 for one per core")
    if options.fresh and options.released:
        raise UserError("--fresh redoes every run, --released trains no run that was released: give one of them")
    overrides = tuple(options.overrides)
    known: set[str] = set()  # runs that this command has named: --fresh moves each aside once

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    while True:  # an exhibit may know more runs once the first are complete
        if options.released:
            configs = take_released(options.exhibit, options.scale, overrides, say)
        else:
            configs = needed(options.exhibit, options.scale, overrides)
        if options.fresh:
            runs = [run for run in map(Run, configs) if run.config.name not in known]
            known |= {run.config.name for run in runs}
            aside = move_aside(runs, runs[0].directory.parent) if runs else None
            if aside is not None:
                say(f"moved the runs that were there to {aside}")
        if all(Run(config).done for config in configs):
            found = statuses([Run(config) for config in configs])
            text = f"{options.exhibit}, scale {options.scale}: all {len(configs)} runs are complete"
            console.print(text + stale_words(options.exhibit, options.scale, found), highlight=False, soft_wrap=True)
            return 0
        try:
            with Stop(at_once=f"nothing was running; {AGAIN}"):
                failed = execute(configs, options.jobs or os.cpu_count() or 1, console)
        except Interrupted as error:
            if options.fresh:  # it would move aside what it has begun
                command = way("run", options.exhibit, options.scale, overrides)
                raise Interrupted(str(error).replace(AGAIN, f"`{command}`, without --fresh, goes on")) from error
            raise
        if failed:
            show_failed(failed, len(configs))
            return 1


def show_failed(failed: list[tuple[Run, str]], of: int) -> None:
    """A table of the runs that are not complete, and why, on stderr."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        errors = Console(stderr=True, width=240)
    table = Table("run", "why", title=f"{len(failed)} of {of} runs are not complete", title_style="red")
    for run, reason in failed:
        table.add_row(str(run.directory), reason)
    errors.print(table)


def statuses(runs: list[Run]) -> list[tuple[Run, Status]]:
    """Each run with its status, the present data looked up once for each kind."""
    data: dict[str, str | None] = {}

    def present(config: Config) -> str | None:
        key = repr((config.kind, config.data, config.model.length, config.model.pretrained, config.runtime.cache))
        if key not in data:
            manifest = prepared_manifest(config)
            data[key] = content(manifest) if manifest else None
        return data[key]

    return [(run, status(run, present(run.config))) for run in runs]


def left_words(known: list[tuple[float, int]], unknown: int) -> str:
    """How long the runs that are left will take here: seconds and threads of those with a known speed, number of the others."""
    if not known:
        return "time left: unknown, no run of this shape was done here"
    seconds, threads = [seconds for seconds, _ in known], max(threads for _, threads in known)
    jobs = max(1, (os.cpu_count() or 1) // threads)
    time = took_words(max(sum(seconds) / jobs, max(seconds)))
    text = f"estimated time left on this machine: {time} for {len(known)} runs, {jobs} at a time on {threads} thread(s) each"
    return text + (f"; unknown for {unknown} whose shape was never run here" if unknown else "")


def stale_words(exhibit: str, scale: str, found: list[tuple[Run, Status]]) -> str:
    """What to say of runs that other code or data made; nothing when there are none."""
    stale = sum(now.state == "stale" for _, now in found)
    if not stale:
        return ""
    return (
        f"; {stale} of them made by other code or data than is here: `{way('plan', exhibit, scale)}` says what differs, "
        f"`{way('run', exhibit, scale, (), '--fresh')}` moves them aside and redoes them"
    )


def took_words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
