"""data, estimate: what large runs want done or known beforehand."""

import argparse
from collections.abc import Sequence

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from functional_sam.commands import console, wide
from functional_sam.config import Config, compose, configs_directory, refuse_names
from functional_sam.data.shards import Status
from functional_sam.errors import UserError
from functional_sam.exhibits import KINDS, foreseen, known
from functional_sam.jobs.profile import Profile, load_profile
from functional_sam.planning import GPUS, Hardware, gpu, pause, rows, table, unfit
from functional_sam.tasks import TASKS

FIVE = ("adamw", "sam", "functional-sam", "precond-sam", "precond-functional-sam")


def data_command(options: argparse.Namespace) -> int:
    """Prepare a task's data, with a bar for what takes long."""
    refuse_names(options.overrides)
    config = compose(options.task, "adamw", options.scale, overrides=options.overrides)
    if options.processes < 0:
        raise UserError(f"--processes {options.processes}: a number of processes, or 0 for one per core")
    task = TASKS[config.kind]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task("preparing", total=None, rate="", visible=False, start=False)

        def watch(status: Status) -> None:
            if not bar.tasks[0].started:
                bar.start_task(line)  # not before the tokenizer is there: the rate is that of tokenizing
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{status.made / elapsed:,.0f} {task.unit}/s" if elapsed else ""
            text = f"{status.whole} of {status.of} files"
            bar.update(line, visible=True, completed=status.done, total=status.total, rate=rate, description=text)

        def say(text: str) -> None:
            bar.console.print(text, style="dim", highlight=False, soft_wrap=True)

        data = task.prepare(config, say, options.processes, watch)
    what = ", ".join(f"{split} {count:,}" for split, count in data.manifest.get(task.unit, {}).items())
    console.print(f"ready: {data.directory}, {task.unit}: {what}; SHA-256 {data.sha256[:16]}", highlight=False, soft_wrap=True)
    return 0


def estimate_command(options: argparse.Namespace) -> int:
    """The planner's table for exhibits, or for tasks with the five methods of the paper; key=value is on every run's config."""
    configs: list[Config] = []
    words = [*options.names, *options.overrides]
    overrides, names = tuple(one for one in words if "=" in one), [one for one in words if "=" not in one]
    if not names:
        raise UserError(f"estimate {' '.join(overrides)}: no exhibit and no task; for instance estimate table-2 {overrides[0]}")
    refuse_names(overrides)
    for name in names:
        if name in known() or name in KINDS:
            configs += foreseen(name, options.scale, overrides)
        elif (configs_directory() / "tasks" / f"{name}.yaml").is_file():
            configs += [compose(name, method, options.scale, overrides=overrides) for method in options.method or FIVE]
        else:
            raise UserError(f"{name} is neither an exhibit ({', '.join([*known(), *KINDS])}) nor a file of configs/tasks")
    if options.method and all(name in known() or name in KINDS for name in names):
        raise UserError(
            f"--method {options.method[0]} is for tasks, and {names[0]} is an exhibit, which has its own methods: leave it out"
        )
    distinct = {config.name: config for config in configs}  # exhibits share runs
    show(list(distinct.values()), gpu(options.gpu, options.utilization))
    return 0


def show(configs: Sequence[Config], hardware: Hardware) -> None:
    """Print the planner's table."""
    wide().print(table(configs, hardware))


def show_on(configs: Sequence[Config], cluster: str) -> None:
    """The table for the GPUs of a cluster profile, and the runs that do not fit what it gives to one.

    Raises UserError for a profile without GPUs or without their kind.
    """
    profile = load_profile(cluster)
    if not profile.gpus_per_node or not profile.gpu:
        raise UserError(
            f"cluster {cluster}: set gpus_per_node and gpu (one of {', '.join(GPUS)}) in its profile to plan runs for its GPUs"
        )
    show(configs, gpu(profile.gpu, profile.utilization))
    warn_on(configs, profile, cluster)


def warn_on(configs: Sequence[Config], profile: Profile, cluster: str) -> None:
    """Name the runs that do not fit the GPUs that a profile gives to one, and the one that cannot save in time; none: say nothing.

    Nothing too where the profile does not tell the kind of its GPUs.
    """
    if not profile.gpus_per_node or not profile.gpu:
        return
    hardware, given = gpu(profile.gpu, profile.utilization), profile.nodes * profile.tasks
    lines, longest, slowest = [], 0.0, ""
    for found, _ in rows(configs, hardware):
        config = found.config
        run = f"{config.task} {config.method.name}"
        if found.layout is None or found.layout.gpus > given:
            wants = f"{found.layout.gpus} GPUs" if found.layout else "more GPUs than 512"
            lines.append(f"{run} wants {wants}, {cluster} gives {given} to a run (nodes, gpus_per_node)")
        elif lack := unfit(config, hardware, given):
            lines.append(lack)
        if (seconds := pause(config, hardware, given)) > longest:
            longest, slowest = seconds, run
    if longest > profile.signal_delay:
        lines.append(
            f"signal_delay={profile.signal_delay} of {cluster}: a step, an evaluation and a save of {slowest} take {longest:.0f} s "
            "as computed; a run that is not done with them when its time ends is not requeued: raise it"
        )
    if profile.tasks < profile.gpus_per_node:
        idle = profile.gpus_per_node - profile.tasks
        lines.append(
            f"{cluster}: tasks_per_node={profile.tasks}, and a process uses one GPU: {idle} of {profile.gpus_per_node} idle"
        )
    for line in lines:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
