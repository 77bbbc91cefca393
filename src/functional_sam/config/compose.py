"""From layers of settings to one complete, checked config, and back from the config.yaml of a run."""

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from functional_sam.config.check import validated
from functional_sam.config.files import configs_directory, copied, mapping, nearest, shared_yaml
from functional_sam.config.schema import Config, keys
from functional_sam.errors import UserError

T = TypeVar("T")
PLACES = ("runtime.cache", "runtime.data", "runtime.runs")  # directories


def compose(
    task: str, method: str = "adamw", scale: str | None = None, extra: Sequence[dict[str, Any]] = (), overrides: Sequence[str] = ()
) -> Config:
    """One complete, checked config. Raises UserError for unknown names or keys, wrong types, impossible values."""
    from functional_sam.sharpness.methods import METHODS, resolve  # these import torch, which a reader of records can do without
    from functional_sam.tasks import check

    if method not in METHODS:
        raise nearest("method", method, METHODS)
    layers = [(f"configs/tasks/{task}.yaml", shared_yaml("tasks", task))]
    if scale is not None:
        by_task = shared_yaml("scales", scale)
        if task not in by_task:
            scales = sorted(path.stem for path in (configs_directory() / "scales").glob("*.yaml"))
            others = " or ".join(f"--scale {other}" for other in scales if task in shared_yaml("scales", other))
            raise UserError(
                f"configs/scales/{scale}.yaml has no section {task}: write one, `{task}: {{}}` where its file of configs/tasks "
                f"says all, or take {others or 'another task'} (sections there: {', '.join(sorted(by_task))})"
            )
        layers.append((f"configs/scales/{scale}.yaml, {task}", by_task[task] or {}))
    for where, layer in layers:
        own = layer.get("method")
        names_one = isinstance(own, dict) and "name" in own
        for key, option, said in (("method.name", "--method", names_one), ("task", "--task", "task" in layer)):
            if said:
                raise UserError(f"{where}: {key} is not of a file: choose it with {option}")
    layers += [("exhibit", dict(layer)) for layer in extra]
    layers.append(("command", {"task": task, "method": {"name": method}}))
    layers += [(f"override {override!r}", _parsed(override)) for override in overrides]
    together: dict[str, Any] = {}
    for where, layer in layers:
        _check_keys(layer, where)
        together = _over(together, layer)
    config = validated(_merged(together, layers))
    for place in (key.removeprefix("runtime.") for key in PLACES):  # a shell leaves the ~ of key=~/x alone
        value = getattr(config.runtime, place)
        try:
            setattr(config.runtime, place, value and str(Path(value).expanduser()))
        except RuntimeError as error:
            raise UserError(
                f"runtime.{place}={value}: whose home directory ~ stands for is not known; give the whole path"
            ) from error
    check(config)
    resolve(config.method.name, config.method.options)
    return config


@functools.lru_cache(maxsize=1024)
def _parsed(override: str) -> dict[str, Any]:
    """The layer of settings that an override is, not to be changed: a study has the same ones over hundreds of configs."""
    if "=" not in override:
        raise UserError(f"override {override!r}: expected key=value, for instance training.steps=100")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"override {override!r}: cannot be read ({' '.join(str(error).split())})") from error
    key, _, text = override.partition("=")
    if key in PLACES and text not in ("", "null", "~"):  # the name of a directory is no YAML: 0412 is not the number 266
        return {"runtime": {key.removeprefix("runtime."): text}}
    return {str(key): value for key, value in content.items()}


@functools.lru_cache(maxsize=256)
def settings_of(overrides: tuple[str, ...]) -> dict[str, str]:
    """section.key, or method.options.key, of all that overrides set -> the override; training={steps: 5} sets training.steps."""
    found: dict[str, str] = {}

    def walk(content: dict[str, Any], prefix: str, override: str) -> None:
        for key, value in content.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.", override)
            else:
                found[f"{prefix}{key}"] = override

    for override in overrides:
        walk(_parsed(override), "", override)
    return found


def refuse_names(overrides: Sequence[str]) -> None:
    """Raise UserError for one of the overrides of a command that would call a run what it is not."""
    for key, override in settings_of(tuple(overrides)).items():
        if key in ("task", "kind", "method.name"):
            option = "--method" if key == "method.name" else "--task"
            raise UserError(
                f"override {override!r}: {key} cannot be overridden: choose it with functional-sam train {option} NAME (an exhibit "
                "sets its own)"
            )


def instance(kind: type[T], *layers: dict[str, Any]) -> T:
    """A dataclass of a schema, over whose defaults the layers are laid, checked by OmegaConf, whose errors it raises.

    A merge costs milliseconds, and a study has hundreds of configs that have most in common: each content is merged once.
    """
    key = f"{kind.__qualname__}{layers!r}"
    if key not in _INSTANCES:
        _INSTANCES[key] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), *layers))
    found: T = copied(_INSTANCES[key])
    return found


_INSTANCES: dict[str, Any] = {}


def _merged(content: dict[str, Any], layers: Sequence[tuple[str, dict[str, Any]]]) -> Config:
    """The config that differs from the defaults by `content`, section by section.

    Raises UserError for a value of another type than its setting, by the one of the (name, layer) that has it.
    """
    default = Config()
    sections = {name: own for name, own in content.items() if isinstance(own, dict)}
    try:
        if "${" in repr(content):  # an interpolation may name another section
            return instance(Config, content)
        merged = instance(Config, {name: own for name, own in content.items() if name not in sections})
        return dataclasses.replace(merged, **{name: instance(type(getattr(default, name)), own) for name, own in sections.items()})
    except (OmegaConfBaseException, TypeError) as error:
        base = OmegaConf.structured(Config)
        for where, layer in layers:
            base = _merge(base, layer, where)
        raise UserError(f"the merged config: {str(error).splitlines()[0]}") from error


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, as OmegaConf does it: what is above wins, lists whole."""
    result = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _over(result[key], value) if nested else value
    return result


def load(path: Path) -> Config:
    """A config from a run directory's config.yaml."""
    content = mapping(path, written=True)
    _check_keys(content, str(path))
    return validated(_merged(content, [(str(path), content)]))


def to_yaml(config: Config) -> str:
    """The complete config as YAML: section by section, each content once, for the runs of a study have most in common."""
    text = ""
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        key = f"{section.name}{value!r}"
        if key not in _TEXTS:
            _TEXTS[key] = OmegaConf.to_yaml(OmegaConf.create({section.name: value}))
        text += _TEXTS[key]
    return text


_TEXTS: dict[str, str] = {}


def _merge(base: Any, layer: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(base, layer)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list in the place of a mapping of any keys
        key = getattr(error, "full_key", "")
        raise UserError(f"{where}: {key or 'value'}: {str(error).splitlines()[0]}") from error


def _check_keys(layer: Any, where: str, known: dict[str, Any] | None = None, prefix: str = "") -> None:
    """An unknown key is refused here and not by OmegaConf, so that the message can name the nearest known one."""
    if not isinstance(layer, dict):
        return
    known = keys() if known is None else known
    for key in map(str, layer):
        full = f"{prefix}{key}"
        if key not in known:
            names = {f"{prefix}{name}" for name in known}
            near = difflib.get_close_matches(full, names, n=1, cutoff=0.4)
            raise UserError(
                f"{where}: unknown key {full!r}" + (f"; did you mean {near[0]!r}?" if near else f" (known: {sorted(names)})")
            )
        if isinstance(known[key], dict) and full != "method.options":
            _check_keys(layer[key], where, known[key], f"{full}.")
