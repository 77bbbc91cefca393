"""What goes wrong on real machines, done to real processes: nothing is lost, nothing half-written is taken for whole."""

import contextlib
import os
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from faults import (
    bit_flipped,
    checksum_gone,
    checksum_truncated,
    die_before_the_checksum,
    die_in_metrics,
    die_in_torch_save,
    hang_after,
    hang_until,
    limit_the_size_of_files,
    not_a_checkpoint,
    result,
    slow_preparation,
    slow_steps,
    steps_done,
    truncated,
    turn_back_and_hang,
    turn_the_clock_back,
)
from processes import Process

from functional_sam.config import compose, to_yaml
from functional_sam.errors import RESUMABLE, UserError
from functional_sam.files import sha256, write_text
from functional_sam.records import Run
from functional_sam.training import checkpoint

SMALL = [
    "model.width=16",
    "model.depth=1",
    "training.batch=2",
    "training.eval_rows=8",
    "training.eval_batch=8",
    "measure.points=0",
    "measure.doses=3",
    "data.images=mnist-5k",
    "runtime.threads=1",
    "runtime.log_every=1",
    "optimizer.warmup_steps=2",
    "training.eval_every=7",
]


@pytest.fixture
def make(cache, tmp_path):
    """A run that has not begun: its directory with config.yaml, as the pool leaves it for a worker."""

    def make(name, steps=24, every=4):
        more = [f"training.steps={steps}", f"runtime.checkpoint_every={every}"]
        more += [f"runtime.cache={cache}", f"runtime.runs={tmp_path / name}"]
        run = Run(compose("vision", "sam", "quick", overrides=[*SMALL, *more]))
        write_text(run.directory / "config.yaml", to_yaml(run.config))
        return run

    return make


@pytest.fixture
def start(server, tmp_path):
    processes = []

    def start(*arguments, before=None):
        processes.append(Process(tmp_path / f"log-{len(processes)}.txt", *arguments, before=before))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


WHOLE = {}  # results of runs done in one go, by the hash of their config


@pytest.fixture
def finish_and_compare(start, make):
    """The same command finishes the run, says `words`, and the result is that of the run done in one go; no litter is left."""

    def finish_and_compare(run, *words):
        last = start("train", run.directory)
        assert last.wait() == 0, last.said
        assert all(word in last.said for word in words), last.said
        assert "Traceback" not in last.said
        if run.config.hash not in WHOLE:
            whole = make("whole", run.config.training.steps, every=1000)
            process = start("train", whole.directory)
            assert process.wait() == 0, process.said
            WHOLE[whole.config.hash] = result(whole)
        assert result(run) == WHOLE[run.config.hash]
        assert not list(run.directory.rglob(".*.tmp"))

    return finish_and_compare


# ---------------------------------------------------------------------- killed


@pytest.mark.slow
def test_twenty_kills_at_random_moments(make, start, finish_and_compare):
    """kill -9 twenty times during one run: before its first step, between steps, in evaluations and in checkpoints as it comes."""
    run, chance = make("parts", steps=400, every=5), random.Random(5)
    at = []
    for _ in range(20):
        process = start("train", run.directory)
        target = steps_done(run) + chance.randint(-3, 24)
        process.wait_until(lambda target=target: steps_done(run) >= target)
        time.sleep(chance.random() * 0.03)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.said
        assert run.state == "partial" if at and at[-1] else run.state in ("partial", "missing")
        at.append(steps_done(run))
    assert not run.done
    assert len(set(at)) > 5, at  # it got on between the kills
    finish_and_compare(run)


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (die_in_torch_save, []),
        (die_before_the_checksum, ["step-00000008.pt is damaged", "using the checkpoint before it"]),
        (die_in_metrics, []),
    ],
)
def test_killed_while_writing(make, start, before, words, finish_and_compare):
    run = make("parts")
    process = start("train", run.directory, before=before)
    assert process.wait() == -signal.SIGKILL, process.said
    assert run.state == "partial"
    if before is die_in_torch_save:
        assert [path.name for path in (run.directory / "checkpoint").glob("step-*.pt")] == ["step-00000004.pt"]
        assert list((run.directory / "checkpoint").glob(".step-00000008.pt.*.tmp"))  # half of it, under no name that counts
    finish_and_compare(run, *words)


@pytest.mark.parametrize("damage", [truncated, bit_flipped, checksum_gone, checksum_truncated, not_a_checkpoint])
def test_damaged_checkpoint(make, start, damage, finish_and_compare):
    """The one before is used, and that is said."""
    run = make("parts")
    stop_at(start, run, 10)
    kept = sorted((run.directory / "checkpoint").glob("step-*.pt"))
    assert len(kept) == 2
    damage(kept[-1])
    finish_and_compare(run, f"{kept[-1].name} is damaged", "using the checkpoint before it")


def test_both_checkpoints_damaged(make, start, finish_and_compare):
    """Nothing whole is left: from the start again, and that is said."""
    run = make("parts")
    stop_at(start, run, 10)
    for path in (run.directory / "checkpoint").glob("step-*.pt"):
        bit_flipped(path)
    finish_and_compare(run, "the run starts again from step 0")


def test_a_checkpoint_runs_no_code(tmp_path):
    """A pickle that would call something is refused, though its checksum is right."""
    import torch

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    checkpoint.save(tmp_path, 4, {"step": 4})
    path = tmp_path / "step-00000008.pt"
    torch.save({"step": 8, "trap": Trap()}, path)
    path.with_suffix(".sha256").write_text(sha256(path))
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.load_newest(tmp_path) == {"step": 4}
    assert not (tmp_path / "sprung").exists()


def stop_at(start, run, step):
    """A process that trains up to a step and is killed."""
    process = start("train", run.directory, before=partial(hang_after, step))
    process.wait_until(lambda: steps_done(run) >= step)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


# ---------------------------------------------------------------------- stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_finishes_the_step_and_saves(make, start, number, finish_and_compare):
    run = make("parts", steps=150, every=1000)
    process = start("train", run.directory, before=slow_steps)
    process.wait_until(lambda: steps_done(run) >= 2)
    process.send(number)
    assert process.wait() == RESUMABLE == 75, process.said
    step = steps_done(run)
    words = f"stopped by {number.name} after step {step} of 150, checkpoint saved; go on with: functional-sam train {run.directory}"
    assert process.said.splitlines() == [f"functional-sam: {words}"]
    assert [path.name for path in (run.directory / "checkpoint").glob("*.pt")] == [f"step-{step:08d}.pt"]
    assert run.state == "partial"
    finish_and_compare(run)


def test_a_second_ctrl_c_ends_at_once(make, start, finish_and_compare):
    run = make("parts")
    process = start("train", run.directory, before=partial(hang_after, 6))
    process.wait_until(lambda: steps_done(run) == 6)
    process.send(signal.SIGINT)
    time.sleep(0.2)
    assert process.code is None  # the first one waits for the step
    while process.code is None:
        process.send(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait() == -signal.SIGINT
    finish_and_compare(run)


def test_a_signal_before_the_first_step(make, start, finish_and_compare):
    """While data is being prepared there is nothing to save, and the same code says that the command can be repeated."""
    run = make("parts")
    process = start("train", run.directory, before=slow_preparation)
    process.wait_until(lambda: "preparing" in process.said)
    process.send(signal.SIGTERM)
    assert process.wait() == RESUMABLE, process.said
    assert "stopped by SIGTERM: no step was under way; the same command goes on" in process.said
    finish_and_compare(run)


# ---------------------------------------------------------------------- two at once, clocks, disks


def test_two_processes_on_one_run(make, start, tmp_path, finish_and_compare):
    """The second is refused, says who is at work, and leaves the first alone."""
    run = make("parts")
    go = tmp_path / "go"
    first = start("train", run.directory, before=partial(hang_until, go))
    first.wait_until(lambda: steps_done(run) >= 1)
    assert run.state == "running"
    second = start("train", run.directory)
    assert second.wait() == 2
    assert f"is being written by another process ({first.pid} on " in second.said
    assert second.said.count("\n") == 1
    go.touch()
    assert first.wait() == 0, first.said
    assert run.state == "done"
    finish_and_compare(run)


def test_asking_for_the_state_never_makes_a_process_give_up(make, start):
    """A reader tests the lock thousands of times while a run takes and gives it."""
    run = make("parts", steps=6)
    process = start("train", run.directory)
    states = set()
    while process.code is None:
        states.add(run.state)
    assert process.wait() == 0, process.said
    assert states <= {"missing", "running", "partial", "done"}
    assert run.state == "done"


def test_the_clock_goes_backwards(make, start, finish_and_compare):
    """Neither the order of checkpoints nor a duration hangs on the wall clock or on the times of files."""
    run = make("parts")
    process = start("train", run.directory, before=turn_back_and_hang)
    process.wait_until(lambda: steps_done(run) == 10)
    process.send(signal.SIGKILL)
    process.wait()
    newest = max((run.directory / "checkpoint").glob("*.pt"))
    os.utime(newest, (0, 0))
    resumed = start("train", run.directory, before=turn_the_clock_back)
    assert resumed.wait() == 0, resumed.said
    seconds = [line["seconds"] for line in run.metrics("train")]
    assert seconds == sorted(seconds)
    assert all(second >= 0 for second in seconds)
    finish_and_compare(run)


def test_a_limit_on_the_size_of_files(make, start, finish_and_compare):
    """The checkpoint does not fit the limit of the process: said, and the run goes on without it once the limit is gone."""
    run = make("parts")
    process = start("train", run.directory, before=limit_the_size_of_files)
    assert process.wait() == 2, process.said
    assert "step-00000004.pt would exceed this process's limit (ulimit -f)" in process.said
    assert process.said.count("\n") == 1
    assert run.state == "partial"
    assert not list((run.directory / "checkpoint").iterdir())
    finish_and_compare(run)


def mounted(path, *options):
    """Mount something on `path`; whether that is allowed here."""
    return subprocess.run(["mount", *options, str(path)], capture_output=True).returncode == 0


@pytest.fixture
def unmount():
    paths = []
    yield paths.append
    for path in reversed(paths):
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("kilobytes", [8, 60, 200])
def test_a_full_disk(make, start, tmp_path, unmount, kilobytes, finish_and_compare):
    """Full at the first small files, in the first checkpoint, or in a later one; then there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"):
        pytest.skip("mounting a small tmpfs needs root; the limit on the size of files is tested without")
    unmount(disk)
    run = make("disk")
    process = start("train", run.directory)
    assert process.wait() == 2, process.said
    assert f"disk full while writing {disk}" in process.said
    assert process.said.count("\n") == 1
    assert not run.done
    assert subprocess.run(["mount", "-o", "remount,size=50m", str(disk)]).returncode == 0
    finish_and_compare(run)


def read_only(path, unmount):
    """Make a directory refuse writes, also to root: by a read-only mount, else by its mode."""
    if mounted(path, "--bind", str(path)):
        unmount(path)
        assert mounted(path, "-o", "remount,ro,bind")
    else:
        path.chmod(0o555)
    with pytest.raises(OSError, match=r"Read-only|denied"):
        (path / "probe").touch()


def test_read_only_runs(make, start, tmp_path, unmount):
    """A run that is there, and one that is not: one line each, and not a byte changed."""
    run = make("runs")
    stop_at(start, run, 5)
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    read_only(tmp_path / "runs", unmount)
    for arguments in (["train", run.directory], ["train", "--task", "vision", *SMALL, f"runtime.runs={tmp_path}/runs"]):
        process = start(*arguments)
        assert process.wait() == 2, process.said
        assert "choose another with runtime.runs=DIRECTORY" in process.said
        assert process.said.count("\n") == 1
    asked = start("status", tmp_path / "runs")
    assert asked.wait() == 0, asked.said
    assert "partial" in asked.said
    assert {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()} == before


def test_read_only_results(tmp_path, unmount):
    """Where figures, tables and released results go."""
    results = tmp_path / "results"
    results.mkdir()
    write_text(results / "table.csv", "old")
    read_only(results, unmount)
    with pytest.raises(UserError, match=r"cannot write .*table.csv .*make its directory writable or choose another"):
        write_text(results / "table.csv", "new")
    with contextlib.suppress(UserError):
        write_text(results / "table.csv", "new")
    assert [path.name for path in results.iterdir()] == ["table.csv"]
    assert (results / "table.csv").read_text() == "old"
