"""Which code made a result: digests of the source files that can change one, and what differs between two of them."""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parents[1]
# config is not among them: it acts on a result through the resolved config alone, and that has its own hash.
FLOOR = ("losses.py", "vectors.py", "moments.py", "ascents.py", "head.py", "weights.py", "derivatives.py", "log_spaced.py")
SOURCES = (*FLOOR, "models", "sharpness", "curvature", "tasks", "data", "training")
TOKENIZER = "tokenizer.model"  # a file of prepared text
# What only starts, stops and watches runs.
CANNOT_CHANGE = ("training/attempt.py", "training/pool.py", "training/precision.py", "training/signals.py", "training/speed.py")


@functools.cache
def fingerprint() -> dict[str, Any]:
    """`sha256` of all files that can change a result, and `files`: path in the package -> 12 digits of its own SHA-256.

    Comments, docstrings and layout do not count.
    """
    paths = [path for source in SOURCES for path in [PACKAGE / source, *(PACKAGE / source).rglob("*.py")] if path.suffix == ".py"]
    names = sorted(path.relative_to(PACKAGE).as_posix() for path in paths)
    files = {name: digest((PACKAGE / name).read_text(encoding="utf-8")) for name in names if name not in CANNOT_CHANGE}
    return {"sha256": hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest(), "files": files}


def digest(source: str) -> str:
    """12 hexadecimal digits of the SHA-256 of a Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    pending: list[Any] = [tree]
    while pending:  # statements alone, for an expression holds no docstring: ast.walk, which has all, takes as long as to parse
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, block, [])
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def differences(record: dict[str, Any], present: str | None = None) -> list[str]:
    """In words, what differs between what made a record and what is here: code, torch, data. Empty when nothing does.

    record: a run's provenance.json; all parts of a run that was resumed elsewhere count. present: `content` of the present data,
    None when that is not prepared, and so cannot be compared. A record without a fingerprint is judged by what git says has changed
    since its commit.
    """
    found: list[str] = []
    for part in (record, *record.get("resumed", [])):
        if "code" in part:
            found += _changed(part["code"])
        elif part is record:
            found += ["code: made with uncommitted changes"] if part.get("diff") else _since(part.get("commit", "unknown"))
        torch = part.get("versions", {}).get("torch", "")
        here = importlib.metadata.version("torch")
        if torch and torch.split("+")[0] != here.split("+")[0]:
            found.append(f"torch {torch}, here {here}")
        data = content(part.get("data", {}))
        if data and present and data != present:
            found.append(f"data {data[:8]}, here {present[:8]}")
    return list(dict.fromkeys(found))


def content(data: dict[str, Any]) -> str:
    """What a run met of prepared data, as a digest: of all its files but a tokenizer's; "" where nothing is recorded.

    data: a manifest, or the same in a provenance.json. A tokenizer trained on another kind of processor has scores whose last bits
    differ, and cuts every text into the same pieces: what it made is compared, it is not. Where no files are listed, `sha256`.
    """
    files = {name: file["sha256"] for name, file in data.get("files", {}).items() if name != TOKENIZER}
    if not files:
        return str(data.get("sha256", ""))
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _changed(there: dict[str, Any]) -> list[str]:
    """Files of then that are other or gone. One that is new since then cannot matter unless one of these has changed to use it."""
    here = fingerprint()["files"]
    changed = sorted(name for name, digest_then in there["files"].items() if here.get(name) != digest_then)
    return [f"code: {_listed(changed)}"] if changed else []


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git says in a checkout. Raises OSError or CalledProcessError where there is none; the repository around it is not its.

    A package in an environment, or an unpacked sdist, may lie within the repository of something else, whose commit made nothing.
    """
    if Path(within_git("rev-parse", "--show-toplevel", root=root)).resolve() != root.resolve():
        raise FileNotFoundError(f"{root} is not the root of a repository")
    return within_git(*arguments, root=root)


def within_git(*arguments: str, root: Path) -> str:
    """What git says in a directory, of whatever repository it is part of. Raises OSError or CalledProcessError."""
    # The variables by which git's own hooks tell git where to work would lead it away.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


@functools.cache
def _since(commit: str) -> list[str]:
    try:
        output = git("diff", "--name-only", commit, "--", *(f"src/functional_sam/{source}" for source in SOURCES)).split()
    except (OSError, subprocess.CalledProcessError):
        return [f"code: commit {commit[:7]}, not known here"]
    changed = [name.removeprefix("src/functional_sam/") for name in output if name.endswith(".py")]
    changed = [name for name in changed if name not in CANNOT_CHANGE]
    return [f"code since {commit[:7]}: {_listed(changed)}"] if changed else []


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
