"""One module per figure or table: plan() says which runs it needs, draw() turns their records into figure and CSV.

Nothing here trains. A missing run stops the drawing and names the command that makes it.
"""

import importlib
from pathlib import Path
from types import ModuleType

from functional_sam.config import Config, configs_directory, nearest
from functional_sam.errors import UserError
from functional_sam.exhibits.output import Exhibit, save_provenance
from functional_sam.exhibits.spec import Spec, load_spec
from functional_sam.records import Run

__all__ = ["Exhibit", "draw", "known", "plan"]


def known() -> list[str]:
    """Names of all exhibits."""
    return sorted(path.stem for path in (configs_directory() / "exhibits").glob("*.yaml"))


def _module(name: str) -> ModuleType:
    if name not in known():
        raise nearest("exhibit", name, known())
    return importlib.import_module(f"functional_sam.exhibits.{name.replace('-', '_')}")


def plan(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> list[Config]:
    """Configs of the runs that the exhibit needs, as far as they are known: later ones may depend on what earlier ones find."""
    module = _module(name)
    configs: list[Config] = module.plan(load_spec(name, scale), overrides)
    return configs


def draw(name: str, scale: str = "quick", overrides: tuple[str, ...] = ()) -> Exhibit:
    """Draw from records; write the files under paper/. Raises UserError naming the command when a run is missing."""
    module, spec = _module(name), load_spec(name, scale)
    configs = module.plan(spec, overrides)
    runs = [Run(config) for config in configs]
    missing = [run for run in runs if not run.done]
    if missing:
        raise UserError(
            f"{name} at scale {scale}: {len(missing)} of {len(runs)} runs are not complete "
            f"(first: {missing[0].directory}); make them with: functional-sam run {name} --scale {scale}"
        )
    exhibit: Exhibit = module.draw(spec, configs)
    exhibit.paths.append(save_provenance(spec, exhibit, runs))
    return exhibit


def notebook(name: str) -> Path:
    """The notebook that draws the exhibit."""
    return configs_directory().parent / "analysis" / f"{name.replace('-', '_')}.ipynb"


def spec(name: str, scale: str) -> Spec:
    """The exhibit's spec at a scale."""
    return load_spec(name, scale)
