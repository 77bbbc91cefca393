"""What goes wrong in a process or to a file, for test_faults.py; here, so that the processes can import it."""

import datetime
import itertools
import json
import os
import resource
import signal
import time
from pathlib import Path

from functional_sam.files import sha256
from functional_sam.records import Run
from functional_sam.training import checkpoint, loop


def die_in_torch_save():
    """SIGKILL itself in the middle of writing the second checkpoint."""
    import torch

    save, calls = torch.save, []

    def dying(state, file):
        calls.append(1)
        if len(calls) == 2:
            whole = Path(file.name).with_suffix(".whole")
            save(state, whole)
            file.write(whole.read_bytes()[: whole.stat().st_size // 2])
            file.flush()
            whole.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = dying


def die_before_the_checksum():
    """SIGKILL itself after the second checkpoint has its name and before its checksum is written."""
    write, calls = checkpoint.write_text, []

    def dying(path, text):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, text)

    checkpoint.write_text = dying


def die_in_metrics():
    """SIGKILL itself when half of the line of step 11 is in the file."""
    log = Run.log

    def dying(self, kind, step, **values):
        if step == 11:
            self._metrics.write('{"kind": "train", "step": 11, "lo')
            self._metrics.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, kind, step, **values)

    Run.log = dying


def turn_the_clock_back():
    """Every look at the wall clock shows an hour less than the one before."""
    hours = [0]

    now = time.time()

    def earlier():
        hours[0] += 1
        return now - 3600 * hours[0]

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(earlier(), tz)

    time.time = earlier
    datetime.datetime = Backwards


def limit_the_size_of_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def slow_steps():
    before_each_step(lambda done: time.sleep(0.03))


def hang_after(steps):
    """Never begin the step after so many."""
    before_each_step(lambda done: time.sleep(100) if done == steps else None)


def hang_until(file):
    """Begin no step after the first before `file` is there."""

    def wait(done):
        while done == 1 and not file.exists():
            time.sleep(0.01)

    before_each_step(wait)


def before_each_step(function):
    """Call function(steps done by this process) before each step."""
    backward = loop.SharpnessAware.backward
    done = itertools.count()

    def with_function(self, batches, **options):
        function(next(done))
        return backward(self, batches, **options)

    loop.SharpnessAware.backward = with_function


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def checksum_gone(path):
    path.with_suffix(".sha256").unlink()


def checksum_truncated(path):
    truncated(path.with_suffix(".sha256"))


def not_a_checkpoint(path):
    """Its checksum is right, and it still holds no state."""
    path.write_bytes(b"something else")
    path.with_suffix(".sha256").write_text(sha256(path))


def turn_back_and_hang():
    turn_the_clock_back()
    hang_after(10)


def slow_preparation():
    def slow(config, progress):
        print("preparing", flush=True)
        time.sleep(100)

    loop.prepare = slow


def steps_done(run):
    """By the last whole line, for this is asked hundreds of times."""
    try:
        lines = (run.directory / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return next((json.loads(line)["step"] for line in reversed(lines) if b'"train"' in line), 0)


def result(run):
    """All that a run leaves, without what a clock measured."""

    def timeless(content):
        return {key: value for key, value in content.items() if key not in loop.TIMES}

    state = checkpoint.load_newest(run.directory / "checkpoint")
    weights = {name: value.tolist() for name, value in state["model"].items()}
    return [timeless(line) for line in run.metrics()], timeless(run.summary()), state["step"], weights
