"""Released records: what redraws exhibits without their run directories, one file an exhibit, or a study, and scale.

results/runs/NAME-SCALE.jsonl.gz (zcat shows it): a head (name, scale, the code and the data of the runs), then one line a run:
config, metrics except those of LEFT_OUT, and every JSON file of its directory. Checkpoints, runtime settings and uncommitted
changes stay behind.
"""

import copy
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_sam.config import Config, configs_directory
from functional_sam.errors import UserError
from functional_sam.files import atomic_file, write_text
from functional_sam.records.code import ROOT
from functional_sam.records.run import RELEASED, Run

LEFT_OUT = ("train",)  # kinds of lines of metrics.jsonl that no exhibit draws, and the most numerous
NOT_RELEASED = "not released"  # in the place of uncommitted changes


@dataclass(frozen=True)
class Pack:
    """The records of one exhibit, or of one study, at one scale: a Source."""

    path: Path
    runs: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The file, as seen from the checkout."""
        return "/".join(self.path.parts[-3:])

    def done(self, config: Config) -> bool:
        """Whether the run is among the released ones, which are all complete."""
        return config.name in self.runs

    def summary(self, config: Config) -> dict[str, Any]:
        """Content of done.json. Raises UserError when the run was not released."""
        return self.read(config, "done.json")

    def read(self, config: Config, file: str) -> dict[str, Any]:
        """Content of a run's file. Raises UserError when it was not released."""
        files: dict[str, dict[str, Any]] = self._run(config)["files"]
        if file not in files:
            raise UserError(f"{self.path}: {file} of {config.name} is not among the released files ({', '.join(sorted(files))})")
        return files[file]

    def metrics(self, config: Config, kind: str | None = None) -> list[dict[str, Any]]:
        """The released lines of a run's metrics.jsonl. Raises UserError for a kind that is never released."""
        if kind in LEFT_OUT:
            raise UserError(f"{self.path}: lines of kind {kind!r} are not released")
        return [line for line in self._run(config)["metrics"] if kind is None or line["kind"] == kind]

    def _run(self, config: Config) -> dict[str, Any]:
        if config.name not in self.runs:
            raise UserError(f"{self.path}: {config.name} is not among the released runs")
        return self.runs[config.name]


def results_directory() -> Path:
    """results/ of the checkout."""
    return configs_directory().parent / "results"


def pack_path(name: str, scale: str) -> Path:
    """The file of the released records of an exhibit, or of a study that several share."""
    return results_directory() / "runs" / f"{name}-{scale}.jsonl.gz"


def load_pack(name: str, scale: str) -> Pack | None:
    """The released records of an exhibit or study, None where there are none. Raises UserError for a damaged file."""
    path = pack_path(name, scale)
    try:
        head, *lines = (json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines())
        for part in _parts(lines):
            if "code" in part:
                part["code"] = {"sha256": part["code"], "files": head["code"][part["code"]]}
            if isinstance(part.get("data"), str):
                part["data"] = head["data"][part["data"]]
        return Pack(path, {line["run"]: line for line in lines})
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): restore it with git checkout") from error


def save_pack(name: str, scale: str, runs: Iterable[Run], kept: Iterable[dict[str, Any]] = ()) -> Path:
    """Write the released records of complete runs, after lines `kept` of a pack that was loaded."""
    lines = [*copy.deepcopy(list(kept)), *(_line(run) for run in runs)]
    # The same for most runs: once, in the head.
    shared: dict[str, dict[str, Any]] = {"code": {}, "data": {}}
    for part in _parts(lines):
        if "code" in part:
            shared["code"][part["code"]["sha256"]] = part["code"]["files"]
            part["code"] = part["code"]["sha256"]
        if "sha256" in part.get("data", {}):
            shared["data"][part["data"]["sha256"]] = part["data"]
            part["data"] = part["data"]["sha256"]
    content = [{"name": name, "scale": scale, "left_out": LEFT_OUT, **shared}, *lines]
    path = pack_path(name, scale)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in content)
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))  # no time: the same records are the same file
    return path


def restore(pack: Pack, configs: Iterable[Config]) -> list[Run]:
    """Make run directories of released records, for those of configs that were released and not begun here; these runs.

    Their provenance stays that of the machine that trained them, and a file RELEASED in each says what they are: `check` refuses
    them, for it would compare records with themselves. done.json is written last, as of any run: one cut off is taken again.
    """
    restored = []
    for run in (Run(config) for config in configs if pack.done(config)):
        if run.state != "missing" and not (run.state == "partial" and run.released):
            continue
        line = pack.runs[run.config.name]
        files = dict(line["files"])
        done = files.pop("done.json")
        run.open()
        try:
            write_text(run.directory / RELEASED, f"{pack.name}\n")
            write_text(run.directory / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in line["metrics"]))
            for name, content in files.items():
                run.write(name, content)
            run.write("done.json", done)
        finally:
            run.close()
        restored.append(run)
    return restored


def _parts(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What says where a run comes from: of its beginning, and of each time it was resumed."""
    for line in lines:
        record = line["files"]["provenance.json"]
        yield from (record, *record.get("resumed", []))


def _line(run: Run) -> dict[str, Any]:
    names = sorted(path.name for path in run.directory.glob("[!.]*.json"))
    if not run.summary().get("diverged"):
        run.require_metrics_until(run.config.training.steps)
    line = {
        "run": run.config.name,
        "config": _settings(run.directory / "config.yaml"),
        "files": {name: run.read(name) for name in names},
        "metrics": [line for line in run.metrics() if line["kind"] not in LEFT_OUT],
    }
    for part in _parts([line]):
        if "command" in part:
            words = [_plain(word) for word in part["command"]]
            if "--worker" in words:  # of a pool: one process did many runs
                words = [word for word in words if "-" not in word.lstrip("-") or word == run.config.name]
            part["command"] = words
        if part.get("diff") and not part["diff"].startswith(NOT_RELEASED):  # else of a run that was released before
            part["diff"] = f"{NOT_RELEASED}; SHA-256 {hashlib.sha256(part['diff'].encode()).hexdigest()}"
    return line


def _settings(path: Path) -> str:
    """A run's config.yaml without its last section: runtime settings are a machine's, and change no result."""
    settings, runtime, _ = path.read_text(encoding="utf-8").partition("runtime:\n")
    assert runtime
    return settings


def _plain(word: str) -> str:
    """A word of a command without where this checkout lies."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
