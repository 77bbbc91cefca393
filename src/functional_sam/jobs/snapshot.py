"""The code as it was when a job was submitted: what the job runs, and what its records say made them."""

import shutil
import subprocess
from pathlib import Path

from functional_sam.config import configs_directory
from functional_sam.records.code import git, within_git

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
    try:
        head = git("rev-parse", "HEAD", root=root)
        objects = Path(git("rev-parse", "--path-format=absolute", "--git-path", "objects", root=root))
        within_git("init", "--quiet", root=directory)
        (directory / ".git" / "objects" / "info" / "alternates").write_text(f"{objects}\n", encoding="utf-8")
        git("update-ref", "--no-deref", "HEAD", head, root=directory)
        git("read-tree", "HEAD", root=directory)
    except (OSError, subprocess.CalledProcessError):
        shutil.rmtree(directory / ".git", ignore_errors=True)
