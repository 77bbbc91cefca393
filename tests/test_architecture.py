"""Who may import whom, what the library costs to import, and files that must agree with each other."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import Process

from functional_sam import exhibits
from functional_sam.exhibits import claims

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "functional_sam"
SHARED = {"errors", "losses", "files"}
# below the library's two halves, which do not know each other
FLOOR = {"vectors", "moments", "ascents", "head", "weights", "derivatives"}
MAY_IMPORT = {
    **dict.fromkeys(sorted(FLOOR), FLOOR | {"errors", "losses"}),
    "sharpness": SHARED | FLOOR,
    "curvature": SHARED | FLOOR,
    "integrations": SHARED | FLOOR | {"sharpness"},
    "models": SHARED,
    "data": SHARED,
    "tasks": SHARED | {"models", "data", "config"},
    # names of data have a package and version; to compose a config asks the table of methods and the task whether it can be
    "config": SHARED | {"data", "sharpness", "tasks"},
    "records": SHARED | {"config", "log_spaced"},
    # training measures the decomposition on its way, hence curvature
    "training": SHARED | FLOOR | {"log_spaced", "sharpness", "curvature", "tasks", "records", "config", "data"},
    # planning reads the table of methods and the chunks of the head, and nothing else of sharpness
    "planning": SHARED | {"config", "models", "sharpness", "head", "tasks"},
    # a study reads the table of methods: which have a radius, and what they cost
    "study": SHARED | {"config", "records", "tasks", "sharpness"},
    # exhibits draw what curvature returned: the smoothing of nodes and weights is its own
    "exhibits": SHARED | {"study", "records", "config", "curvature", "tasks"},
    "jobs": SHARED | {"training", "tasks", "exhibits", "records", "config"},
}


def imports(path):
    """Parts of functional_sam that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("functional_sam."):
                yield name.split(".")[1]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_who_may_import_whom(package):
    files = [PACKAGE / f"{package}.py"] if package in FLOOR else list((PACKAGE / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = set(imports(path)) - MAY_IMPORT[package] - {package}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def modules_of(path):
    """Modules of functional_sam that a file imports when it is loaded, or under TYPE_CHECKING; not inside functions."""
    known = {module_name(p) for p in PACKAGE.rglob("*.py")}
    pending, found = list(ast.parse(path.read_text()).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        pending += list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {node.module}
    return found & known


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_circles():
    """No file imports itself through others; a package's __init__ may import its files, which do not import it."""
    graph = {module_name(path): modules_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
    assert graph["functional_sam.sharpness.backward"] >= {"functional_sam.sharpness.mix", "functional_sam.weights"}
    done = set()

    def visit(name, trail):
        assert name not in trail, "circle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["figure-1", "FRESH=0", "RELEASED=no"], "--jobs 0"),
        (["figure-1", "FRESH=1"], "--jobs 0  --fresh"),
        (["tables", "SCALE=laptop", "FRESH=0"], "draw tables --scale laptop"),
        (["submit-figure-1", "CLUSTER=mine", "RELEASED=1"], "--cluster mine --released"),
    ],
)
def test_a_switch_of_make_that_is_off_is_off(words, ends):
    """FRESH=0 moved every run aside."""
    done = subprocess.run(["make", "-n", "-s", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [re.sub(" +", " ", line.strip()) for line in done.stdout.splitlines() if "functional-sam" in line]
    first = next(line for line in lines if " pip " not in line)
    assert first.endswith(re.sub(" +", " ", ends)), first


def test_planning_reads_the_table_of_methods_alone():
    for path in (PACKAGE / "planning").glob("*.py"):
        assert set(re.findall(r"functional_sam\.(sharpness[.\w]*)", path.read_text())) <= {"sharpness.methods"}


def test_the_library_needs_torch_alone():
    """`import functional_sam` with every third-party package of the pipelines made unimportable."""
    blocked = "omegaconf, rich, pandas, seaborn, matplotlib, sentencepiece, datasets, submitit, papermill, safetensors"
    code = (
        "import sys\n"
        f"names = {[name.strip() for name in blocked.split(',')]!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in names: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import functional_sam, functional_sam.curvature, functional_sam.models\n"
        "print(sorted(set(sys.modules) & set(names)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lock_and_environment_hold_the_same_pins():
    """environment.yml reads the lock itself; every dependency that pyproject.toml names is pinned there, and torch as published."""
    import tomllib

    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock"]
    assert "python=3.11" in environment["dependencies"]
    lock = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line) for line in lock)
    pinned = {line.split("==")[0] for line in lock}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert {re.split(r"[><=~!]", name)[0] for name in named} <= pinned
    assert "torch==2.13.0" in lock
    assert "torchvision" not in pinned


def test_data_pins_are_those_the_code_expects():
    from functional_sam.data import packages

    pins = {line for line in (ROOT / "requirements-data.txt").read_text().splitlines() if line and not line.startswith("#")}
    named = [package for package in vars(packages).values() if isinstance(package, packages.Package)]
    assert pins == {f"{package.name}=={package.version}" for package in named}


def test_every_exhibit_has_module_and_notebook():
    for name in exhibits.known():
        assert (PACKAGE / "exhibits" / f"{name.replace('-', '_')}.py").is_file()
        assert exhibits.notebook(name).is_file()


def test_readme_commands_are_the_makefiles():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    verbs = ("draw", "plan", "check", "submit")
    targets |= {f"{verb}-{name}" for name in [*exhibits.known(), *exhibits.KINDS] for verb in verbs} | set(exhibits.known())
    used = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", readme, re.MULTILINE))
    assert {"figure-1", "test"} <= used
    assert used <= targets, used - targets


def git(*arguments):
    """Output of git on this checkout; skips the test outside one."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: what was committed cannot be told from what was drawn since")
    return done.stdout


def test_readme_numbers_are_those_of_the_records():
    """README's table and picture are the ones made of the committed records (a reader's own, drawn since, may differ)."""
    records = {}
    for name in git("ls-files", "paper").split():
        if name.endswith(".json"):
            content = json.loads(git("show", f"HEAD:{name}"))
            records[content["exhibit"], content["scale"]] = content
    assert records
    facts = {name: yaml.safe_load(git("show", f"HEAD:configs/exhibits/{name}.yaml")) for name in exhibits.known()}
    page = git("show", "HEAD:README.md")
    for (begin, end), make in claims.WRITTEN.items():
        assert f"{begin}\n{make(facts, records)}\n{end}" in page
    for (name, scale), content in records.items():
        assert claims.shown(content) in page, f"no YAML of {name}"
        larger = [records.get((name, other), {}) for other in exhibits.SCALES[exhibits.SCALES.index(scale) + 1 :]]
        if content.get("answer") != "not tested" and all(one.get("answer", "not tested") == "not tested" for one in larger):
            assert content["headline"].replace("|", "\\|") in page


def test_readme_advises_what_the_records_say():
    """The sentences that are typed: costs, and when it does not pay."""
    import csv

    readme = (ROOT / "README.md").read_text().replace("\n  ", " ")
    rows = {
        name: list(csv.DictReader((ROOT / "results" / "benchmark" / f"{name}.csv").read_text().splitlines()))
        for name in ("time", "memory")
    }
    (time,) = [float(r["ratio"]) for r in rows["time"] if (r["case"], r["method"]) == ("decoder-32k", "functional-sam")]
    memory = {row["method"]: float(row["extra_in_parameters"]) for row in rows["memory"]}
    ours, naive = memory["functional-sam"], memory["functional-sam naive"]
    assert f"{time:.1f} times AdamW's time per step and {ours:.1f} more copies of the parameters" in readme
    assert f"a version that keeps whole logits needs {naive:.0f}" in readme
    found = {scale: content["headline"] for (name, scale), content in claims.recorded().items() if name == "figure-7"}
    assert "No method was better than AdamW at equal steps" in readme
    at_steps = r"better than AdamW at equal steps: 0 of \d+; AdamW given the time: better than (\d+) of (\d+), worse than 0"
    given = {scale: re.fullmatch(at_steps, one) for scale, one in found.items()}
    assert all(given.values())
    better, of = given["laptop"].groups()
    assert f"AdamW given a method's time beat {better} of the {of} tried" in readme
    assert "lost to none" in readme


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "docs/using.md", "src/functional_sam/sharpness/README.md"])
def test_python_on_the_pages_runs(server, page, tmp_path, monkeypatch):
    """All python blocks of a page, one after the other, in one process of their own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    process = Process(tmp_path / "log.txt", script)
    assert process.wait() == 0, process.said


def test_costs_on_the_page_are_those_measured():
    """The table of costs in sharpness/README.md holds results/benchmark/time.csv, both as committed."""
    import csv

    page = git("show", "HEAD:src/functional_sam/sharpness/README.md")
    table = page.split("<!-- costs -->")[1].split("<!-- end of costs -->")[0]
    rows = list(csv.DictReader(git("show", "HEAD:results/benchmark/time.csv").splitlines()))
    assert rows
    for row in rows:
        ratio, low, high = (float(row[key]) for key in ("ratio", "ratio_q1", "ratio_q3"))
        cell = f"{ratio:.2f} ({low:.2f}-{high:.2f})"
        line = next(line for line in table.splitlines() if line.startswith(f"| {row['method']} |"))
        assert cell in line, (row["method"], row["case"])
