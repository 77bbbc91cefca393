"""One module per figure or table: plan(spec, source, overrides) finds its runs, draw(plan) turns their records into an Exhibit.

Nothing here trains. A missing run stops the drawing and names the command that makes it.
"""

import dataclasses
import importlib
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

from functional_sam.config import Config, configs_directory, nearest, refuse_names, settings_of
from functional_sam.errors import UserError
from functional_sam.exhibits.check import released_path
from functional_sam.exhibits.output import Exhibit, as_written, write
from functional_sam.exhibits.overrides import require_read_by_one
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import load_spec, scales
from functional_sam.exhibits.words import so_far
from functional_sam.records import Run, RunDirectories, Source
from functional_sam.records.released import Pack, load_pack, restore
from functional_sam.study import tune
from functional_sam.study.design import CELLS, load_study

__all__ = [
    "KINDS",
    "SCALES",
    "Exhibit",
    "NotComplete",
    "Plan",
    "changing",
    "draw",
    "draw_plan",
    "foreseen",
    "fresh",
    "known",
    "members",
    "needed",
    "packs_of",
    "planned",
    "ready",
    "take_released",
    "way",
    "write",
]

KINDS = {"tables": "table-", "figures": "figure-"}
SCALES = ("quick", "laptop", "paper")  # the smallest first


class NotComplete(UserError):
    """Runs of an exhibit are missing, here and among the released records."""


def known() -> list[str]:
    """Names of all exhibits."""
    return sorted(path.stem for path in (configs_directory() / "exhibits").glob("*.yaml"))


def module_of(name: str) -> ModuleType:
    """The module of an exhibit. Raises UserError for an unknown one."""
    if name not in known():
        raise nearest("exhibit", name, known())
    return importlib.import_module(f"functional_sam.exhibits.{name.replace('-', '_')}")


def members(name: str, scale: str) -> list[str]:
    """The exhibits that a name stands for: all tables, all figures, or one. Raises UserError where none of them has the scale."""
    if name not in KINDS:
        return [name]
    every = [one for one in known() if one.startswith(KINDS[name])]
    found = [one for one in every if scale in scales(one)]
    if not found:
        there = sorted({one for exhibit in every for one in scales(exhibit)})
        raise UserError(f"none of the {name} has a scale {scale!r}: {', '.join(there)}")
    return found


def planned(name: str, scale: str = "quick", overrides: tuple[str, ...] = (), source: Source | None = None) -> Plan:
    """The plan of one exhibit by the records of a source, by default the run directories."""
    module = module_of(name)
    refuse_names([one for one in overrides if not one.startswith(CELLS)])
    plan: Plan = module.plan(load_spec(name, scale), source or RunDirectories(), overrides)
    return plan


def needed(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> list[Config]:
    """Configs of the runs that the exhibit needs, as far as they are known: later ones may depend on what earlier ones find.

    Of tables or figures those of all, each run once. Raises UserError for an override that none of them reads.
    """
    found: dict[str, Config] = {}
    for one in members(name, scale):
        found |= {config.name: config for config in planned(one, scale, overrides).configs}
    _require_read(name, scale, overrides, found.values())
    return list(found.values())


def _require_read(name: str, scale: str, overrides: tuple[str, ...], configs: Iterable[Config]) -> None:
    """Of later runs, which the first ones of a study do not name yet, models and optimizers count too."""
    if overrides:
        require_read_by_one(name, (*configs, *foreseen(name, scale, overrides)), overrides)


def packs_of(name: str, scale: str) -> list[Pack]:
    """The released records that hold runs of an exhibit, or of all tables or figures."""
    packs = (load_pack(one, scale) for one in sorted({pack_name(member, scale) for member in members(name, scale)}))
    return [pack for pack in packs if pack is not None]


def take_released(name: str, scale: str, overrides: tuple[str, ...], tell: Callable[[str], None]) -> list[Config]:
    """`needed`, once those of the runs that were released and not begun here are taken as they are; `tell` hears how many.

    Runs that follow from what released ones found are named then too, and so are those of a study's later cells, where these were
    released before an earlier one was complete.
    """
    while True:
        configs = needed(name, scale, overrides)
        taken: dict[str, int] = {}
        for pack in packs_of(name, scale):
            theirs = [config for one in members(name, scale) for config in planned(one, scale, overrides, pack).configs]
            taken[pack.name] = len(restore(pack, [*configs, *theirs]))
        for where, count in taken.items():
            if count:
                tell(f"{count} runs taken as they were released in {where}")
        if not any(taken.values()):
            return configs


def foreseen(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> list[Config]:
    """As many runs as `needed` will name in the end, those included that follow from what earlier ones find."""
    found: dict[str, Config] = {}
    refuse_names([one for one in overrides if not one.startswith(CELLS)])
    for one in members(name, scale):
        spec = load_spec(one, scale)
        if spec.study:
            study = load_study(spec.study, scale, overrides)
            shows = getattr(module_of(one), "has_a_place", lambda *_: True)
            configs = tune.foreseen(study, [cell for cell in study.part(*spec.parts) if shows(study, cell)])
        else:
            configs = planned(one, scale, overrides).configs
        found |= {config.name: config for config in configs}
    return list(found.values())


def ready(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> Plan:
    """A plan that can be drawn: of the run directories, or of the released records where those hold more.

    Overrides name other runs: not released. Raises NotComplete naming the command when neither is enough to draw.
    """
    here = planned(name, scale, overrides)
    _require_read(name, scale, overrides, here.configs)
    if here.drawable and not here.missing:
        return here
    pack = None if overrides else load_pack(pack_name(name, scale), scale)
    if pack is not None:
        there = planned(name, scale, source=pack)
        if there.drawable and not (here.drawable and len(here.shown) >= len(there.shown)):
            return there
    if here.drawable:
        return here
    if not here.missing:
        raise NotComplete(
            f"{name} at scale {scale}: the cells that were asked for are complete; for a drawing it needs its other runs too: "
            f"{way('run', name, scale)}"
        )
    raise NotComplete(
        f"{name} at scale {scale}: {len(here.missing)} of {len(here.configs)} runs are not complete "
        f"(first: {Run(here.missing[0]).directory}); make them with: {way('run', name, scale, overrides)}"
    )


def changing(overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that change which runs an exhibit shows: all but where runs are, and how they are run."""
    return [one for one in overrides if any(not key.startswith("runtime.") for key in settings_of((one,)))]


def draw(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> Exhibit:
    """Draw in memory, from the run directories or the released records; write() makes the files.

    Raises NotComplete naming the command when a run is missing and none was released.
    """
    return draw_plan(ready(name, scale, overrides))


def draw_plan(plan: Plan) -> Exhibit:
    """Draw in memory what a plan holds."""
    import matplotlib.pyplot as plt  # slow to import, and most commands draw nothing

    module = module_of(plan.spec.name)
    drawn: Exhibit = module.draw(plan)
    exhibit = dataclasses.replace(drawn, headline=module.headline(as_written(drawn.frame)), answer=so_far(drawn.answer, plan))
    for figure in (exhibit.figure, *exhibit.more.values()):
        plt.close(figure)  # it stays whole, but pyplot keeps it no longer, and a notebook does not show it a second time
    return exhibit


def fresh(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> Exhibit:
    """The same from run directories alone. Raises NotComplete where the released records hold more of it."""
    plan = ready(name, scale, overrides)
    if not isinstance(plan.source, RunDirectories):
        raise NotComplete(f"{name} at scale {scale}: runs are missing; make them with: {way('run', name, scale, overrides)}")
    return draw_plan(plan)


def way(verb: str, name: str, scale: str, overrides: Sequence[str] = (), *options: str) -> str:
    """A command to give to a shell, about the same runs."""
    return shlex.join(["functional-sam", verb, name, "--scale", scale, *options, *overrides])


def pack_name(name: str, scale: str) -> str:
    """Whose released records an exhibit's are: its own, or its study's, which several exhibits share."""
    return load_spec(name, scale).study or name


def sharing(name: str, scale: str) -> list[str]:
    """The exhibits that draw from the same released records, itself included."""
    own = pack_name(name, scale)
    return [other for other in known() if scale in scales(other) and pack_name(other, scale) == own]


def notebook(name: str, scale: str | None = None) -> Path:
    """The executed notebook of the exhibit: NAME.ipynb of the largest scale that is released, NAME_SCALE.ipynb of another."""
    main = largest_released(name)
    stem = name.replace("-", "_") + ("" if scale in (None, main) else f"_{scale}")
    return configs_directory().parent / "analysis" / f"{stem}.ipynb"


def largest_released(name: str) -> str:
    """The largest scale whose numbers are under results/; quick where none are."""
    return next((scale for scale in reversed(SCALES) if released_path(name, scale).is_file()), SCALES[0])
