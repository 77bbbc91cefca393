"""What a cluster wants to know about a job: one YAML file per site, jobs/clusters/NAME.yaml."""

import dataclasses
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from functional_sam.config import configs_directory, nearest
from functional_sam.errors import UserError

PATIENCE = 20  # seconds that a question to SLURM may take

# option of sbatch -> what sets it: a key of the profile, or the submission
SET = {
    **{key: key for key in ("time", "partition", "account", "qos", "constraint", "nodes")},
    **{"gpus-per-node": "gpus_per_node", "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus_per_task", "mem": "memory"},
    "signal": "signal_delay",
    **dict.fromkeys(
        (
            "array",
            "job-name",
            "output",
            "error",
            "open-mode",
            "requeue",
            "no-requeue",
            "dependency",
            "kill-on-invalid-dep",
            "wckey",
        ),
        "the submission itself",
    ),
}


@dataclass
class Profile:
    """One site. jobs/clusters/example.yaml explains each key to a user."""

    time: str = ""  # of a run: minutes, MM:SS, HH:MM:SS or D-HH:MM:SS; required
    partition: str = ""  # "" = the site's default, here and below
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodes: int = 1
    gpus_per_node: int = 0
    gpu: str = ""  # their kind, a name of functional_sam.planning.GPUS: for `plan`, which computes what runs need
    utilization: float = 0.4  # fraction of its peak that training is expected to reach, for `plan`
    tasks_per_node: int = 0  # processes; 0 = one per GPU, or one
    cpus_per_task: int = 1
    memory: str = ""  # per node, for instance 64G
    array_parallelism: int = 100  # runs at a time
    signal_delay: int = 120  # seconds before the end of `time` at which a run is told to save
    setup: list[str] = field(default_factory=list)  # lines of shell before anything else: module load ...
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: dict[str, str] = field(default_factory=dict)  # any other option of sbatch
    draw: dict[str, Any] = field(default_factory=dict)  # what differs for the job that draws: it needs one CPU for minutes

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def minutes(self) -> int:
        """`time`, rounded up."""
        return -(-_seconds(self.time) // 60)

    @property
    def drawing(self) -> "Profile":
        """The profile of the job that draws: one process without a GPU, and what `draw` says."""
        single = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "constraint": "", "time": str(min(self.minutes, 60))}
        return dataclasses.replace(self, **{**single, "draw": {}, **self.draw})


class _AsWritten(yaml.BaseLoader):  # type: ignore[misc]
    """Every scalar as it is written, for YAML reads 4:00:00 as a number to the base of sixty; no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} is there twice")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def clusters_directory() -> Path:
    """jobs/clusters/ of the checkout."""
    return configs_directory().parent / "jobs" / "clusters"


def load_profile(cluster: str) -> Profile:
    """The profile in a YAML file, given by its path or its name in jobs/clusters.

    Raises UserError for an unknown file or key (with the nearest known one), a wrong type, a value that cannot be.
    """
    path = Path(cluster)
    if path.suffix not in (".yaml", ".yml"):
        path = clusters_directory() / f"{cluster}.yaml"
        if not path.is_file():
            raise nearest("cluster", cluster, (file.stem for file in path.parent.glob("*.yaml")))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_AsWritten) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected key: value lines, found a {type(content).__name__}")
    content["draw"] = content.get("draw") or {}
    if not isinstance(content["draw"], dict):
        raise UserError(f"{path}: draw: expected key: value lines, found a {type(content['draw']).__name__}")
    profile = _typed(content, str(path))
    checked(profile, str(path))
    draw = _typed({"time": profile.time, **profile.draw}, f"{path}, draw")
    profile.draw = {key: getattr(draw, key) for key in profile.draw}
    checked(profile.drawing, f"{path}, draw")
    return profile


def _typed(content: dict[str, Any], where: str) -> Profile:
    known = [entry.name for entry in dataclasses.fields(Profile)]
    for key in content:
        if key not in known:
            raise nearest(f"key of {where}:", key, known)
    try:
        profile = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Profile), content))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key or 'value'}: {str(error).splitlines()[0]}") from error
    assert isinstance(profile, Profile)
    return profile


def checked(profile: Profile, where: str) -> None:
    """Raise UserError for the first value that cannot be."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{where}: {message}")

    require(bool(profile.time), "time is required: minutes, or HH:MM:SS")
    require(_seconds(profile.time, where) > 0, f"time={profile.time}: more than nothing")
    for key in ("nodes", "cpus_per_task", "array_parallelism"):
        require(getattr(profile, key) >= 1, f"{key}={getattr(profile, key)}: at least 1")
    for key in ("gpus_per_node", "tasks_per_node"):
        require(getattr(profile, key) >= 0, f"{key}={getattr(profile, key)}: at least 0")
    require(
        not profile.gpus_per_node or profile.tasks <= profile.gpus_per_node,
        f"tasks_per_node={profile.tasks}: at most one process for each of the {profile.gpus_per_node} GPUs",
    )
    require(
        bool(re.fullmatch(r"(\d+[KMGT]?B?)?", profile.memory, re.IGNORECASE)),
        f"memory={profile.memory!r}: a number of megabytes, or with a unit such as 64G",
    )
    require(
        0 < profile.signal_delay < _seconds(profile.time),
        f"signal_delay={profile.signal_delay}: seconds, more than 0 and less than time={profile.time}",
    )
    require(0 < profile.utilization <= 1, f"utilization={profile.utilization}: a fraction of the GPU's peak, above 0, at most 1")
    words = {key: value for key, value in vars(profile).items() if isinstance(value, str)}
    for name, value in {**words, **{f"sbatch: {key}": f"{key}{value}" for key, value in profile.sbatch.items()}}.items():
        require("\n" not in value, f"{name}: {value!r} has more than one line")
    for key in profile.sbatch:
        own = SET.get(key.strip("-").replace("_", "-"))
        require(own is None, f"sbatch: {key} is set by {own}: leave it out here")
    for name in profile.environment:
        require(bool(re.fullmatch(r"[A-Za-z_]\w*", name)), f"environment: {name!r} is not the name of a variable")


def _seconds(time: str, where: str = "time") -> int:
    """Seconds of a time limit as sbatch reads it."""
    if re.fullmatch(r"\d+", time):
        return 60 * int(time)
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", time)
    if found is None or (found[1] and not found[2]):
        raise UserError(f"{where}: time={time!r}: minutes (90), MM:SS, HH:MM:SS (4:00:00) or days (1-12:00:00)")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def ask(*command: str) -> str | None:
    """Output of a SLURM command, None where it is absent, fails or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def check_site(profile: Profile, where: str) -> None:
    """Raise UserError when SLURM is absent, or a partition is unknown or does not allow the time."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch not found: submit from a login node of the cluster (--dry-run prints the scripts anywhere)")
    answer = ask("sinfo", "--noheader", "--format=%R|%l")
    if not answer:
        return  # what cannot be asked, sbatch will say
    limits = dict(line.split("|", 1) for line in answer.split())
    for one, place in ((profile, where), (profile.drawing, f"{where}, draw")):
        if not one.partition:
            continue
        for partition in one.partition.split(","):
            if partition not in limits:
                raise nearest(f"partition in {place}:", partition, limits)
        limit = limits[one.partition.split(",")[0]]
        if limit[0].isdigit() and _seconds(one.time) > _seconds(limit):
            raise UserError(f"{place}: time={one.time} is more than the {limit} that partition {one.partition} allows")
