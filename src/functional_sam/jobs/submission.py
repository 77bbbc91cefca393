"""One `functional-sam submit`: runs/.jobs/TIME-EXHIBIT/ with submission.json, code/ (the snapshot) and a folder per stage.

A stage is an array of runs and the job after it, which draws, or submits the next stage: some runs are known only once others are
complete. stage-N/jobs.json says which job is which run's; submitit's scripts, pickles and logs lie beside it.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm

from functional_sam.config import Config
from functional_sam.errors import RESUMABLE, UserError
from functional_sam.exhibits import needed, take_released
from functional_sam.files import write_text
from functional_sam.jobs.profile import PATIENCE, Profile
from functional_sam.jobs.queue import jobs
from functional_sam.jobs.work import Next, Train
from functional_sam.records import Run

STARTS = 20  # submitit's own requeues, while a job starts or ends: a job that never gets to train does not go on for ever


# Exit code 75 is training's "saved, go on later". A job that SLURM itself is ending (cancelled, or requeued already) is let go.
TEARDOWN = [
    "status=$?",
    f"if [ $status = {RESUMABLE} ] && scontrol show job --oneliner $SLURM_JOB_ID | grep -q 'JobState=RUNNING'; then",
    "    scontrol requeue $SLURM_JOB_ID && sleep 60",
    "fi",
    "exit $status",
]

# Seconds that a job goes on after the first of its processes has ended. They end together: one that died (of memory, say) leaves
# the others waiting for it in a collective, which NCCL gives up only after ten minutes.
WAIT = 60


@dataclass
class Submission:
    """What was asked for, and where."""

    directory: Path
    exhibit: str
    scale: str
    overrides: list[str]
    profile: Profile
    released: bool = False  # runs that were released are taken as they are, at every stage

    @classmethod
    def load(cls, directory: Path) -> "Submission":
        """From submission.json."""
        content: dict[str, Any] = json.loads((directory / "submission.json").read_text(encoding="utf-8"))
        profile = Profile(**content.pop("profile"))
        return cls(directory=directory, profile=profile, **content)

    def save(self) -> None:
        """Write submission.json."""
        content = dataclasses.asdict(self)
        del content["directory"]
        write_text(self.directory / "submission.json", json.dumps(content, indent=1) + "\n")

    def missing(self, after: int = 0) -> list[Config]:
        """The runs that are not complete. Raises UserError when one of stage `after` or before is among them."""
        asked = (self.exhibit, self.scale, tuple(self.overrides))
        configs = take_released(*asked, print) if self.released else needed(*asked)
        missing = [config for config in configs if not Run(config).done]
        tried = {name for stage in range(1, after + 1) for name in jobs(self.stage(stage)).values()}
        for config in missing:
            if config.name in tried:
                raise UserError(f"{config.name} ended without an error and is not complete: see its log with functional-sam status")
        return missing

    def stage(self, number: int) -> Path:
        """Folder of a stage."""
        return self.directory / f"stage-{number}"

    def parameters(self, profile: Profile, name: str) -> dict[str, Any]:
        """A profile as parameters of submitit's executor."""
        given: dict[str, Any] = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
        given = {key: value for key, value in given.items() if value}
        if profile.gpus_per_node:
            given["gpus_per_node"] = profile.gpus_per_node
        exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
        # After the site's own lines, which may set it: the snapshot comes before the checkout that the environment knows.
        exports.append(f"export PYTHONPATH={shlex.quote(str(self.directory / 'code' / 'src'))}${{PYTHONPATH:+:$PYTHONPATH}}")
        # submitit writes an option that is True without a value.
        more: dict[str, Any] = {key: True if value in ("", "true") else value for key, value in profile.sbatch.items()}
        more["requeue"] = True
        if profile.memory:
            more["mem"] = profile.memory.upper().removesuffix("B")
        return {
            **given,
            "job_name": name,
            "time": profile.minutes,
            "nodes": profile.nodes,
            "ntasks_per_node": profile.tasks,
            "cpus_per_task": profile.cpus_per_task,
            "array_parallelism": profile.array_parallelism,
            "signal_delay_s": profile.signal_delay,
            "stderr_to_stdout": True,
            "wckey": None,
            # Since 22.05 srun does not take the first over from sbatch, and would bind every process to one core.
            "srun_args": [f"--cpus-per-task={profile.cpus_per_task}", f"--wait={WAIT}"],
            "setup": [*profile.setup, *exports],
            "teardown": TEARDOWN,
            "additional_parameters": more,
        }

    def parameters_next(self, array: str | None) -> dict[str, Any]:
        """Those of the job that waits for an array (None: for nothing), and vanishes when a run of it fails."""
        parameters = self.parameters(self.profile.drawing, f"{self.exhibit}-next")
        if array is not None:
            parameters["dependency"] = f"afterok:{array}"
            parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
        return {**parameters, "use_srun": False}  # the environment of a step would follow what this job submits

    def scripts(self, count: int) -> list[str]:
        """The sbatch scripts of a first stage of `count` runs, as they would be submitted."""
        array = {"map_count": count} if count > 1 else {}
        both = [self.parameters(self.profile, self.exhibit) | array, self.parameters_next("ARRAY")]
        if not count:
            both = [self.parameters_next(None)]
        folder = self.stage(1)
        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        return [slurm._make_sbatch_string(command, folder, **parameters) for parameters in both]

    def submit(self, stage: int) -> tuple[list[str], str]:
        """Submit the missing runs as one array, and the job after it: ids of the runs' jobs, and the id of that.

        Raises UserError with sbatch's own words when it refuses; nothing stays in the queue then.
        """
        configs = self.missing()
        work = [self._prepared(config) for config in configs]
        ids: list[str] = []
        try:
            if work:
                executor = self._executor(stage, self.parameters(self.profile, self.exhibit))
                with executor.batch():
                    submitted = [executor.submit(one) for one in work]
                ids = [job.job_id for job in submitted]
                self._write(stage, ids, configs, None)
            executor = self._executor(stage, self.parameters_next(ids[0].split("_")[0] if ids else None))
            after: str = executor.submit(Next(self.directory, stage)).job_id
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
            if ids:
                subprocess.run(["scancel", ids[0].split("_")[0]], check=False, timeout=PATIENCE)
            raise UserError(f"sbatch refused the job, nothing is queued: {refusal(str(error))}") from error
        self._write(stage, ids, configs, after)
        return ids, after

    def _executor(self, stage: int, parameters: dict[str, Any]) -> slurm.SlurmExecutor:
        executor = slurm.SlurmExecutor(self.stage(stage), max_num_timeout=STARTS)
        executor.update_parameters(**parameters)
        return executor

    def _prepared(self, config: Config) -> Train:
        """The job of a run whose directory is there."""
        run = Run(config)
        run.for_a_process()
        (run.directory / "error.txt").unlink(missing_ok=True)
        return Train(run.directory.resolve(), self.profile.cpus_per_task, "cuda" if self.profile.gpus_per_node else "cpu")

    def _write(self, stage: int, ids: list[str], configs: list[Config], after: str | None) -> None:
        content = {"runs": dict(zip(ids, (config.name for config in configs), strict=True)), "next": after}
        write_text(self.stage(stage) / "jobs.json", json.dumps(content, indent=1) + "\n")


def refusal(text: str) -> str:
    """What sbatch says, without its name before every line."""
    lines = [line.split("error:", 1)[-1].strip() for line in text.splitlines() if line.startswith("sbatch:")]
    return "; ".join(dict.fromkeys(lines)) or text.strip()
