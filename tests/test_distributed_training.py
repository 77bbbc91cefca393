"""Training on 2 and 4 gloo processes: the curve of one process, checkpoints for any number of them, clean ends.

All cases of two processes share one spawn, in float64. A case is a config, its directory, and where its processes die.
"""

import contextlib
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from processes import Process, gloo
from test_training import Killed, content, tiny

from functional_sam import commands
from functional_sam.config import Config, to_yaml
from functional_sam.errors import Interrupted, UserError
from functional_sam.files import write_text
from functional_sam.records import Run, RunLocked
from functional_sam.records.provenance import SAME, resumed
from functional_sam.training import checkpoint, distributed, loop

pytestmark = pytest.mark.slow
METHODS = {
    "adamw": {"optimizer.clip": 0.5},
    "functional-sam": {"model.checkpoint_blocks": True, "model.depth": 2, "training.micro_batch": 2},
    "precond-functional-sam": {"optimizer.clip": 0.5},
    "momentum-functional-sam": {},  # perturbs before any pass, so after evaluations too
    "looksam": {"method.options.every": 3},
    "wsam": {},
    "tram": {"method.options.divergence": "previous"},
}
RESUMED = ("functional-sam", "looksam")  # without and with state of its own
DRAWS = {"model.dropout": 0.1, "data.augment": "crop-flip", "data.images": "mnist-5k"}  # of a vision run
STEPS, DIES = 5, 3  # checkpoints are of steps 2, 4 and 5: one goes on between two of the ascents of looksam, of steps 1 and 4


LONG = {"training.steps": 40, "training.eval_every": "null", "runtime.checkpoint_every": 5}  # time to be killed in


@dataclass
class Job:
    """A run to do in all processes of a group; `dies`: after so many steps; `expect`: what it must raise."""

    config: Config
    dies: int | None = None
    signal_rank: int | None = None  # who gets SIGUSR2 in the step after `dies`
    expect: tuple[type[BaseException], str] | None = None
    full_disk: bool = False
    copy_to: Path | None = None  # where what it leaves is kept, before others go on with it


def perform(job, rank):
    backward, save = loop.SharpnessAware.backward, checkpoint.save

    def limited(self, batches, **options):
        if job.dies is not None and self.steps == job.dies:
            if job.signal_rank is None:
                raise Killed
            if rank == job.signal_rank:
                os.kill(os.getpid(), signal.SIGUSR2)
        return backward(self, batches, **options)

    def full(*_):
        raise UserError("disk full, for the test")

    loop.SharpnessAware.backward = limited
    if job.full_disk:
        checkpoint.save = full
    try:
        if job.expect is not None:
            with pytest.raises(job.expect[0], match=job.expect[1]):
                loop.train(job.config)
        else:
            with contextlib.suppress(Killed):
                loop.train(job.config)
    finally:
        loop.SharpnessAware.backward, checkpoint.save = backward, save


def process(rank, jobs):
    for job in jobs:
        try:
            perform(job, rank)
            if job.copy_to is not None and rank == 0:
                copied(Run(job.config), job.copy_to)
        except BaseException as error:
            error.add_note(f"{job.config.method.name} {job.config.runtime.parallel} {job.config.runtime.runs}")
            raise


def config(cache, runs, method, parallel="none", task="language", **overrides):
    size = {"training.steps": STEPS, "training.precision": "float64", "training.batch": 8, "training.eval_batch": 3}
    size |= {
        "measure.points": 0,
        "measure.doses": 2,
        "training.micro_batch": 4,
        "runtime.checkpoint_every": 2,
        "training.eval_every": 3,
        "runtime.threads": 1,
        "runtime.parallel": parallel,
    }
    return tiny(cache, runs, method, task, **(size | METHODS.get(method, {}) | overrides))


def assert_close(run, reference, rel=1e-10):
    """The same lines to 1e-10, but for what a clock measured."""

    def walk(a, b):
        assert isinstance(a, dict) == isinstance(b, dict)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                walk(a[key], b[key])
        else:
            assert a == b or math.isclose(a, b, rel_tol=rel, abs_tol=rel), (run.directory, a, b)

    ours, theirs = content(run), content(reference)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        walk(a, b)


@dataclass
class Done:
    """What the processes have done, by name of the case."""

    one: dict[str, Run] = field(default_factory=dict)
    two: dict[tuple[str, str, str], Run] = field(default_factory=dict)  # (method, parallel, what became of it)
    directory: Path = Path()


def in_one_process(job):
    perform(job, 0)
    return Run(job.config)


def copied(run, directory):
    """A run's directory under another root, config as it is."""
    shutil.copytree(run.directory, directory / run.directory.name, ignore=shutil.ignore_patterns(".lock", ".holder"))


@pytest.fixture(scope="module")
def done(server, cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    done, jobs = Done(directory=root), []

    def add(name, method, parallel, start=None, **how):
        more, task = how.pop("overrides", {}), how.pop("task", "language")
        there = root / f"{parallel}-{name}"
        job = Job(config(cache, there, method, parallel, task, **more), **how)
        if start is not None:
            copied(start, there)
        jobs.append(job)
        done.two[method, parallel, name] = Run(job.config)

    for method in METHODS:
        done.one[method] = in_one_process(Job(config(cache, root / "one", method)))
        for parallel in ("ddp", "fsdp"):
            add("whole", method, parallel)
    # scope=micro-batch goes through whole micro-batches, and has no meaning for shards.
    micro = {"method.options.scope": "micro-batch", "training.micro_batch": 2}
    done.one["micro"] = in_one_process(Job(config(cache, root / "one", "sam", **micro)))
    add("micro", "sam", "ddp", overrides=micro)
    measured = {"measure.points": 2, "measure.adam_from": 1}
    done.one["measured"] = in_one_process(Job(config(cache, root / "measured", "adamw", **measured)))
    by_targets = {"measure.points": 1, "measure.targets": [8], "measure.adam_from": 1}
    done.one["targets"] = in_one_process(Job(config(cache, root / "targets", "adamw", **by_targets)))
    add("targets", "adamw", "fsdp", overrides=by_targets)
    for parallel in ("ddp", "fsdp"):
        add("measured", "adamw", parallel, overrides=measured)
        for method in RESUMED:
            # One process, then two. The copy is of a checkpoint of step 2.
            stopped = in_one_process(Job(config(cache, root / f"one-dies-{parallel}", method), dies=DIES))
            add("one-then-two", method, parallel, stopped)
            # Two, then two, and (from the copy) two, then one or four.
            add("again", method, parallel, dies=DIES, copy_to=root / f"{parallel}-dies")
            done.two[method, parallel, "dies"] = Run(config(cache, root / f"{parallel}-dies", method, parallel))
            jobs.append(Job(config(cache, root / f"{parallel}-again", method, parallel)))
        # Dropout and crops, whole and stopped after a checkpoint.
        add("draws", "functional-sam", parallel, task="vision", overrides=DRAWS)
        add("draws-again", "functional-sam", parallel, task="vision", overrides=DRAWS, dies=DIES)
        jobs.append(Job(config(cache, root / f"{parallel}-draws-again", "functional-sam", parallel, "vision", **DRAWS)))
    # The newest checkpoint damaged: all processes take the one before.
    stopped = in_one_process(Job(config(cache, root / "damaged", "functional-sam"), dies=4))
    newest = max((stopped.directory / "checkpoint").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    add("damaged", "functional-sam", "ddp", stopped)
    # One process gets a signal: both finish the step and save.
    add("signal", "adamw", "ddp", dies=DIES, signal_rank=1, expect=(Interrupted, "SIGUSR2 after step 4"))
    # What only the first process meets is raised by both.
    add("full", "adamw", "fsdp", full_disk=True, expect=(UserError, "disk full"))
    add("locked", "adamw", "ddp", expect=(RunLocked, "another process"))
    add("long", "functional-sam", "ddp", overrides=LONG)
    locked = Run(done.two["adamw", "ddp", "locked"].config)
    locked.open()
    try:
        gloo(2, process, jobs)
    finally:
        locked.close()
    return done


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_curve_of_one(done, method, parallel):
    run = done.two[method, parallel, "whole"]
    assert_close(run, done.one[method])
    assert run.read("provenance.json")["processes"] == 2
    assert run.read("provenance.json")["parallel"] == parallel


def test_whole_microbatches_where_each_goes_its_own_way(done):
    assert_close(done.two["sam", "ddp", "micro"], done.one["micro"])


def test_shares_are_those_of_one_process(done):
    """Exact under DDP; under FSDP by differences of gradients, and said to be."""
    reference = done.one["measured"]
    assert_close(done.two["adamw", "ddp", "measured"], reference)
    lines = done.two["adamw", "fsdp", "measured"].metrics("decompose")
    assert len(lines) == len(reference.metrics("decompose")) == 2
    for ours, theirs in zip(lines, reference.metrics("decompose"), strict=True):
        assert ours["derivative"] == "difference"
        for ascent in ("gradient", "adam"):
            assert ours[ascent]["share"] == pytest.approx(theirs[ascent]["share"], rel=1e-5)
    (ours,), (theirs,) = done.two["adamw", "fsdp", "targets"].metrics("targets"), done.one["targets"].metrics("targets")
    assert (ours["derivative"], ours["targets"]) == ("difference", 8)
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
    for ascent in ("gradient", "adam"):
        assert ours[ascent]["same"]["share"] == pytest.approx(theirs[ascent]["same"]["share"], rel=1e-5)
        for square in ("square_logit", "square_func"):
            assert ours[ascent]["independent"][square] == pytest.approx(theirs[ascent]["independent"][square], rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", RESUMED)
def test_checkpoints_go_from_one_process_to_two_and_back(done, cache, method, parallel):
    went_on = done.two[method, parallel, "one-then-two"]
    assert went_on.done
    assert_close(went_on, done.one[method])
    assert went_on.read("provenance.json")["resumed"][-1]["processes"] == 2

    stopped = done.two[method, parallel, "dies"]
    assert not stopped.done
    assert max(line["step"] for line in stopped.metrics("train")) == DIES
    there = done.directory / f"{parallel}-then-one"
    copied(stopped, there)
    back = in_one_process(Job(config(cache, there, method)))
    assert_close(back, done.one[method])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", RESUMED)
def test_resumed_on_as_many_processes_is_bit_identical(done, method, parallel):
    assert content(done.two[method, parallel, "again"]) == content(done.two[method, parallel, "whole"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_a_step_draws_is_its_own(done, parallel):
    """Killed and resumed equals uninterrupted bit for bit with dropout and crops."""
    whole, again = (done.two["functional-sam", parallel, name] for name in ("draws", "draws-again"))
    assert whole.done
    assert again.read("provenance.json")["hash"] == whole.config.hash
    assert content(again) == content(whole)


@pytest.mark.parametrize("method", RESUMED)
def test_a_checkpoint_does_not_show_how_many_wrote_it(done, method):
    """The same keys, whole tensors of the same shapes, values to rounding."""

    def walk(a, b, where):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert list(a) == list(b), where
            for key in a:
                walk(a[key], b[key], (*where, key))
        elif isinstance(a, list):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, (*where, i))
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        elif where != ("seconds",):
            assert a == b or a == pytest.approx(b), where

    one = checkpoint.load_newest(done.one[method].directory / "checkpoint")
    for parallel in ("ddp", "fsdp"):
        walk(checkpoint.load_newest(done.two[method, parallel, "whole"].directory / "checkpoint"), one, ())


def test_a_damaged_checkpoint_is_passed_over_by_all_processes(done):
    run = done.two["functional-sam", "ddp", "damaged"]
    assert_close(run, done.one["functional-sam"])
    assert run.read("provenance.json")["resumed"][-1]["step"] == 2


def test_a_signal_to_one_process_stops_all_after_the_same_step(done):
    run = done.two["adamw", "ddp", "signal"]
    assert not run.done
    assert checkpoint.load_newest(run.directory / "checkpoint")["step"] == DIES + 1


def test_four_processes(done, cache, tmp_path):
    """The curve of one; from two to four; and resumed bit for bit, though a sum of four depends on its order."""
    jobs = []
    for parallel in ("ddp", "fsdp"):
        copied(done.two["functional-sam", parallel, "dies"], tmp_path / f"{parallel}-went-on")
        jobs += [Job(config(cache, tmp_path / f"{parallel}-{name}", "functional-sam", parallel)) for name in ("went-on", "whole")]
    again = config(cache, tmp_path / "ddp-again", "functional-sam", "ddp")
    gloo(4, process, [*jobs, Job(again, dies=DIES), Job(again)])
    for job in jobs:
        assert_close(Run(job.config), done.one["functional-sam"])
    assert content(Run(again)) == content(Run(jobs[1].config))


# ---------------------------------------------------------------------- processes of torchrun


@contextlib.contextmanager
def torchrun(path):
    """The command of a user, in the background."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "functional_sam"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [*command, "train", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        yield job
    finally:
        job.kill()


def test_a_killed_process_ends_the_job_and_the_same_command_resumes(done, cache, tmp_path):
    """kill -9 of a process that does not lead, under torchrun: no process is left, and the metrics are those of a whole run."""
    there = config(cache, tmp_path, "functional-sam", "ddp", **LONG)
    run = Run(there)
    write_text(run.directory / "config.yaml", to_yaml(there))
    with torchrun(run.directory) as job:
        deadline = time.monotonic() + 120
        while not list((run.directory / "checkpoint").glob("*.sha256")):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = psutil.Process(job.pid).children(recursive=True)
        second = next(w for w in workers if w.environ().get("RANK") == "1")
        second.kill()
        output, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert not run.done, output
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]
    assert 0 < checkpoint.load_newest(run.directory / "checkpoint")["step"] < LONG["training.steps"]
    port = free_port()  # again as torchrun does it: the command in two processes, each with its place in the environment
    again = [Process(tmp_path / f"again-{rank}", "train", run.directory, before=partial(place, rank, port)) for rank in (0, 1)]
    assert [process.wait() for process in again] == [0, 0], again[0].said + again[1].said
    assert content(run) == content(done.two["functional-sam", "ddp", "long"])


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def place(rank, port):
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})


@pytest.mark.parametrize(("rank", "quiet"), [(None, False), ("0", False), ("1", True)])
def test_the_first_process_speaks(monkeypatch, rank, quiet):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert runpy.run_path(commands.__file__)["console"].quiet == quiet


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("environment", "overrides", "words"),
    [
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE=two in the environment is no number of processes: unset it"),
        ({"WORLD_SIZE": "3"}, {}, "training.batch=8 is not divisible by 3 processes"),
        ({"WORLD_SIZE": "2"}, {"method.options.scope": "rank"}, "scope=micro-batch with training.micro_batch=4"),
        ({"WORLD_SIZE": "4"}, {"method.options.scope": "micro-batch", "training.micro_batch": 4}, "the 2 micro-batches"),
        ({"WORLD_SIZE": "2", "RANK": ""}, {}, "RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({}, {"runtime.parallel": "fsdp"}, "torchrun --nproc-per-node 2"),
        ({"WORLD_SIZE": "2"}, {"runtime.parallel": "fsdp", "measure.curvature": True}, "whole parameters"),
    ],
)
def test_bad_input_is_refused_before_anyone_waits(cache, tmp_path, monkeypatch, environment, overrides, words):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    complete = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"} if "RANK" not in environment and environment else {}
    for name, value in (complete | environment).items():
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        distributed.join(config(cache, tmp_path, "sam", **{"runtime.parallel": "auto", **overrides}))


def test_alone_nothing_changes(cache, tmp_path):
    """runtime.parallel=none is one process, whatever the environment says."""
    ranks = distributed.join(config(cache, tmp_path, "sam"))
    batches = [(torch.arange(4), torch.arange(4))]
    assert ranks.part(batches) is batches
    assert ranks.any("SIGTERM") == "SIGTERM"
    assert ranks.lead(lambda: 3) == 3


def test_parts_are_the_batch():
    """In order, each as large as the others, no forward larger than a micro-batch."""
    for batch, size, world in [(12, 6, 4), (12, 12, 3), (16, 4, 2), (24, 4, 4)]:
        rows = torch.arange(batch)
        batches = [(rows[i : i + size], -rows[i : i + size]) for i in range(0, batch, size)]
        parts = [distributed.Ranks(rank, world, "ddp", torch.device("cpu")).part(batches) for rank in range(world)]
        assert torch.equal(torch.cat([x for part in parts for x, _ in part]), rows)
        assert all(torch.equal(x, -t) for part in parts for x, t in part)
        assert {sum(len(x) for x, _ in part) for part in parts} == {batch // world}
        assert max(len(x) for part in parts for x, _ in part) <= size
        assert len({len(part) for part in parts}) == 1


def test_the_rows_of_others_are_not_copied():
    """A step of ImageNet has gigabytes, and of several processes each would copy all of them in every step."""
    rows = torch.arange(16)
    batches = [(rows[i : i + 4], rows[i : i + 4]) for i in range(0, 16, 4)]
    for rank in range(8):  # half a micro-batch each
        ((mine, _),) = distributed.Ranks(rank, 8, "ddp", torch.device("cpu")).part(batches)
        assert mine.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    parts = distributed.Ranks(1, 2, "ddp", torch.device("cpu")).part(batches)
    assert all(x.untyped_storage().nbytes() == 8 * rows.element_size() for x, _ in parts)


def test_the_gpu_is_in_the_record(monkeypatch):
    """A run that goes on on another kind says so; records of CPUs are as they were."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    on_cpu, on_gpu = (distributed.Ranks(0, 1, "none", torch.device(name)).record for name in ("cpu", "cuda:0"))
    assert on_cpu == {"processes": 1, "parallel": "none"}
    assert on_gpu == on_cpu | {"gpu": {"name": "GPU 0", "cuda": torch.version.cuda, "float32": "highest"}}
    other = on_gpu | {"gpu": on_gpu["gpu"] | {"name": "GPU 1"}}
    begun = dict.fromkeys((key for key in SAME if key != "gpu"), 1) | {"started": "then"}
    assert resumed(begun, begun, 3) is begun
    (found,) = resumed(begun | on_gpu, begun | other, 3)["resumed"]
    assert found == {"step": 3, "started": "then", "gpu": other["gpu"]}
