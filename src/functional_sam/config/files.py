"""The YAML files under configs/, each parsed once, and the error for a name that none of them has."""

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf

from functional_sam.errors import UserError

FOUND = {list: "list", str: "string", int: "number", float: "number"}  # in a message, where a mapping should be
T = TypeVar("T")
CHECKOUT = Path(__file__).resolve().parents[3]
FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def configs_directory() -> Path:
    """configs/ of the working directory, or of the checkout this package is installed from."""
    for root in (Path.cwd(), CHECKOUT):
        if (root / "configs" / "tasks").is_dir():
            return root / "configs"
    raise UserError(f"no configs/ in {Path.cwd()}: run this from the root of a clone (or of the unpacked sdist), which has them")


def nearest(kind: str, value: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}{hint} (known: {', '.join(known)})")


def read_yaml(folder: str, name: str) -> dict[str, Any]:
    """configs/FOLDER/NAME.yaml; an unknown NAME is a UserError with the nearest known one."""
    return copied(shared_yaml(folder, name))


def shared_yaml(folder: str, name: str) -> dict[str, Any]:
    """The same, not to be changed: all who ask for the file are given the one mapping."""
    path = configs_directory() / folder / f"{name}.yaml"
    if not path.is_file():
        raise nearest(folder.rstrip("s"), name, (file.stem for file in path.parent.glob("*.yaml")))
    return _parsed(path, path.stat().st_mtime_ns, path.stat().st_size)


@functools.lru_cache(maxsize=64)
def _parsed(path: Path, changed: int, size: int) -> dict[str, Any]:
    """What a YAML file holds, read once: to parse one takes milliseconds, and a study composes hundreds of configs."""
    return mapping(path)


def copied(content: T) -> T:
    """A deep copy of mappings, lists and dataclasses of plain values; copy.deepcopy, made for all there is, takes far longer."""
    result: Any = content
    if isinstance(content, dict):
        result = {key: copied(value) for key, value in content.items()}
    elif isinstance(content, list):
        result = [copied(value) for value in content]
    elif hasattr(content, "__dataclass_fields__"):
        result = object.__new__(type(content))
        vars(result).update(copied(vars(content)))
    new: T = result
    return new


def mapping(path: Path, written: bool = False) -> dict[str, Any]:
    """What a YAML file holds; UserError where it is no YAML, or no mapping.

    written: by a run, and not by a person, whose 1e-3, twice given keys and so on OmegaConf knows and takes 20 times as long for.
    """
    try:
        content: Any = yaml.load(path.read_bytes(), FAST) if written else OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, found a {FOUND.get(type(content), 'value')}")
    return content
