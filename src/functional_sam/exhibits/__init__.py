"""One module per figure or table: plan() says which runs it needs, draw() turns their records into figure and CSV.

Nothing here trains. A missing run stops the drawing and names the command that makes it.
"""

import importlib
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pandas as pd

from functional_sam.config import Config, configs_directory, nearest
from functional_sam.errors import UserError
from functional_sam.exhibits.output import Exhibit, drawing_into, save_frame, save_provenance
from functional_sam.exhibits.spec import Spec, load_spec, scales
from functional_sam.records import Run
from functional_sam.records.released import Pack, load_pack, reading, results_directory

__all__ = ["Exhibit", "NotComplete", "draw", "drawable", "fresh", "known", "members", "plan", "source"]


KINDS = {"tables": "table-", "figures": "figure-"}


class NotComplete(UserError):
    """Runs of an exhibit are missing, here and among the released records."""


def known() -> list[str]:
    """Names of all exhibits."""
    return sorted(path.stem for path in (configs_directory() / "exhibits").glob("*.yaml"))


def _module(name: str) -> ModuleType:
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


def plan(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> list[Config]:
    """Configs of the runs that the exhibit needs, as far as they are known: later ones may depend on what earlier ones find.

    Of tables or figures those of all, each run once.
    """
    found: dict[str, Config] = {}
    for one in members(name, scale):
        configs: list[Config] = _module(one).plan(load_spec(one, scale), overrides)
        found |= {config.name: config for config in configs}
    return list(found.values())


def drawable(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> list[Config]:
    """Configs of the runs that can be drawn now: all, or those of a study's complete cells where it goes cell by cell; or none."""
    module, spec = _module(name), load_spec(name, scale)
    spec.complete_only = True
    configs: list[Config] = module.plan(spec, overrides)
    return configs if all(Run(config).done for config in configs) else []


def draw(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> Exhibit:
    """Draw from run directories, or from the released records where those hold more; write the files under paper/.

    Raises UserError naming the command when a run is missing and none was released.
    """
    module, spec = _module(name), load_spec(name, scale)
    spec.command, spec.complete_only = overrides, True
    pack = source(name, scale, overrides)
    with reading(pack) if pack else nullcontext():
        configs = module.plan(spec, overrides)
        exhibit: Exhibit = module.draw(spec, configs)
        exhibit.source = str(pack.path.relative_to(results_directory().parent)) if pack else "runs"
        exhibit.paths.append(save_provenance(spec, exhibit, [Run(config) for config in configs]))
    return exhibit


def source(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> Pack | None:
    """None to draw from run directories; the released records if they hold more. Overrides name other runs: not released.

    Raises NotComplete naming the command when neither is enough to draw.
    """
    configs = plan(name, scale, overrides)
    missing = [config for config in configs if not Run(config).done]
    if not missing:
        return None
    here = drawable(name, scale, overrides)
    pack = None if overrides else load_pack(pack_name(name, scale), scale)
    if pack is not None:
        with reading(pack):
            there = drawable(name, scale)
        if len(there) > len(here):
            return pack
    if here:
        return None
    raise NotComplete(
        f"{name} at scale {scale}: {len(missing)} of {len(configs)} runs are not complete "
        f"(first: {Run(missing[0]).directory}); make them with: functional-sam run {name} --scale {scale}"
    )


def pack_name(name: str, scale: str) -> str:
    """Whose released records an exhibit's are: its own, or its study's, which several exhibits share."""
    return load_spec(name, scale).study or name


def sharing(name: str, scale: str) -> list[str]:
    """The exhibits that draw from the same released records, itself included."""
    own = pack_name(name, scale)
    return [other for other in known() if scale in scales(other) and pack_name(other, scale) == own]


def fresh(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> pd.DataFrame:
    """The numbers of the exhibit from run directories alone, as its CSV holds them; nothing is written under paper/."""
    if source(name, scale, overrides) is not None:
        raise NotComplete(f"{name} at scale {scale}: runs are missing; make them with: functional-sam run {name} --scale {scale}")
    with tempfile.TemporaryDirectory() as directory, drawing_into(Path(directory)):
        return pd.read_csv(save_frame(load_spec(name, scale), draw(name, scale, overrides).frame))


def notebook(name: str) -> Path:
    """The notebook that draws the exhibit."""
    return configs_directory().parent / "analysis" / f"{name.replace('-', '_')}.ipynb"


def spec(name: str, scale: str) -> Spec:
    """The exhibit's spec at a scale."""
    return load_spec(name, scale)
