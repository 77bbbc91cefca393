"""What an exhibit is, and is made of: configs/exhibits/NAME.yaml, with a section per scale."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from functional_sam.config import Config, compose, instance, nearest, read_yaml, settings_of
from functional_sam.errors import UserError


@dataclass
class Bound:
    """|fresh - released| <= absolute + relative * |released|."""

    absolute: float = 0.0
    relative: float = 0.0


@dataclass
class Tolerance:
    """What counts as the same result. Every column is a key, has a bound, is exact, or is ignored for a reason; so may a row be."""

    reason: str = ""  # for the sizes of the bounds
    keys: list[str] = field(default_factory=list)  # columns that name a row
    bounds: dict[str, Bound] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)  # column -> why
    rows_ignored: dict[str, str] = field(default_factory=dict)  # row, as a mismatch names it -> why


@dataclass
class Spec:
    """One exhibit at one scale."""

    name: str = ""
    scale: str = "quick"
    title: str = ""
    time: str = ""  # of make NAME at scale quick on 2 CPU cores, for people
    claim: str = ""  # what the paper says
    published: str = ""  # its number
    tolerance: Tolerance = field(default_factory=Tolerance)  # of `check`
    tasks: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)  # of the reported runs: initialization and data order
    seeds_by_task: dict[str, Any] = field(default_factory=dict)  # of the tasks that have other ones
    rho: list[float] = field(default_factory=list)  # the radii that are run, none of them chosen
    rho_scale: dict[str, float] = field(default_factory=dict)  # a method's radius in units of the grid's, where it is another one
    phi: list[float] = field(default_factory=list)  # angles of Angle-SAM, degrees
    cells: dict[str, Any] = field(default_factory=dict)  # name -> its task, and the settings it lays over the config
    dose: list[float] = field(default_factory=list)  # |correction| / |g| of Angle-SAM, in the place of a radius
    lr: list[float] = field(default_factory=list)  # peaks of the learning rate, none of them chosen
    lengths: list[float] = field(default_factory=list)  # of AdamW's runs beside its own, in units of the steps
    margin: float = 0.0  # in the metric's unit: a difference below it counts as none
    study: str = ""  # a file of configs/studies, which then says seeds and grids
    parts: list[str] = field(default_factory=list)  # of the study: whose cells the exhibit shows
    overrides: dict[str, Any] = field(default_factory=dict)  # on the config of every run
    by_task: dict[str, Any] = field(default_factory=dict)  # on those of one task, after overrides

    def run(
        self, task: str, method: str, seed: int, overrides: tuple[str, ...] = (), /, *layers: dict[str, Any], **own: Any
    ) -> Config:
        """The config of a run: the exhibit's overrides, those of the task, `layers`, the seed of weights and data, and `own`.

        own: section -> what tells this run from the exhibit's others. Raises UserError for an override of the command line that
        sets something of it, a seed or a radius: the run would be called what it is not.
        """
        seeds = {"init_seed": seed, "data_seed": seed}
        apart = {**own, "training": {**seeds, **own.get("training", {})}}
        known = {"method.rho", *_keys(apart)}
        for key, override in settings_of(overrides).items():
            if key in known:
                raise UserError(
                    f"override {override!r}: {self.name} sets {key} of each of its runs itself: leave it out, or change "
                    f"configs/exhibits/{self.name}.yaml; for one run: functional-sam train --task {task} --method {method}"
                )
        return compose(task, method, self.scale, [self.overrides, self.by_task.get(task, {}), *layers, apart], overrides)


def _keys(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """section.key, or method.options.key, of all that nested mappings set."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def scales(name: str) -> list[str]:
    """The scales that an exhibit has."""
    return list(read_yaml("exhibits", name).get("scales", {}))


def load_spec(name: str, scale: str) -> Spec:
    """The exhibit's spec at a scale. Raises UserError for an unknown exhibit or scale, or a spec that cannot be."""
    content = read_yaml("exhibits", name)
    read_yaml("scales", scale)
    scales = content.pop("scales", {})
    if scale not in scales:
        raise nearest(f"scale of {name}", scale, scales)
    where = f"configs/exhibits/{name}.yaml"
    try:
        spec = instance(Spec, content, scales[scale] or {}, {"name": name, "scale": scale})
    except OmegaConfBaseException as error:
        raise UserError(f"{where}, scale {scale}: {error.full_key}: {str(error).splitlines()[0]}") from error
    for key in ("title", "time", "claim", "published"):
        if not getattr(spec, key):
            raise UserError(f"{where}: {key} is missing: `make help` and README's table of claims need it")
    if not spec.seeds and not spec.study:
        raise UserError(f"{where}, scale {scale}: seeds is empty")
    for task, seeds in {"": spec.seeds, **spec.seeds_by_task}.items():
        if len(set(seeds)) < len(seeds):
            key = f"seeds_by_task.{task}" if task else "seeds"
            raise UserError(f"{where}, scale {scale}: {key}={seeds}: one is there twice, and would count as two")
    return spec
