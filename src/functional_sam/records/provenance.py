"""Where a result comes from: code, versions, machine, command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from functional_sam.records.code import fingerprint, git

PACKAGES = ("torch", "numpy", "sentencepiece", "datasets", "omegaconf", "transformers", "tokenizers")


def commit() -> dict[str, Any]:
    """Commit of the checkout this package runs from, and its difference to that commit; unknown outside a checkout."""
    try:
        return {"commit": git("rev-parse", "HEAD"), "diff": git("diff", "HEAD", "--", "src", "configs", "pyproject.toml")}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "diff": ""}


def machine() -> str:
    """Kind of processor and number of cores: what a speed depends on, and on other kinds rounding too."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def provenance() -> dict[str, Any]:
    """What produced a result, as JSON."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        **commit(),
        "code": fingerprint(),
        "versions": versions,
        "host": platform.node(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


SAME = ("commit", "diff", "code", "versions", "host", "machine", "threads", "processes", "parallel", "gpu", "data")
ALONE = {"processes": 1, "parallel": "none"}  # what records say that were made before they said so


def resumed(before: dict[str, Any], now: dict[str, Any], step: int) -> dict[str, Any]:
    """The record of a run that goes on after `step`: what has changed since it was begun is added under `resumed`."""
    state: dict[str, Any] = {key: before.get(key, ALONE.get(key)) for key in SAME}
    for entry in before.get("resumed", []):
        state |= entry
    changed = {key: now.get(key) for key in SAME if now.get(key) != state[key]}
    if not changed:
        return before
    return {**before, "resumed": [*before.get("resumed", []), {"step": step, "started": now["started"], **changed}]}
