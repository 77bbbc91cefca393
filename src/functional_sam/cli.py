"""The command functional-sam: plan | run | submit | draw | check | release | train | status | methods | benchmark.

Exit codes: 0 done; 1 a run failed or diverged, a check found a difference; 2 bad input (one line, no traceback; --debug shows it);
75 stopped by a signal, saved, resumable by the same command; 130 interrupted where there was nothing to save.
"""

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from functional_sam.commands import console, shown, wide
from functional_sam.errors import RESUMABLE, Interrupted, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and dispatch; turns a UserError into one line and exit code 2."""
    parser = _parser()
    # argparse gives up on a list of key=value that an option interrupts: take what it left over.
    options, rest = parser.parse_known_args(arguments)
    taking = "overrides" if hasattr(options, "overrides") else "arguments"
    if rest and (not hasattr(options, taking) or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(options, taking, [*getattr(options, taking), *rest])
    warnings.showwarning = _warn
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a sign shows a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code: int = options.command(options)
        return code
    except (UserError, FloatingPointError) as error:
        if options.debug:
            raise
        Console(stderr=True).print(f"functional-sam: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command resumes", style="yellow")
        return 130
    except Interrupted as error:
        Console(stderr=True).print(f"functional-sam: {error}", style="yellow", highlight=False, soft_wrap=True, markup=False)
        return RESUMABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="functional-sam", description="Functional-SAM: reproduce the paper's figures and tables, or train single runs."
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str, exhibit: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        if exhibit:
            sub.add_argument("exhibit", help="such as figure-1 or table-2; or `tables` or `figures`: all that have this scale")
            sub.add_argument("--scale", default="quick", help="quick (default), laptop or paper: a file of configs/scales")
            text = "key=value for every run, such as training.steps=100; cells=NAME,NAME (studies, figure-2): these cells alone"
            sub.add_argument("overrides", nargs="*", help=text)
        return sub

    _commands_of_exhibits(command)
    _other_commands(command)
    return parser


def _commands_of_exhibits(command: Callable[..., argparse.ArgumentParser]) -> None:
    planned = command("plan", _of("runs", "plan_command"), "list the runs of an exhibit, with progress and time")
    planned.add_argument("--cluster", help="a file of jobs/clusters, by name or path: estimate time and memory on its GPUs")
    run = command("run", _of("runs", "run_command"), "train the missing runs of an exhibit")
    run.add_argument("--jobs", type=int, default=0, help="number of parallel processes (default: one per core)")
    run.add_argument("--fresh", action="store_true", help="move existing run directories aside and train all runs again")
    released = "use the released runs as they are, and train only the others"
    run.add_argument("--released", action="store_true", help=released)
    submit = command("submit", _of("submit", "submit_command"), "train the missing runs on a SLURM cluster, then draw the exhibit")
    submit.add_argument("--cluster", required=True, help="a file of jobs/clusters, by name or path")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch scripts, submit nothing")
    submit.add_argument("--released", action="store_true", help=released)
    draw = command("draw", _each(_of("results", "draw_command")), "draw an exhibit from its records by executing its notebook")
    draw.add_argument("--no-notebook", action="store_true", help="draw without executing the notebook")
    command(
        "check", _each(_of("results", "check_command")), "compare an exhibit, redrawn from the runs on disk, with the released one"
    )
    release = command("release", _each(_of("results", "release_command")), "write the results/ of an exhibit from the runs on disk")
    text = "release the complete runs although others are missing; `run --released` continues from them"
    release.add_argument("--unfinished", action="store_true", help=text)


def _other_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    command(
        "claims",
        _of("results", "claims_command"),
        "update the README's table and picture from the drawn exhibits",
        exhibit=False,
    )
    command(
        "report",
        _of("results", "report_command"),
        "write paper/report.pdf and the galleries from the drawn exhibits",
        exhibit=False,
    )

    train = command("train", _train, "train one run (--task and --method), or finish runs in given directories", exhibit=False)
    train.add_argument("--task", help="a file of configs/tasks")
    train.add_argument("--method", help="with --task: a name printed by `functional-sam methods` (default: adamw)")
    train.add_argument("--scale", help="with --task: a file of configs/scales (default: quick)")
    train.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    train.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    train.add_argument("arguments", nargs="*", help="with --task: key=value overrides; without --task: run directories")

    status = command("status", _of("runs", "status_command"), "list all runs in a directory, with their state", exhibit=False)
    status.add_argument("directory", nargs="?", default="runs", help="directory of runs (default: runs)")
    data = command("data", _of("scale", "data_command"), "prepare the data of a task before its runs", exhibit=False)
    data.add_argument("--task", required=True, help="a file of configs/tasks")
    data.add_argument("--scale", default="paper", help="a file of configs/scales (default: paper)")
    data.add_argument("--processes", type=int, default=0, help="number of tokenizing processes (default: one per core)")
    data.add_argument("overrides", nargs="*", help="key=value, such as data.files=16 runtime.data=DIRECTORY")
    text = "estimate parameters, FLOPs, memory, GPU-hours and the least number of GPUs; needs no GPU"
    guess = command("estimate", _of("scale", "estimate_command"), text, exhibit=False)
    text = "exhibits or files of configs/tasks; also key=value as for `run`, and cells=NAME,NAME"
    guess.add_argument("names", nargs="+", metavar="NAME", help=text)
    guess.set_defaults(overrides=[])  # those after an option
    guess.add_argument("--scale", default="paper", help="a file of configs/scales (default: paper)")
    guess.add_argument("--method", action="append", help="with tasks: a method; may be repeated (default: the five of table-2)")
    guess.add_argument("--gpu", default="a100-80", help="a100-40, a100-80 (default), h100-80, h200-141, l40s-48, ...")
    guess.add_argument("--utilization", type=float, default=0.4, help="expected fraction of the GPU's peak FLOP/s (default: 0.4)")
    command("methods", _methods, "print the table of methods: ascent, path, mix, cost, default rho, source", exhibit=False)
    bench = command(
        "benchmark", _benchmark, "measure time and memory of methods and curvature products on this machine", exhibit=False
    )
    bench.add_argument("--rounds", type=int, default=0, help="repetitions of each method (default: enough for stable medians)")
    bench.add_argument("--only", choices=["methods", "curvature"], help="measure one of the two (default: both)")


def _of(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A function of functional_sam.commands, imported when it is called: --help stays quick."""

    def call(options: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(f"functional_sam.commands.{module}"), function)(options)
        return code

    return call


def _each(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command for every exhibit that its first word names."""

    def call(options: argparse.Namespace) -> int:
        from functional_sam.commands.groups import each

        return each(function, options)

    return call


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Our own warnings as one line for a reader; those of libraries as Python shows them."""
    text = str(message) if category is UserWarning and "functional_sam" in filename else f"{filename}:{lineno}: {message}"
    Console(stderr=True).print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def _train(options: argparse.Namespace) -> int:
    from functional_sam.config import compose, refuse_names, settings_of
    from functional_sam.config.check import MOST_THREADS
    from functional_sam.records import Run
    from functional_sam.sharpness import resolve
    from functional_sam.tasks.settings import require_read
    from functional_sam.training.attempt import require_device
    from functional_sam.training.distributed import leave
    from functional_sam.training.loop import train
    from functional_sam.training.pool import AGAIN, work
    from functional_sam.training.schedule import warn_of_long_warmup
    from functional_sam.training.signals import Stop

    if not 0 <= options.threads <= MOST_THREADS:
        raise UserError(f"--threads {options.threads}: a number of threads, at most {MOST_THREADS}, or 0 for all cores")
    with Stop(at_once=f"no step was under way; {AGAIN}"):
        if options.worker or options.task is None:
            if not options.arguments:
                raise UserError("train needs --task (a file of configs/tasks) or run directories")
            for key in ("method", "scale"):
                if given := getattr(options, key):
                    raise UserError(f"--{key} {given} goes with --task: a run directory has its own {key}, leave it out")
            for argument in options.arguments:
                if not (Path(argument) / "config.yaml").is_file():
                    raise UserError(f"{argument}: no config.yaml there; give run directories, or --task with key=value overrides")
            directories = [Path(argument) for argument in options.arguments]
            if options.worker:
                return 1 if work(directories, options.threads) else 0
            todo = [(run.config, run.directory.parent) for run in map(Run.at, directories)]
        else:
            refuse_names(options.arguments)
            config = compose(options.task, options.method or "adamw", options.scale or "quick", overrides=options.arguments)
            require_read(config, options.arguments)
            warn_of_long_warmup(config)
            given = settings_of(tuple(options.arguments)).get("method.rho")
            if given and config.method.rho is not None and resolve(config.method.name, config.method.options)[0].ascent is None:
                raise UserError(f"override {given!r} does nothing with --method {config.method.name}, which moves no weights")
            todo = [(config, Path(config.runtime.runs))]
        code = 0
        for config, root in todo:
            config.runtime.threads = options.threads or config.runtime.threads
            require_device(config)
            run = train(config, root, progress=lambda line: console.print(line, style="dim", highlight=False))
            console.print(f"wrote {run.directory}: {run.summary()}", highlight=False, soft_wrap=True)
            code = max(code, int("diverged" in run.summary()))  # of a run that was complete before
    leave()
    return code


def _methods(options: argparse.Namespace) -> int:
    from functional_sam.sharpness.methods import table

    shown = Table("name", "ascent", "path", "mix", "gradients", "memory beyond AdamW", "rho", "source")
    for *row, rho, source in table():
        shown.add_row(*map(str, row), f"{rho:g}", source)
    wide().print(shown)
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    from functional_sam.benchmark import benchmark, curvature, methods
    from functional_sam.exhibits.cost import draw_cost
    from functional_sam.records.released import results_directory

    if options.rounds < 0:
        raise UserError(f"--rounds {options.rounds}: a number of repetitions, or 0 for enough of them")
    directory = results_directory() / "benchmark"
    frames = benchmark(directory, console, options.rounds or None, options.only)
    for name, frame in frames.items():
        console.print(frame.to_string(index=False, float_format="%.3f", na_rep=""), highlight=False, soft_wrap=True)
        console.print(f"wrote {shown(directory / f'{name}.csv')}", highlight=False)
    if "curvature" in frames and curvature.PAGE.is_file():
        curvature.fill(directory / "curvature.csv")
        console.print(f"wrote the table of costs in {curvature.PAGE}", highlight=False, soft_wrap=True)
    if "memory" in frames and methods.PAGE.is_file():
        methods.fill(directory)
        console.print(f"wrote the table of costs in {methods.PAGE}", highlight=False, soft_wrap=True)
    for path in draw_cost(directory / "time.csv") if "time" in frames else ():
        console.print(f"wrote {shown(path)}", highlight=False)
    return 0
