"""What is installed: types that catch a misspelt word, Python 3.10, the library with torch alone, the wheel and the sdist."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import typing
import venv
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from test_architecture import PACKAGE, ROOT, git, module_name, modules_of

from functional_sam import METHODS
from functional_sam.sharpness import MethodName
from functional_sam.sharpness.options import ASCENT_OPTIONS, PATH_OPTIONS, Options

# ---------------------------------------------------------------------- types


def test_names_that_are_typed_are_those_there_are():
    """Of methods, and of the axes; the other options are held to their type in test_sharpness_face.py."""
    assert set(typing.get_args(MethodName)) == set(METHODS)
    hints = typing.get_type_hints(Options)
    assert set(typing.get_args(hints["ascent"])) == set(ASCENT_OPTIONS) - {None}
    assert set(typing.get_args(hints["path"])) == set(PATH_OPTIONS) - {"plain"}


TYPED = """
import torch
from functional_sam import SharpnessAware
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
SharpnessAware(model, optimizer, {arguments})
"""


# What torch imports and the library takes nothing from: half of all that mypy would read.
UNREAD = "torch._decomp torch._dynamo torch._export torch._higher_order_ops torch._inductor torch._prims torch._refs "
UNREAD += "torch._subclasses torch.ao torch.distributions torch.export torch.fx torch.jit torch.onnx torch.package torch.sparse "
UNREAD += "torch.quantization torch.testing torch.utils.benchmark torch.utils.data torch.distributed.elastic torch.distributed.rpc "
UNREAD += "torch.distributed.pipelining IPython matplotlib numpy prompt_toolkit sympy traitlets"


@pytest.mark.slow
def test_mypy_finds_what_is_misspelt(tmp_path):
    """As strict as it gets, and as Python 3.10 has it: that the library's own files pass is seen on the way."""
    cases = {
        '"precond-functional-sam", 0.1, normalize_by="energy", every=2': None,
        '"functionalsam"': "Argument 3",
        '"sam", evry=2': '"evry"',
        '"sam", ascent="adm"': '"ascent"',
        '"sam", every="2"': '"every"',
    }
    for i, arguments in enumerate(cases):
        (tmp_path / f"case_{i}.py").write_text(TYPED.format(arguments=arguments))
    unread = ",".join(f"{name}.*" for name in UNREAD.split())
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{unread}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10", "--no-incremental", "--config-file=mypy.ini"]
    where = {"env": {"MYPYPATH": str(PACKAGE.parent)}, "cwd": tmp_path}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, **where)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    expected = {i: word for i, word in enumerate(cases.values()) if word is not None}
    assert len(errors) == len(expected), done.stdout + done.stderr
    for line in errors:
        assert expected[int(re.match(r"case_(\d)\.py", line.rpartition("/")[2]).group(1))] in line


# ---------------------------------------------------------------------- Python 3.10

NEWER = {  # names that Python 3.10 has not, of modules that a library would import
    "typing": {"Self", "Unpack", "Never", "assert_never", "assert_type", "NotRequired", "Required", "LiteralString", "override"},
    "enum": {"StrEnum", "ReprEnum", "verify"},
    "datetime": {"UTC"},
    "contextlib": {"chdir"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod"},
    "operator": {"call"},
}


def library():
    """Files that `import functional_sam`, its curvature, models and integrations load."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found = {name for name in files if name.split(".")[1:2] in (["sharpness"], ["curvature"], ["models"], ["integrations"])}
    pending = list(found | {"functional_sam"})
    while pending:
        found.add(name := pending.pop())
        pending += modules_of(files[name]) - found
    return {name: files[name] for name in found}


def newer(tree):
    """What a file takes from the standard library that Python 3.10 has not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in NEWER:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in NEWER[node.module])
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (name for name in names if name in ("tomllib", "wsgiref.types"))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in NEWER.get(node.value.id, ()):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr == "add_note":
            yield "add_note"


def test_the_library_is_python_3_10():
    """By its grammar and by the names it takes; the test itself is tried on what is newer."""
    files = library()
    assert {"functional_sam.moments", "functional_sam.sharpness.backward", "functional_sam.curvature.spectrum"} <= set(files)
    assert "functional_sam.config" not in files
    for path in files.values():
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        assert not list(newer(tree)), path
    assert len(list(newer(ast.parse("import tomllib, datetime\nfrom typing import Self, Any\ndatetime.UTC\n")))) == 3
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass\n", feature_version=(3, 10))


# ---------------------------------------------------------------------- what is installed


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist of what is in git, built where nothing of them stays."""
    source = tmp_path_factory.mktemp("source")
    listed = git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    names = [name for name in listed if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    for kind in ("sdist", "wheel"):  # by the backend itself: no download of a build environment
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return names, next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def needed_by(name, found=None):
    """Installed distributions that one needs, itself among them."""
    found = {} if found is None else found
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # of another platform
        return found
    found[name] = distribution
    for line in distribution.requires or []:
        other = re.match(r"[\w.-]+", line).group().lower()
        if "extra ==" not in line and other not in found:
            needed_by(other, found)
    return found


@pytest.fixture(scope="module")
def alone(built, tmp_path_factory):
    """python in an environment with the wheel, torch and what torch needs, and nothing else."""
    directory = tmp_path_factory.mktemp("alone") / "venv"
    venv.create(directory, with_pip=False, symlinks=True)
    python, site = directory / "bin" / "python", next((directory / "lib").glob("python*")) / "site-packages"
    for distribution in needed_by("torch").values():
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(built[1])]
    subprocess.run(install, check=True, capture_output=True)
    return lambda *arguments: subprocess.run(
        [str(python), "-I", *arguments], capture_output=True, text=True, cwd=directory.parent, env={"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_the_wheel_runs_the_readme_with_torch_alone(alone, tmp_path):
    """README's code for a training of one's own, and the two pages' packages; typed, with its pages."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "SharpnessAware" in "".join(blocks)
    own = [block for block in blocks if "functional_sam.integrations" not in block]  # those need a package each
    script = tmp_path / "readme.py"
    script.write_text("\n".join(own) + "\nimport functional_sam\nprint(functional_sam.__file__)\n")
    done = alone(str(script))
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.splitlines()[-1]).parent
    assert "site-packages" in str(place)
    assert all((place / name).is_file() for name in ("py.typed", "sharpness/README.md", "curvature/README.md"))


@pytest.mark.slow
def test_the_library_alone_names_the_extra(alone):
    done = alone("-m", "functional_sam", "run", "figure-1")
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]  # torch warns of a missing numpy before
    assert re.fullmatch(r"functional-sam: the command needs the package '\w+': pip install '\.\[experiments\]'", last)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_sdist_is_the_repository(built, tmp_path):
    """All that git has but .gitignore; its commands find their configs there, and elsewhere say what they need."""
    names, _, sdist = built
    shutil.unpack_archive(sdist, tmp_path)
    (root,) = tmp_path.iterdir()
    assert [name for name in names if not (root / name).is_file()] == [".gitignore"]
    for place, code, words in ((root, 0, "table-1"), (tmp_path, 2, "run this from the root of a clone")):
        # Without the path of the checkout that this package is installed from, which has configs of its own.
        moved = shutil.copytree(root / "src", tmp_path / f"path-{code}")
        command = [sys.executable, "-m", "functional_sam", "plan", "table-1"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env={"PYTHONPATH": str(moved), "COLUMNS": "300"})
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-data.txt"])
def test_every_pinned_package_takes_any_python_3_11(file):
    """README says Python 3.11, of which distributions have early ones (Debian 12: 3.11.2)."""
    names = re.findall(r"^([\w.-]+)(?:\[.*\])?==", (ROOT / file).read_text(), flags=re.MULTILINE)
    assert names
    wanted = {name: importlib.metadata.metadata(name)["Requires-Python"] or "" for name in names}
    assert {name: python for name, python in wanted.items() if not SpecifierSet(python).contains("3.11.0")} == {}
