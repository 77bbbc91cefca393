"""Where a result comes from: code, versions, machine, command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "sentencepiece", "datasets", "omegaconf")


def commit() -> dict[str, Any]:
    """Commit of the checkout this package runs from, and its difference to that commit; unknown outside a checkout."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "diff": git("diff", "HEAD", "--", "src", "configs", "pyproject.toml")}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "diff": ""}


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
        "versions": versions,
        "host": platform.node(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
