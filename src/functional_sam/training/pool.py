"""Many runs: worker processes that claim runs by their locks, and one display of what they do."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from functional_sam.config import Config
from functional_sam.errors import Interrupted, UserError
from functional_sam.records import Run, RunLocked
from functional_sam.tasks import prepare
from functional_sam.training.precision import warn_of_slow_bf16
from functional_sam.training.signals import Stop
from functional_sam.training.speed import Measured, seen, work_of

Show = Callable[
    [int, int, float, float, list[str]], None
]  # runs done, of, share of the work done, seconds left, a line per active run
PLAIN_EVERY = 15.0  # seconds between lines where the output is no terminal
AGAIN = "the same command goes on"
ENOUGH = 10  # steps from which a run's speed is known
POOL = "FUNCTIONAL_SAM_POOL"  # environment variable of a worker: the process that started it
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that the kernel sends when the parent has ended


@dataclass
class Watched:
    """A run seen from outside: how far it is, by the last line it logged."""

    run: Run
    work: float  # of all its steps
    seconds: float = 0.0
    step: int = 0
    loss: float = float("nan")
    size: int = -1
    done: bool = False

    def look(self) -> None:
        """Read the last training line if the file has grown; once the run is done, never again."""
        if self.done:
            return
        self.done = self.run.done
        path = self.run.directory / "metrics.jsonl"
        try:
            size = path.stat().st_size
        except OSError:
            return
        if size != self.size:
            self.size = size
            try:
                lines = self.run.metrics("train")
            except UserError:  # damaged: its worker says so, and the others go on
                return
            if lines:
                self.step, self.loss, self.seconds = lines[-1]["step"], lines[-1]["loss"], lines[-1]["seconds"]

    @property
    def fraction(self) -> float:
        """Share of the run's steps done."""
        return 1.0 if self.done else self.step / self.run.config.training.steps

    @cached_property
    def shape(self) -> tuple[str, ...]:
        """Equal where a gradient takes the same time."""
        return Measured(self.run.config, 0.0, 0).alike

    def line(self) -> str:
        """One line for the display."""
        config = self.run.config
        amount, unit = seen(config, self.step)
        rate = amount / self.seconds if self.seconds else 0.0
        rho = "" if config.method.rho is None else f" rho {config.method.rho:g}"
        return (
            f"{config.task} {config.method.name}{rho} seed {config.training.init_seed}: "
            f"step {self.step}/{config.training.steps}, loss {self.loss:.3f}, {rate:,.0f} {unit}/s"
        )


@dataclass
class Workers:
    """The worker processes; one that dies is replaced, but not to try again the run it held."""

    runs: list[Run]
    threads: int
    processes: list[subprocess.Popen[bytes] | None] = field(default_factory=list)
    died: dict[str, str] = field(default_factory=dict)  # run -> how the worker that held it ended

    def start(self, index: int) -> None:
        """Start worker number `index` on all runs that are left; it skips those that others hold."""
        left = [run for run in self.runs if not run.done and run.config.name not in self.died]
        process = _start(left, self.threads, index) if left else None
        self.processes[index:] = [process, *self.processes[index + 1 :]]

    def poll(self) -> bool:
        """True while one is at work. Replaces the dead."""
        replace = []
        for index, process in enumerate(self.processes):
            if process is None or process.poll() is None:
                continue
            self.processes[index] = None
            held = [run for run in self.runs if not run.done and run.holder.get("pid") == process.pid and not run.running]
            for run in held:
                self.died[run.config.name] = _how(process.returncode)
            if held:  # else it finished its list, or cannot even start
                replace.append(index)
        for index in replace:  # once it is known what all of them held
            self.start(index)
        return any(self.processes)

    def stop(self) -> None:
        """Ask all to save and leave, and wait until they have."""
        alive = [process for process in self.processes if process is not None]
        for process in alive:
            process.terminate()
        for process in alive:
            process.wait()


def execute(configs: Sequence[Config], jobs: int, console: Console) -> list[tuple[Run, str]]:
    """Run what is not complete with `jobs` worker processes; show run, step, loss, rate and time left.

    Every run is tried, also after another failed. Returns the runs that are not complete at the end, each with the reason; one
    that diverged is complete. Raises Interrupted after a SIGINT, SIGTERM or SIGUSR2, once the workers have saved.
    """
    runs = [Run(config) for config in configs]
    missing = [run for run in runs if not run.done]
    if not missing:
        return []
    from functional_sam.training.attempt import require_device  # with it comes the whole library

    for run in missing:
        require_device(run.config)
        if run.config.runtime.threads:
            raise UserError(
                f"runtime.threads={run.config.runtime.threads}: `run` divides the cores among its processes, whose number "
                "is --jobs: leave it out"
            )
    for config in {(c.task, repr(c.data), c.runtime.cache): c for c in (run.config for run in missing)}.values():
        prepare(config, lambda line: console.print(f"[dim]{line}[/dim]", highlight=False))
    for config in {run.config.training.precision: run.config for run in missing}.values():
        warn_of_slow_bf16(config)
    watched = [Watched(run, work_of(run.config)) for run in missing]
    largest = max(watched, key=lambda w: w.work)  # done first, for how long it takes decides how long all take
    missing = [largest.run, *(run for run in missing if run is not largest.run)]
    for run in missing:
        run.for_a_process()
        (run.directory / "error.txt").unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // max(1, jobs))  # not by how many runs are left: threads change how sums are rounded
    jobs = max(1, min(jobs, len(missing)))
    console.print(f"{len(missing)} runs to do ({len(runs) - len(missing)} complete), {jobs} at a time, {threads} thread(s) each")
    workers = Workers(missing, threads)
    try:
        with Stop() as stop:
            for index in range(jobs):
                workers.start(index)
            _watch(workers, watched, console, stop, jobs)
            if stop.requested:
                console.print(f"{stop.requested}: every run finishes its step and saves", style="yellow")
                workers.stop()
    finally:
        workers.stop()
    if stop.requested:
        done = sum(run.done for run in runs)
        raise Interrupted(f"stopped by {stop.requested}: {done} of {len(runs)} runs complete, the others saved; {AGAIN}")
    for run in missing:
        if run.done and run.summary().get("diverged"):
            console.print(f"[yellow]{run.directory} diverged: {run.summary()['error']}[/yellow]", highlight=False, soft_wrap=True)
    return [(run, _reason(run, workers)) for run in missing if not run.done]


def _how(code: int) -> str:
    """How a process that held a run ended."""
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}; run again to resume"
    return f"its process ended early with exit code {code}; run again to resume"


def _reason(run: Run, workers: Workers) -> str:
    error = run.directory / "error.txt"
    if error.exists():
        return error.read_text(encoding="utf-8").strip().splitlines()[-1]
    if run.config.name in workers.died:
        return workers.died[run.config.name]
    if run.running:
        return "another process is at work on it"
    return f"no worker took it; see {run.directory.parent}/worker-*.log"


def _start(runs: Sequence[Run], threads: int, index: int) -> subprocess.Popen[bytes]:
    log = runs[0].directory.parent / f"worker-{index}.log"
    command = [sys.executable, "-m", "functional_sam", "train", "--worker", "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), POOL: str(os.getpid())}
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, *(str(run.directory) for run in runs)],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def _watch(workers: Workers, watched: Sequence[Watched], console: Console, stop: Stop, jobs: int) -> None:
    total = sum(w.work for w in watched)
    with _display(console) as show:
        while workers.poll() and not stop.requested:
            time.sleep(0.5)
            for w in watched:
                w.look()
            done = sum(w.work * w.fraction for w in watched)
            active = [w for w in watched if w.step > 0 and not w.done]
            left = time_left(watched, jobs)
            show(sum(w.done for w in watched), len(watched), done / total, left, [w.line() for w in active])


def time_left(watched: Sequence[Watched], jobs: int) -> float:
    """Seconds until all runs are done, `jobs` at a time; nan before ENOUGH steps of the largest run's shape are measured.

    A run is as fast as the others of its shape, where there are none yet as all are, by its work.
    """
    seconds: dict[tuple[str, ...], float] = {}
    done: dict[tuple[str, ...], float] = {}
    for w in watched:
        if w.step >= min(ENOUGH, w.run.config.training.steps):
            seconds[w.shape] = seconds.get(w.shape, 0.0) + w.seconds
            done[w.shape] = done.get(w.shape, 0.0) + w.work * w.step / w.run.config.training.steps
    if max(watched, key=lambda w: w.work).shape not in done:
        return float("nan")
    overall = sum(seconds.values()) / sum(done.values())
    each = [w.work * (1 - w.fraction) * (seconds[w.shape] / done[w.shape] if w.shape in done else overall) for w in watched]
    return max(sum(each) / jobs, *each)


@contextmanager
def _display(console: Console) -> Iterator[Show]:
    """A live display on a terminal, a line now and then elsewhere."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=1.0, left="")

            def show(done: int, count: int, fraction: float, left: float, lines: list[str]) -> None:
                description = "\n".join([*lines, f"{done}/{count} runs"])
                progress.update(task, completed=fraction, description=description, left=_time(left))

            yield show
    else:
        last = [time.monotonic()]

        def show_plain(done: int, count: int, fraction: float, left: float, lines: list[str]) -> None:
            if time.monotonic() - last[0] >= PLAIN_EVERY:
                last[0] = time.monotonic()
                console.print(
                    f"{done}/{count} runs, {fraction:.0%}, {_time(left)}; " + "; ".join(lines), highlight=False, soft_wrap=True
                )

        yield show_plain


def _time(seconds: float) -> str:
    if not seconds < 1e7:
        return "time left unknown yet"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} left"


def work(directories: Sequence[Path], threads: int) -> int:
    """A worker: claim and do each run that is neither complete nor held by another; the number that failed."""
    import traceback

    _end_with_the_pool()
    from functional_sam.training.attempt import attempt  # with it comes the whole library

    failures = 0
    for directory in directories:
        try:
            attempt(directory, threads)
        except Interrupted:
            raise
        except RunLocked:
            continue
        except Exception:
            failures += 1
            traceback.print_exc()
    return failures


def _end_with_the_pool() -> None:
    """Have Linux send SIGTERM, on which a run saves and leaves, when the pool is gone. Raises Interrupted where it is already.

    A pool that was killed by force tells no worker to stop: they would go on through the whole list, seen by nobody, beside those
    of the next command.
    """
    pool = os.environ.get(POOL)
    if pool is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(pool):
        raise Interrupted(f"the process {pool} that started this worker has ended; {AGAIN}")
