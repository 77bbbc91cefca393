"""A real SLURM: jobs/local-slurm starts one, everything is submitted at once, and each test looks at what became of its part.

Root is needed, and munge and SLURM installed (make slurm). Runs that something happens to are slowed down, by a pause in each step,
until it has happened.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from functional_sam.cli import main
from functional_sam.config import load
from functional_sam.errors import UserError
from functional_sam.exhibits import needed
from functional_sam.jobs.launch import submit
from functional_sam.jobs.queue import log_of, states
from functional_sam.jobs.submission import Submission
from functional_sam.records import Run
from functional_sam.records.released import save_pack
from functional_sam.training.loop import TIMES, train

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1000)]

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "jobs" / "local-slurm" / "local-slurm"
PATIENCE = 700  # seconds for everything
SMALL = ["training.batch=4", "training.eval_rows=8", "model.width=16", "model.depth=1", "measure.points=2", "measure.rows=4"]
SMALL += [
    "measure.micro_batch=4",
    "measure.targets=[8]",
    "measure.more_targets=[16]",
    "measure.doses=2",
    "data.images=mnist-5k",
    "runtime.log_every=1",
]
SMALL += ["runtime.checkpoint_every=1000"]
TEXT = [one for one in SMALL if not one.startswith("data.images")]
LONG = [*SMALL, "training.steps=150", "training.precision=float64"]
ONE_RUN = """
title: one run
time: seconds
claim: none
published: none
tasks: [vision]
methods: [adamw]
scales: {quick: {seeds: [0]}}
"""
FIGURE = ONE_RUN.replace("[vision]", "[language, vision]")
# One size, nothing to choose between: a run for the learning rate, one for the radius, two reported. training.steps on the command
# line is the length of both regimes, so that the second has the runs of the first.
STUDY = """
tuning_seeds: [1000]
entries: {adamw: {}, sam: {}}
scales:
  quick:
    cells:
      fixed: &cell {part: fixed, task: language-0.006M, entries: [adamw, sam], steps: 6, lr: [0.01], rho: [0.01], seeds: [0]}
      chinchilla: {<<: *cell, part: chinchilla}
"""
# Imported by Python as it starts, where the profile puts it on PYTHONPATH: the loop looks at the clock once a step.
SLOW = """
import os, sys, time
real = time.perf_counter
def slow():
    if sys._getframe(1).f_globals.get("__name__") == "functional_sam.training.loop":
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(float(os.environ.get("TEST_PAUSE", "0")))
        if "TEST_BREAK" in os.environ:
            raise OSError("broken for the test")
    return real()
time.perf_counter = slow
"""


def local(verb, environment):
    return subprocess.run([str(LOCAL), verb], capture_output=True, text=True, env=environment)


def free_ports(count=4):
    """The first of `count` ports in a row that nobody listens on."""
    for first in range(21000, 31000, 10):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """SLURM_CONF of a SLURM of our own is in the environment."""
    if os.getuid() != 0:
        pytest.skip("SLURM's daemons start jobs under their owner's name: not root, no SLURM")
    if any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in ("slurmctld", "munged", "slurmdbd")):
        pytest.skip("SLURM is not installed: make slurm")
    directory = Path(f"/tmp/functional-sam-slurm-{os.getpid()}")  # Unix sockets want a short path
    settings = {"LOCAL_SLURM_DIR": str(directory), "LOCAL_SLURM_PORT": str(free_ports()), "LOCAL_SLURM_CPUS": "8"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | settings
    started = local("start", environment)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{directory}/slurm.conf")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield environment
    stopped = local("stop", environment)
    assert stopped.returncode == 0, stopped.stderr
    assert local("status", environment).returncode == 3
    shutil.rmtree(directory)


def checkout(directory, cache, configs):
    """A copy of the project that can be drawn into and broken; configs: YAML of those that are smaller there, by their path."""
    directory.mkdir()
    for name in ("src", "configs", "analysis", "paper", "results", "jobs"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy2(ROOT / "pyproject.toml", directory)
    cache.mkdir(exist_ok=True)
    (directory / ".cache").symlink_to(cache)
    for name, text in configs.items():
        (directory / "configs" / f"{name}.yaml").write_text(text)
    return directory


@dataclass
class Case:
    """One run submitted under one profile."""

    runs: Path
    text: str
    job: str = ""
    following: str = ""
    shown: str = ""  # SLURM's last words on the job: it forgets after minutes
    done: set[str] = field(default_factory=set)  # what was done to it already

    @property
    def run(self):
        return Run(load(next(self.runs.glob("*/config.yaml"))), self.runs)

    @property
    def steps(self):
        lines = self.run.metrics("train")
        return lines[-1]["step"] if lines else 0

    @property
    def log(self):
        path = log_of(self.run.config.name, self.runs)
        return path.read_text() if path else ""

    def scontrol(self, key):
        """A field of SLURM's own description of the job."""
        shown = self.shown or ask("scontrol", "show", "job", "--oneliner", self.job)
        return next((word.split("=", 1)[1] for word in shown.split() if word.startswith(f"{key}=")), "")

    def process(self, rank):
        """The number of the process that trains as this rank."""
        asked = {f"SLURM_JOB_ID={self.job}", f"SLURM_PROCID={rank}"}
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found = set(environment.read_text(errors="replace").split("\0"))
                if asked <= found and (environment.parent / "cmdline").read_text().startswith(sys.executable):  # not srun
                    return int(environment.parent.name)
        raise AssertionError(f"no process of {self.job} is rank {rank}")

    def ended(self):
        if not self.shown and self.scontrol("JobState") in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL"):
            self.shown = ask("scontrol", "show", "job", "--oneliner", self.job)
        return bool(self.shown)


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def jobs():
    """The numbers of all that is queued or runs."""
    return set(ask("squeue", "--noheader", "--format=%i").split())


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(slurm, cache, tmp_path_factory):
    """Everything submitted, everything done to it, everything ended."""
    base = tmp_path_factory.mktemp("slurm")
    figure = checkout(base / "figure", cache, {"exhibits/figure-1": FIGURE})
    one = checkout(base / "one", cache, {"exhibits/figure-1": ONE_RUN, "studies/language": STUDY})
    (base / "slow").mkdir()
    (base / "slow" / "sitecustomize.py").write_text(SLOW)
    slow, slower = (f"environment: {{TEST_PAUSE: '{pause}', PYTHONPATH: {base / 'slow'}}}\n" for pause in (0.4, 1.2))
    broken = f"environment: {{TEST_BREAK: '1', PYTHONPATH: {base / 'slow'}}}\n"
    first, last = "sbatch: {nodelist: node1}\n", "sbatch: {nodelist: node2}\n"
    # SLURM looks at its limits every 30 seconds and signals so much earlier: after 130 to 160 of 180 seconds. By then Python has
    # started, even where all of these start at once, and 150 steps of 1.2 seconds have not ended.
    limit = "time: 3\nsignal_delay: 20\n"
    long = "time: 10\n"
    texts = {
        "two-nodes": long + "nodes: 2\n",
        "limit": limit + first + slower,
        "requeued": long + first + slow,
        "cancelled": long + first + slow,
        "node-down": long + last + slow,
        "broken": long + first + broken,
        "one-dies": long + first + "tasks_per_node: 2\n" + slow,
    }
    cases = {name: Case(base / f"runs-{name}", text) for name, text in texts.items()}
    quiet = Console(quiet=True)

    rest = checkout(base / "rest", cache, {"exhibits/figure-1": FIGURE})

    records = [project / "paper" / "overridden" / "figures" / "figure-1.json" for project in (figure, rest)]
    records.append(one / "paper" / "overridden" / "tables" / "table-1.json")
    # The figure by the command itself, as a user would; then the code is broken: what is queued must not notice.
    (figure / "jobs" / "clusters" / "mine.yaml").write_text(long + first + "array_parallelism: 2\n")
    command = [sys.executable, "-m", "functional_sam", "submit", "figure-1", "--cluster", "mine", "training.steps=6", *SMALL]
    environment = os.environ | {"PYTHONPATH": str(figure / "src")}
    submitted = subprocess.run(command, cwd=figure, env=environment, capture_output=True, text=True)
    (figure / "src" / "functional_sam" / "training" / "loop.py").write_text("raise SystemExit('not the code that was submitted')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(one)
        for name, case in cases.items():
            (base / f"{name}.yaml").write_text(case.text)
            submit("figure-1", "quick", str(base / f"{name}.yaml"), [*LONG, f"runtime.runs={case.runs}"], False, quiet)
            stage = next(case.runs.glob(".jobs/*/stage-1"))
            content = json.loads((stage / "jobs.json").read_text())
            (case.job,), case.following = content["runs"], content["next"]
            if name not in ("cancelled", "broken", "one-dies"):  # one run draws no figure
                subprocess.run(["scancel", case.following], check=True)

        (base / "chain.yaml").write_text(long + first)
        submit("table-1", "quick", str(base / "chain.yaml"), ["training.steps=6", *TEXT], False, quiet)

        # One of two runs is released: the cluster does the other.
        patch.chdir(rest)
        kept = needed("figure-1", "quick", ("training.steps=6", *SMALL))[0]
        train(kept)
        save_pack("figure-1", "quick", [Run(kept)])
        shutil.rmtree(rest / "runs")
        submit("figure-1", "quick", str(base / "chain.yaml"), ["training.steps=6", *SMALL], False, quiet, released=True)

    down = []  # when

    def act():
        """What happens to the runs, once they train."""
        for name, command in (("requeued", ("scontrol", "requeue")), ("cancelled", ("scancel",))):
            case = cases[name]
            if not case.done and case.steps >= 5:
                subprocess.run([*command, case.job], check=True)
                case.done.add("done")
        case = cases["one-dies"]
        if not case.done and case.steps >= 5:
            os.kill(case.process(0), signal.SIGSTOP)  # waits for the other and hears nothing more, as NCCL does
            os.kill(case.process(1), signal.SIGKILL)
            case.done.add("killed")
        case = cases["limit"]
        if not case.done and case.steps >= 1:
            case.done.add("trained" if case.scontrol("Restarts") == "0" else "requeued before it trained")
        case = cases["node-down"]
        if not case.done and case.steps >= 5 and cases["two-nodes"].ended():
            subprocess.run(["scontrol", "update", "nodename=node2", "state=down", "reason=test"], check=True)
            case.done.add("down")
            down.append(time.monotonic())
        # Down is what SLURM believes; the supervisor of the job is alive, and tells it for some seconds that the job ended.
        elif case.done == {"down"} and case.scontrol("JobState") == "PENDING" and time.monotonic() > down[0] + 12:
            subprocess.run(["scontrol", "update", "nodename=node2", "state=resume"], check=True)
            case.done.add("up")

    def over():
        act()
        ended = [case.ended() for case in cases.values()]  # asked every time: SLURM forgets a job some minutes after its end
        drawn = all(record.exists() for record in records)
        return (drawn or submitted.returncode) and all(ended)

    # What they should come to: the same run in this process, while theirs are at work.
    whole = Case(base / "runs-whole", "")
    config = load(next(cases["requeued"].runs.glob("*/config.yaml")))
    config.runtime.threads, config.runtime.cache = 1, str(cache)
    train(config, whole.runs)
    wait(over, PATIENCE)
    return {"base": base, "one": one, "figure": figure, "rest": rest, "kept": kept, "submitted": submitted, "whole": whole, **cases}


def metrics(case):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in case.run.metrics()]


def test_figure_1_from_submission_to_the_drawn_figure(cluster):
    """An array of two and the job after it, from a snapshot, drawn into the project."""
    figure, submitted = cluster["figure"], cluster["submitted"]
    assert submitted.returncode == 0, submitted.stderr
    assert "submitted 2 runs as job" in submitted.stdout
    assert len(list((figure / "runs").glob("*/done.json"))) == 2
    logs = "\n".join(path.read_text() for path in figure.glob("runs/.jobs/*/stage-1/*_log.out"))
    record = json.loads((figure / "paper" / "overridden" / "figures" / "figure-1.json").read_text())
    assert "wrote paper/overridden/figures/figure-1.pdf" in logs, logs
    assert {entry["run"] for entry in record["runs"]} == {path.parent.name for path in (figure / "runs").glob("*/done.json")}
    assert "6 steps" in record["caption"] or record["verdict"] in logs


def test_runs_that_are_known_only_later_are_submitted_by_the_cluster(cluster):
    """table-1: the trials; from a job after them the reported runs, of the trial that was chosen; the table."""
    (directory,) = cluster["one"].glob("runs/.jobs/*-table-1")
    stages = [json.loads((directory / f"stage-{number}" / "jobs.json").read_text()) for number in (1, 2)]
    assert [len(stage["runs"]) for stage in stages] == [2, 2]
    (log,) = directory.glob(f"stage-2/{stages[1]['next']}_0_log.out")
    assert "wrote paper/overridden/tables/table-1.md" in log.read_text()
    record = json.loads((cluster["one"] / "paper" / "overridden" / "tables" / "table-1.json").read_text())
    assert {entry["run"] for entry in record["runs"]} == {name for stage in stages for name in stage["runs"].values()}


def test_the_cluster_does_the_rest_of_what_is_released(cluster):
    """One run of two is taken from the pack where submit is called, the other is queued; the figure holds both."""
    rest, kept = cluster["rest"], cluster["kept"].name
    (directory,) = rest.glob("runs/.jobs/*")
    stage = json.loads((directory / "stage-1" / "jobs.json").read_text())
    assert len(stage["runs"]) == 1
    assert kept not in stage["runs"].values()
    record = json.loads((rest / "paper" / "overridden" / "figures" / "figure-1.json").read_text())
    assert {entry["run"] for entry in record["runs"]} == {kept, *stage["runs"].values()}
    assert not (directory / "stage-2").exists()


def test_the_script_is_the_one_of_the_dry_run(cluster):
    directory = next(cluster["figure"].glob("runs/.jobs/*"))
    (script,) = (path for path in directory.glob("stage-1/*_submission.sh") if "--array" in path.read_text())
    assert script.read_text().strip() == Submission.load(directory).scripts(2)[0].strip()


def test_a_run_that_meets_its_time_limit_is_requeued_and_ends_as_if_it_had_not(cluster):
    """By the run itself, once it has saved; where Python starts so slowly that the signal comes before the run, by submitit."""
    case = cluster["limit"]
    assert case.run.done, case.log
    assert int(case.scontrol("Restarts")) >= 1
    assert "trained" not in case.done or "stopped by SIGUSR2" in case.log
    assert metrics(case) == metrics(cluster["whole"])
    assert case.run.summary()["loss"] == cluster["whole"].run.summary()["loss"]


def test_a_requeued_run_goes_on_from_where_it_was(cluster):
    case = cluster["requeued"]
    assert case.run.done, case.log
    assert case.scontrol("Restarts") == "1"
    assert "stopped by SIGTERM" in case.log
    assert metrics(case) == metrics(cluster["whole"])


def test_a_run_whose_node_goes_down_is_requeued_and_resumed(cluster):
    case = cluster["node-down"]
    assert case.done == {"down", "up"}
    assert case.run.done, case.log
    assert case.scontrol("Restarts") == "1"
    assert metrics(case) == metrics(cluster["whole"])


def test_two_nodes_train_one_run(cluster):
    """gloo over TorchDistributedEnvironment: the loss curve of one process, to rounding in float64."""
    case = cluster["two-nodes"]
    assert case.run.done, case.log
    record = case.run.read("provenance.json")
    assert (record["processes"], record["parallel"]) == (2, "ddp")
    assert case.scontrol("NodeList") == "node[1-2]"
    ours, alone = ([line["loss"] for line in one.run.metrics("train")] for one in (case, cluster["whole"]))
    assert ours == pytest.approx(alone, rel=1e-10)


def test_a_cancelled_run_stays_cancelled_and_nothing_is_drawn(cluster):
    case = cluster["cancelled"]
    assert case.run.state == "partial"
    assert case.scontrol("JobState") == "CANCELLED"
    wait(lambda: states(case.runs).get(case.run.config.name) == "CANCELLED", 20)  # accounting lags
    assert states(case.runs) == {case.run.config.name: "CANCELLED"}
    assert case.following not in jobs()


def test_a_failed_run_is_in_the_status_with_its_log(cluster, capsys):
    case = cluster["broken"]
    wait(lambda: states(case.runs).get(case.run.config.name) == "FAILED", 20)
    assert main(["status", str(case.runs)]) == 0
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    log = log_of(case.run.config.name, case.runs)
    assert f"failed: OSError: broken for the test; log: {log}" in shown
    assert "Traceback" in log.read_text()
    assert case.following not in jobs()


def test_when_one_process_dies_the_others_do_not_wait_for_ever(cluster):
    case = cluster["one-dies"]
    assert case.done
    assert case.run.state == "partial"
    assert case.scontrol("JobState") == "FAILED"
    assert case.scontrol("Restarts") == "0"
    assert case.following not in jobs()


def test_a_wrong_partition_is_named_before_anything_is_submitted(cluster, monkeypatch, capsys):
    base, before = cluster["base"], jobs()
    (base / "wrong.yaml").write_text("time: 60\npartition: debgu\n")
    monkeypatch.chdir(cluster["one"])
    arguments = ["submit", "figure-1", "--cluster", str(base / "wrong.yaml"), *SMALL, f"runtime.runs={base}/wrong"]
    assert main(arguments) == 2
    assert "'debgu'; did you mean 'debug'" in capsys.readouterr().err
    assert not (base / "wrong").exists()
    assert jobs() <= before


def test_what_sbatch_refuses_is_shown_in_its_words(cluster, monkeypatch):
    base = cluster["base"]
    (base / "feature.yaml").write_text("time: 60\nconstraint: a100\n")
    monkeypatch.chdir(cluster["one"])
    with pytest.raises(UserError, match=r"sbatch would refuse the job.*[Ff]eature"):
        submit("figure-1", "quick", str(base / "feature.yaml"), [*SMALL, f"runtime.runs={base}/x"], False, Console(quiet=True))
    assert not (base / "x").exists()
