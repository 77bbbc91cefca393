"""The code as it was when a job was submitted: what the job runs, and what its records say made them."""

import os
import shutil
import subprocess
from pathlib import Path

from functional_sam.config import configs_directory

COPIED = ("src", "configs", "pyproject.toml")
CLUTTER = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints")


def snapshot(directory: Path) -> Path:
    """Make `directory` a checkout of its own: COPIED as they are now, uncommitted changes too, the rest by links to the project.

    In it HEAD and `git diff` are those of the moment; paper/, results/, runs/ and the data cache are the project's. Returns the
    project's root.
    """
    root = configs_directory().parent.resolve()
    directory.mkdir(parents=True)
    _git(root, directory)
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=CLUTTER)
        else:
            shutil.copy2(source, directory / name)
    for name in ("runs", ".cache"):
        (root / name).mkdir(exist_ok=True)
    for entry in root.iterdir():
        if entry.name not in COPIED and (entry.name == ".cache" or not entry.name.startswith(".")):
            (directory / entry.name).symlink_to(entry)
    return root


def _git(root: Path, directory: Path) -> None:
    """A repository that borrows the project's objects, its HEAD where the project's is now; none where that has none."""
    # The variables by which git's own hooks tell git where to work would lead it away.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(where: Path, *arguments: str) -> str:
        command = ["git", "-C", str(where), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        head = git(root, "rev-parse", "HEAD")
        objects = Path(git(root, "rev-parse", "--path-format=absolute", "--git-path", "objects"))
        git(directory, "init", "--quiet")
        (directory / ".git" / "objects" / "info" / "alternates").write_text(f"{objects}\n", encoding="utf-8")
        git(directory, "update-ref", "--no-deref", "HEAD", head)
        git(directory, "read-tree", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        shutil.rmtree(directory / ".git", ignore_errors=True)
