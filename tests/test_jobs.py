"""Submission without a SLURM: profiles, the scripts of a dry run, the snapshot of the code, the states of the queue."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from functional_sam.errors import UserError
from functional_sam.jobs.launch import submit
from functional_sam.jobs.profile import Profile, check_site, load_profile
from functional_sam.jobs.queue import log_of, states
from functional_sam.jobs.snapshot import snapshot
from functional_sam.jobs.work import meeting_port

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "jobs" / "clusters"


def profile_file(directory, text):
    path = directory / "mine.yaml"
    path.write_text(text)
    return str(path)


def commands(directory, monkeypatch, **scripts):
    """A PATH on which only these commands are, each a line of shell."""
    directory.mkdir()
    for name, body in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


# ---------------------------------------------------------------------- profiles


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_profiles_of_the_repository_load(path):
    assert load_profile(path.stem) == load_profile(str(path))


def test_the_example_explains_every_key():
    content = yaml.safe_load((CLUSTERS / "example.yaml").read_text())
    assert set(content) == {field.name for field in dataclasses.fields(Profile)}


@pytest.mark.parametrize(
    ("time", "minutes"), [("90", 90), ("4:00:00", 240), ("04:00:00", 240), ("1-12:00:00", 36 * 60), ("10:30", 11), ("10:00", 10)]
)
def test_times_as_sbatch_reads_them(tmp_path, time, minutes):
    """4:00:00 without quotes is 14400 to a YAML parser."""
    assert load_profile(profile_file(tmp_path, f"time: {time}")).minutes == minutes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partition: gpu", "time is required"),
        ("time: soon", "time='soon'"),
        ("time: 1-12:00", "time='1-12:00'"),
        ("time: 60\npartitoin: gpu", "did you mean 'partition'"),
        ("time: 60\nnodes: two", "nodes"),
        ("time: 60\nnodes: 0", "nodes=0: at least 1"),
        ("time: 60\nmemory: much", "memory='much'"),
        ("time: 60\ngpus_per_node: 2\ntasks_per_node: 4", "tasks_per_node=4: at most one process for each of the 2 GPUs"),
        ("time: 1\nsignal_delay: 90", "signal_delay=90"),
        ("time: 60\nenvironment: {A-B: c}", "'A-B' is not the name of a variable"),
        ("time: 60\ndraw: {partitions: cpu}", "did you mean 'partition'"),
        ("time: 60\ndraw: {nodes: 0}", "draw: nodes=0"),
        ("- time", "found a list"),
        ("time: [", "cannot be read"),
    ],
)
def test_a_profile_that_cannot_be(tmp_path, text, words):
    path = profile_file(tmp_path, text)
    with pytest.raises(UserError, match=r"mine\.yaml") as error:
        load_profile(path)
    assert words in str(error.value)


def test_an_unknown_cluster_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'example'"):
        load_profile("exampel")


def test_a_task_per_gpu_and_a_drawing_job_without(tmp_path):
    profile = load_profile(profile_file(tmp_path, "time: 600\ngpus_per_node: 4\nconstraint: a100\ndraw: {memory: 8G}"))
    assert profile.tasks == 4
    drawing = profile.drawing
    assert (drawing.tasks, drawing.gpus_per_node, drawing.constraint, drawing.memory, drawing.minutes) == (1, 0, "", "8G", 60)


# ---------------------------------------------------------------------- before anything is submitted


def test_without_slurm_the_way_out_is_named(tmp_path, monkeypatch):
    commands(tmp_path / "bin", monkeypatch)
    with pytest.raises(UserError, match="sbatch not found"):
        check_site(Profile(time="60"), "here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time: 60\npartition: gpus", "unknown partition in here: 'gpus'; did you mean 'gpu'"),
        ("time: 25:00:00\npartition: gpu", "more than the 1-00:00:00 that partition gpu allows"),
        ("time: 60\npartition: gpu\ndraw: {partition: gqu}", "unknown partition in here, draw: 'gqu'"),
    ],
)
def test_partitions_are_asked_for(tmp_path, monkeypatch, text, words):
    profile = load_profile(profile_file(tmp_path, text))
    commands(tmp_path / "bin", monkeypatch, sbatch="exit 1", sinfo="echo 'gpu|1-00:00:00'; echo 'cpu|infinite'")
    with pytest.raises(UserError) as error:
        check_site(profile, "here")
    assert words in str(error.value)


def test_what_sbatch_would_refuse_is_shown_and_nothing_is_submitted(tmp_path, monkeypatch):
    refusal = "echo 'sbatch: error: Invalid account or account/partition combination specified' >&2; exit 1"
    path = profile_file(tmp_path, "time: 60\naccount: nobody")
    commands(tmp_path / "bin", monkeypatch, sbatch=refusal, sinfo="exit 1", squeue="exit 1")
    with pytest.raises(UserError, match="Invalid account or account/partition"):
        submit("figure-1", "quick", path, [f"runtime.runs={tmp_path}/runs"], False, Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_scripts_and_writes_nothing(tmp_path, monkeypatch, capsys):
    text = "time: 2:00:00\npartition: gpu\naccount: me\nnodes: 2\ngpus_per_node: 4\nmemory: 64GB\narray_parallelism: 3\n"
    text += "signal_delay: 240\nsetup: [module load x]\nenvironment: {A: b c}\nsbatch: {mail-type: FAIL}\n"
    path = profile_file(tmp_path, text)
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM here
    submit("figure-1", "quick", path, [f"runtime.runs={tmp_path}/runs"], True, Console(width=80))
    first, second = capsys.readouterr().out.split("# ---- after them")
    for line in (
        "#SBATCH --account=me",
        "#SBATCH --array=0-5%3",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --mail-type=FAIL",
        "#SBATCH --mem=64G",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@240",
        "#SBATCH --time=120",
        "module load x",
        "export A='b c'",
    ):
        assert line in first.splitlines()
    assert first.index("module load x") < first.index("export PYTHONPATH=") < first.index("submitit.core._submit")
    assert "#SBATCH --dependency=afterok:ARRAY" in second.splitlines()
    assert "--gpus-per-node" not in second
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("profile", "override", "words"),
    [
        ("nodes: 3", "training.batch=16", r"^training.batch=16 is not divisible by 3 processes"),
        ("gpus_per_node: 4", "training.batch=6", r"^training.batch=6 is not divisible by 4 processes"),
        ("nodes: 2", "runtime.parallel=none", r"^runtime.parallel=none: cluster .* gives a run 2 processes"),
    ],
)
def test_processes_that_cannot_train_a_run_are_said_before_the_job_waits(tmp_path, profile, override, words):
    path = profile_file(tmp_path, f"time: 60\n{profile}")
    with pytest.raises(UserError, match=words):
        submit("figure-3", "quick", path, [f"runtime.runs={tmp_path}/runs", override], True, Console(quiet=True))
    submit("figure-3", "quick", profile_file(tmp_path, "time: 60"), [f"runtime.runs={tmp_path}/runs"], True, Console(quiet=True))


def test_what_does_not_fit_is_said_before_the_job_waits(tmp_path):
    """By whoever submits, who is asked about the missing runs; a dry run says it too."""
    asked = []
    path = profile_file(tmp_path, "time: 60\ngpus_per_node: 1")
    given = ("figure-3", "quick", path, [f"runtime.runs={tmp_path}/runs"], True, Console(quiet=True))
    submit(*given, warn=lambda configs, profile, name: asked.append((len(configs), profile.gpus_per_node, name)))
    ((count, gpus, name),) = asked
    assert count > 0
    assert (gpus, name) == (1, path)


def test_an_option_of_sbatch_may_have_no_value(tmp_path, capsys):
    path = profile_file(tmp_path, "time: 60\nsbatch: {exclusive: true, overcommit: , mail-type: FAIL}")
    submit("figure-3", "quick", path, [f"runtime.runs={tmp_path}/runs"], True, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("#SBATCH --exclusive") == lines.count("#SBATCH --overcommit") == lines.count("#SBATCH --mail-type=FAIL") == 2


# ---------------------------------------------------------------------- the snapshot


def project(directory, git):
    (directory / "src").mkdir(parents=True)
    (directory / "src" / "code.py").write_text("committed\n")
    (directory / "configs" / "tasks").mkdir(parents=True)
    (directory / "pyproject.toml").write_text("")
    (directory / "paper").mkdir()
    if git:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "one"]):
            subprocess.run(["git", "-C", str(directory), *arguments], check=True)
    (directory / "src" / "code.py").write_text("uncommitted\n")
    return directory


@pytest.mark.parametrize("git", [True, False])
def test_the_snapshot_stays_as_the_code_was(tmp_path, monkeypatch, git):
    root = project(tmp_path / "project", git)
    monkeypatch.chdir(root)
    code = root / "runs" / ".jobs" / "now" / "code"
    snapshot(code)
    (root / "src" / "code.py").write_text("later\n")
    assert (code / "src" / "code.py").read_text() == "uncommitted\n"
    (code / "paper" / "figure.csv").write_text("1\n")
    assert (root / "paper" / "figure.csv").is_file()
    assert (code / "runs").resolve() == root / "runs"
    assert (code / ".git").exists() == git
    if git:

        def ask(where, *arguments):
            return subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, check=True).stdout

        head = ask(root, "rev-parse", "HEAD")
        subprocess.run(
            ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "-a", "-m", "two"],
            check=True,
        )
        assert ask(root, "rev-parse", "HEAD") != head
        assert ask(code, "rev-parse", "HEAD") == head
        difference = ask(code, "diff", "HEAD", "--", "src", "configs", "pyproject.toml")
        assert "+uncommitted" in difference
        assert "later" not in difference


# ---------------------------------------------------------------------- the queue


def submitted(runs, time, **jobs):
    stage = runs / ".jobs" / time / "stage-1"
    stage.mkdir(parents=True)
    (stage / "jobs.json").write_text(json.dumps({"runs": jobs, "next": None}))
    return stage


def test_states_and_logs_are_those_of_the_newest_job(tmp_path, monkeypatch):
    submitted(tmp_path, "2026-01-01", **{"1_0": "a", "1_1": "b"})
    stage = submitted(tmp_path, "2026-01-02", **{"7_0": "a", "7_1": "c", "7_2": "d", "7_3": "e"})
    (stage / "7_0_0_log.out").write_text("")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "done.json").write_text("{}")
    squeue = "echo '7_0|RUNNING|None'; echo '7_1|PENDING|Priority'; echo '9|RUNNING|None'"
    sacct = "echo '7_2|CANCELLED by 0'; echo '7_0|PENDING'; echo '1_1|FAILED'; echo '7_3|COMPLETED'"
    commands(tmp_path / "bin", monkeypatch, squeue=squeue, sacct=sacct)
    assert states(tmp_path) == {"a": "RUNNING", "b": "FAILED", "c": "PENDING (Priority)", "d": "CANCELLED"}
    assert log_of("a", tmp_path) == stage / "7_0_0_log.out"
    assert log_of("c", tmp_path) is None
    assert log_of("unknown", tmp_path) is None


@pytest.mark.parametrize("scripts", [{}, {"squeue": "exit 1", "sacct": "exit 1"}])
def test_without_an_answer_there_are_no_states(tmp_path, monkeypatch, capfd, scripts):
    submitted(tmp_path, "2026-01-01", **{"1": "a"})
    commands(tmp_path / "bin", monkeypatch, **scripts)
    assert states(tmp_path) == {}
    assert capfd.readouterr() == ("", "")


def test_runs_that_are_queued_are_not_submitted_again(tmp_path, monkeypatch):
    from functional_sam.exhibits import needed

    name = needed("figure-1")[0].name
    submitted(tmp_path / "runs", "2026-01-01", **{"5_0": name})
    path = profile_file(tmp_path, "time: 60")
    commands(tmp_path / "bin", monkeypatch, sbatch="exit 1", sinfo="exit 1", squeue="echo '5_0|PENDING|Priority'")
    with pytest.raises(UserError, match=r"1 of the runs are in the queue already .*PENDING"):
        submit("figure-1", "quick", path, [f"runtime.runs={tmp_path}/runs"], False, Console(quiet=True))


def test_a_place_that_a_job_would_seek_elsewhere_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"say it as runtime\.runs=DIRECTORY"):
        submit("figure-1", "quick", profile_file(tmp_path, "time: 60"), ["runtime={runs: here}"], True, Console(quiet=True))


@pytest.mark.parametrize(
    ("override", "key"),
    [("runtime.device=cpu", "gpus_per_node"), ("runtime.threads=3", "cpus_per_task"), ("runtime={threads: 3}", "cpus_per_task")],
)
def test_what_a_job_has_from_its_profile_is_refused_beside_it(tmp_path, override, key):
    with pytest.raises(UserError, match=rf"^override '{override}': a job has it from the cluster's profile: set {key} there"):
        submit("figure-1", "quick", profile_file(tmp_path, "time: 60"), [override], True, Console(quiet=True))


# ---------------------------------------------------------------------- in a job


def test_processes_of_a_job_meet_at_a_port_that_no_program_is_handed(monkeypatch):
    """The same for all, since each draws it alone; another one for another job, and after a requeue, in case it was taken."""
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    drawn = []
    for job in range(200):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        drawn.append(meeting_port())
        assert meeting_port() == drawn[-1]
    assert len(set(drawn)) > 180
    assert max(drawn) < 32768
    assert min(drawn) > 1023
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert meeting_port() != drawn[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("sbatch: {time: 60}", "sbatch: time is set by time"),
        ("sbatch: {ntasks_per_node: 2}", "sbatch: ntasks_per_node is set by tasks_per_node"),
        ("sbatch: {array: 0-5}", "sbatch: array is set by the submission itself"),
        ("time: 60", "time is there twice"),
        ("sbatch: {mem: 1, mem: 2}", "mem is there twice"),
        ("draw: []", None),
        ("draw: [x]", "draw: expected key: value lines, found a list"),
        ('partition: "a\\nb"', "partition: .* more than one line"),
        ('sbatch: {mail-user: "a\\nb"}', "sbatch: mail-user: .* more than one line"),
    ],
)
def test_a_profile_that_would_say_two_things(tmp_path, more, words):
    path = tmp_path / "site.yaml"
    path.write_text(f"time: 90\n{more}\n")
    if words is None:
        load_profile(str(path))
        return
    with pytest.raises(UserError, match=words):
        load_profile(str(path))
