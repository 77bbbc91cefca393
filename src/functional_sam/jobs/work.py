"""What runs inside the cluster, pickled by submitit as a reference to this module of the snapshot, and a few paths."""

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import Checkpointable, TorchDistributedEnvironment, clean_env

from functional_sam.errors import RESUMABLE

# Checkpointable: submitit requeues on SIGUSR2, and the job does what is left. That is so only while it starts and ends: in between
# training has the signals, saves and leaves with RESUMABLE, for a requeue without a save would repeat steps.

# Where the processes of a job meet, unless MASTER_PORT is set: below the ports that Linux hands out to any program (from 32,768
# on), among which is what submitit would choose.
PORTS = range(20_000, 30_000)


def meeting_port() -> int:
    """Draw the port of this job: the same in all its processes, another one after a requeue."""
    return random.Random(f"{os.environ.get('SLURM_JOB_ID')}, {os.environ.get('SLURM_RESTART_COUNT', 0)}").choice(PORTS)


@dataclass
class Train(Checkpointable):
    """One run; with several tasks, this process's part of it."""

    directory: Path  # of the run
    threads: int
    device: str

    def __call__(self) -> None:
        from functional_sam.errors import Interrupted
        from functional_sam.records import RunLocked
        from functional_sam.training.attempt import attempt
        from functional_sam.training.distributed import leave

        os.environ.setdefault("MASTER_PORT", str(meeting_port()))
        place = TorchDistributedEnvironment()
        if place.world_size > 1:
            place.export(set_cuda_visible_devices=False, overwrite=True)
        try:
            run = attempt(self.directory, self.threads, self.device, progress=print, leads=place.rank == 0)
        except (Interrupted, RunLocked) as later:  # locked: by a job of before that is still ending, or by another submission
            print(f"{self.directory.name}: {later}", flush=True)
            sys.exit(RESUMABLE)
        if not run.summary().get("diverged"):
            leave()
        if place.rank == 0:
            print(f"{self.directory.name}: {run.summary()}")


@dataclass
class Next(Checkpointable):
    """After all runs of a stage: submit those that are known only now, or draw the exhibit."""

    submission: Path
    stage: int

    def __call__(self) -> None:
        from functional_sam.jobs.submission import Submission

        os.chdir(self.submission / "code")  # configs/ of the snapshot; the rest is linked to the project
        submission = Submission.load(self.submission)
        conf = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
        with clean_env():  # a job submitted from a job must not take over its options; where SLURM is, it must know
            os.environ.update(conf)
            if submission.missing(self.stage):
                submission.submit(self.stage + 1)
                return
            command = [sys.executable, "-m", "functional_sam", "draw", submission.exhibit, "--scale", submission.scale]
            subprocess.run([*command, *submission.overrides], check=True)
