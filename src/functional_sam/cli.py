"""The command functional-sam: plan | run | draw | train | status | methods.

Exit codes: 0 done, 1 a run failed or diverged, 2 bad input (one line, no traceback; --debug shows it), 130 interrupted.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from functional_sam.errors import UserError

console = Console()


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="functional-sam", description="Functional-SAM: the paper's exhibits, and single runs.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str, exhibit: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        if exhibit:
            sub.add_argument("exhibit", help="for instance figure-1")
            sub.add_argument("--scale", default="quick", help="quick (default), laptop, ...: a file of configs/scales")
            sub.add_argument("overrides", nargs="*", help="key=value on every run's config, for instance training.steps=100")
        return sub

    command("plan", _plan, "list the runs an exhibit needs and how far each is")
    run = command("run", _run, "do the missing runs of an exhibit")
    run.add_argument("--jobs", type=int, default=0, help="processes at a time (default: one per core)")
    draw = command("draw", _draw, "draw an exhibit from its records, through its notebook")
    draw.add_argument("--no-notebook", action="store_true", help="draw directly, without executing the notebook")

    train = command("train", _train, "one run: --task and --method, or run directories to finish", exhibit=False)
    train.add_argument("--task", help="a file of configs/tasks")
    train.add_argument("--method", default="adamw", help="a file of configs/methods")
    train.add_argument("--scale", default="quick", help="a file of configs/scales")
    train.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    train.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    train.add_argument("arguments", nargs="*", help="with --task: key=value overrides; without: run directories")

    command("status", _status, "every run under runs/ and its state", exhibit=False)
    command("methods", _methods, "the methods: where each looks, which derivative it takes there, what it costs", exhibit=False)
    bench = command("benchmark", _benchmark, "time and memory of every method as ratios to AdamW, measured here", exhibit=False)
    bench.add_argument("--rounds", type=int, default=0, help="turns of each method (default: enough for stable medians)")
    return parser


def _plan(options: argparse.Namespace) -> int:
    from functional_sam.exhibits import plan
    from functional_sam.records import Run

    table = Table("run", "rho", "seed", "steps", "state", title=f"{options.exhibit}, scale {options.scale}")
    runs = [Run(config) for config in plan(options.exhibit, options.scale, tuple(options.overrides))]
    for run in runs:
        config = run.config
        rho = "" if config.method.rho is None else f"{config.method.rho:g}"
        table.add_row(run.directory.name, rho, str(config.training.init_seed), str(config.training.steps), run.state)
    console.print(table)
    console.print(f"{sum(run.done for run in runs)} of {len(runs)} known runs complete")
    return 0


def _run(options: argparse.Namespace) -> int:
    from functional_sam.exhibits import plan
    from functional_sam.records import Run
    from functional_sam.training.pool import execute

    if options.jobs < 0:
        raise UserError(f"--jobs {options.jobs}: a number of processes, or 0 for one per core")
    while True:  # an exhibit may know more runs once the first are complete
        configs = plan(options.exhibit, options.scale, tuple(options.overrides))
        if all(Run(config).done for config in configs):
            console.print(f"{options.exhibit}, scale {options.scale}: all {len(configs)} runs are complete")
            return 0
        execute(configs, options.jobs or os.cpu_count() or 1, console)


def _draw(options: argparse.Namespace) -> int:
    from functional_sam.exhibits import draw, notebook
    from functional_sam.exhibits.notebooks import execute_notebook

    if options.no_notebook or options.overrides:
        exhibit = draw(options.exhibit, options.scale, tuple(options.overrides))
        paths, verdict = exhibit.paths, exhibit.verdict
    else:
        paths, verdict = execute_notebook(options.exhibit, options.scale)
        paths = [*paths, notebook(options.exhibit)]
    for path in paths:
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        console.print(f"wrote {shown}", highlight=False, soft_wrap=True)
    console.print(f"[bold]{options.exhibit}[/bold]: {verdict}", highlight=False, soft_wrap=True)
    return 0


def _train(options: argparse.Namespace) -> int:
    from functional_sam.config import compose
    from functional_sam.training.loop import train
    from functional_sam.training.pool import work

    if options.worker or options.task is None:
        if not options.arguments:
            raise UserError("train needs --task (a file of configs/tasks) or run directories")
        for argument in options.arguments:
            if not (Path(argument) / "config.yaml").is_file():
                raise UserError(f"{argument}: no config.yaml there; give run directories, or --task with key=value overrides")
        return 1 if work([Path(argument) for argument in options.arguments], options.threads) else 0
    config = compose(options.task, options.method, options.scale, overrides=options.arguments)
    config.runtime.threads = options.threads or config.runtime.threads
    run = train(config, progress=lambda line: console.print(line, style="dim", highlight=False))
    console.print(f"wrote {run.directory}: {run.summary()}", highlight=False, soft_wrap=True)
    return 0


def _status(options: argparse.Namespace) -> int:
    from functional_sam.config import load
    from functional_sam.records import Run

    table = Table("run", "step", "of", "loss", "state")
    for path in sorted(Path("runs").glob("*/config.yaml")):
        run = Run(load(path), path.parents[1])
        lines = run.metrics("train")
        step, loss = (str(lines[-1]["step"]), f"{lines[-1]['loss']:.4f}") if lines else ("", "")
        table.add_row(run.directory.name, step, str(run.config.training.steps), loss, run.state)
    console.print(table)
    return 0


def _methods(options: argparse.Namespace) -> int:
    from functional_sam.sharpness.methods import table

    shown = Table("name", "ascent", "path", "mix", "passes", "memory beyond AdamW", "rho", "source")
    for *row, rho, source in table():
        shown.add_row(*map(str, row), f"{rho:g}", source)
    # Wide enough not to cut a cell where the output is no terminal.
    (console if console.is_terminal else Console(width=160)).print(shown)
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    from functional_sam.benchmark import benchmark
    from functional_sam.exhibits.cost import draw_cost

    directory = Path("results/benchmark")
    for name, frame in benchmark(directory, console, options.rounds or None).items():
        console.print(frame.to_string(index=False, float_format="%.3f"), highlight=False, soft_wrap=True)
        console.print(f"wrote {directory / name}.csv", highlight=False)
    for path in draw_cost(directory / "time.csv"):
        console.print(f"wrote {path.relative_to(Path.cwd())}", highlight=False)
    return 0
