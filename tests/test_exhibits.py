"""Plans and drawings from a source that is passed, the one writer, an exhibit's YAML, the comparison with what was released."""

import argparse
import json
import re
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from functional_sam import exhibits
from functional_sam.commands import results, runs
from functional_sam.config import to_yaml
from functional_sam.errors import UserError
from functional_sam.exhibits import claims, figure_1, notebooks
from functional_sam.exhibits.check import check
from functional_sam.exhibits.markdown import interval, number, significant, table
from functional_sam.exhibits.output import as_written, csv_text
from functional_sam.exhibits.spec import load_spec, scales
from functional_sam.files import write_text
from functional_sam.records import Run, RunDirectories, released

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("norm_gradient", "norm_logit", "norm_func", "cosine", "cosine_logit_gradient", "cosine_func_gradient")
FIELDS += ("curvature_logit", "curvature_func")
PROVENANCE = {"commit": "c", "diff": "", "versions": {}, "machine": "processor A, 2 cores", "code": {"sha256": "0", "files": {}}}


def share(config, step):
    return 0.2 + 0.01 * config.training.init_seed + 0.001 * step + (0.1 if config.task == "vision" else 0.0)


def do(configs, machine="processor A, 2 cores", of=share):
    """Finished runs of figure-1 with made-up decompositions, where their configs say."""
    for config in configs:
        run = Run(config)
        parts = [
            (step, {a: {"share": of(config, step), **dict.fromkeys(FIELDS, -0.1)} for a in config.measure.ascents})
            for step in (1, 10, 100)
        ]
        lines = [{"kind": "decompose", "step": step, **by_ascent} for step, by_ascent in parts]
        write_text(run.directory / "config.yaml", to_yaml(config))
        write_text(run.directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        run.write("provenance.json", {**PROVENANCE, "machine": machine, "data": {"data": "d", "sha256": "s"}})
        run.write("done.json", {"step": config.training.steps, "seconds": 1.0, "loss": 3.0})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory in which runs/, paper/ and results/ are made; the configs are the checkout's."""
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    for place in ("records.released", "exhibits.check"):
        monkeypatch.setattr(f"functional_sam.{place}.results_directory", lambda: tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(**more):
    return argparse.Namespace(**{"exhibit": "figure-1", "scale": "quick", "overrides": [], "no_notebook": True, **more})


# ---------------------------------------------------------------------- plans and sources


def test_a_missing_run_stops_the_drawing_and_names_the_command(tmp_path):
    with pytest.raises(exhibits.NotComplete, match="functional-sam run figure-1 --scale quick"):
        exhibits.draw("figure-1", overrides=(f"runtime.runs={tmp_path}",))


def test_unknown_exhibit_and_scale():
    with pytest.raises(UserError, match="unknown exhibit 'figure-11'; did you mean 'figure-1'"):
        exhibits.needed("figure-11")
    with pytest.raises(UserError, match="unknown scale 'quik'"):
        exhibits.needed("figure-1", "quik")


def test_a_plan_knows_what_is_missing(home):
    configs = exhibits.needed("figure-1")
    do(configs[:2])
    plan = exhibits.planned("figure-1")
    assert plan.configs == configs
    assert plan.missing == configs[2:]
    assert plan.shown == configs[:2]
    assert not plan.drawable
    do(configs[2:])
    assert exhibits.planned("figure-1").drawable


def test_a_drawing_does_not_plan_again(home, monkeypatch):
    do(exhibits.needed("figure-1"))
    plan = exhibits.ready("figure-1")
    monkeypatch.setattr(figure_1, "compose", None)
    monkeypatch.setattr(figure_1, "plan", None)
    exhibit = exhibits.draw_plan(plan)
    assert exhibit.plan is plan
    assert not (home / "paper").exists()  # in memory


def test_what_is_drawn_from_released_records_is_the_same_to_the_byte(home):
    do(exhibits.needed("figure-1"))
    results.release_command(options())
    here = exhibits.ready("figure-1")
    (home / "runs").rename(home / "elsewhere")
    there = exhibits.ready("figure-1")
    assert isinstance(here.source, RunDirectories)
    assert there.source.name == "results/runs/figure-1-quick.jsonl.gz"
    (home / "elsewhere").rename(home / "runs")
    files = [exhibits.write(exhibits.draw_plan(plan), home / name) for plan, name in ((here, "a/paper"), (there, "b/paper"))]
    assert [path.name for path in files[0]] == ["figure-1.pdf", "figure-1.png", "figure-1.csv", "figure-1.json"]
    for ours, theirs in zip(*files, strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours.name
    record = json.loads(files[0][-1].read_text())
    assert record["files"][0] == "paper/figures/figure-1.pdf"
    assert [run["run"] for run in record["runs"]] == [config.name for config in here.configs]


def test_runs_are_preferred_where_they_hold_as_much(home):
    configs = exhibits.needed("figure-1")
    do(configs)
    results.release_command(options())
    assert exhibits.ready("figure-1").source.name == "runs"
    (Run(configs[0]).directory / "done.json").unlink()
    assert exhibits.ready("figure-1").source.name.startswith("results/")
    with pytest.raises(exhibits.NotComplete):
        exhibits.fresh("figure-1")
    with pytest.raises(exhibits.NotComplete):  # other runs than the released ones
        exhibits.ready("figure-1", overrides=("training.steps=7",))
    with pytest.raises(UserError, match="only complete runs can be released"):
        results.release_command(options())


def test_figure_1_leaves_the_adam_ascent_out_where_it_is_noise(home):
    do(exhibits.needed("figure-1"))
    exhibit = exhibits.draw("figure-1")
    steps = exhibit.frame.groupby("ascent").step.apply(lambda column: set(column))
    assert steps.to_dict() == {"gradient": {1, 10, 100}, "adam": {10, 100}}
    assert "from step 10 on, under Adam's" in exhibit.caption
    assert len(re.findall(r"\.(?= [A-Z]|$)", exhibit.caption)) == 3
    # Shares of delta_func at step 100, language: 0.3, 0.31, 0.32; t quantile 4.303, standard error 0.01 / sqrt(3).
    assert "language gradient 0.69 \N{PLUS-MINUS SIGN} 0.02" in exhibit.verdict
    assert figure_1.headline(exhibit.frame) == "logit share at the end language 0.69, vision 0.59"


# ---------------------------------------------------------------------- against what was released


def line_of(plan_or_none=None, overridden=False):
    plan = plan_or_none or exhibits.ready("figure-1")
    return results.against_released(plan, as_written(exhibits.draw_plan(plan).frame), overridden)


def test_the_last_line_of_a_drawing(home, capsys):
    configs = exhibits.needed("figure-1")
    do(configs)
    assert "not compared with a released result" in line_of()
    results.release_command(options())
    same = "figure-1: yours logit share at the end language 0.69, vision 0.59; released logit share at the end language 0.69, "
    assert line_of() == same + "vision 0.59; all 270 cells the same to the last digit"
    do(configs, of=lambda config, step: share(config, step) + 0.001)
    assert line_of().endswith("all 270 cells within the tolerance")
    do(configs, "processor B, 64 cores", lambda config, step: share(config, step) + 0.03 * (config.task == "vision"))
    found = line_of()
    assert "\n" not in found
    assert "30 of 270 cells not within the tolerance (furthest: task vision, seed 0, step" in found
    assert found.endswith("training amplifies it (released on processor A, yours on processor B)")
    capsys.readouterr()
    assert results.draw_command(options()) == 0  # never a failure
    assert capsys.readouterr().out.splitlines()[-1] == found
    assert results.check_command(options()) == 1  # the strict one
    do(configs, of=lambda config, step: share(config, step) + 0.03)
    assert "No known reason" in line_of()
    pack = home / "results" / "runs" / "figure-1-quick.jsonl.gz"
    whole = pack.read_bytes()
    released.save_pack("figure-1", "quick", [Run(config) for config in configs[:1]])
    assert line_of().endswith("Known reason: the released runs had other settings, or are of an earlier version")
    pack.write_bytes(whole)
    assert "settings of the command line" in line_of(overridden=True)
    for config in configs:
        (Run(config).directory / "done.json").unlink()
    assert line_of().startswith("figure-1: drawn from the released results in results/runs/figure-1-quick.jsonl.gz")


def test_check_compares_what_is_written(home):
    do(exhibits.needed("figure-1"))
    results.release_command(options())
    assert results.check_command(options()) == 0
    csv = home / "results" / "figure-1-quick.csv"
    assert csv.read_text() == csv_text(exhibits.draw("figure-1").frame)
    write_text(csv, csv.read_text().replace("seed", "sead"))
    with pytest.raises(UserError, match=r"configs/exhibits/figure-1.yaml, tolerance: columns without a tolerance: sead"):
        results.check_command(options())


@pytest.mark.parametrize("name", ["figure-1", "figure-2", "figure-4", "table-4"])
@pytest.mark.parametrize("scale", ["quick", "laptop"])
def test_every_scale_has_a_tolerance_with_a_reason(name, scale):
    tolerance = load_spec(name, scale).tolerance
    assert tolerance.keys
    assert tolerance.bounds
    assert tolerance.reason


def test_nothing_differs_from_itself():
    frame = pd.DataFrame({"seed": [0, 1], "a": [1.0, float("nan")]})
    tolerance = exhibits.spec.Tolerance(keys=["seed"], exact=["a"])
    found = check(frame, frame.copy(), tolerance)
    assert (found.mismatches, found.rows, found.cells, found.same) == ([], 2, 2, True)


# ---------------------------------------------------------------------- YAML, make, README


@pytest.mark.parametrize("name", exhibits.known())
def test_make_help_lists_the_exhibit_as_its_yaml_has_it(name):
    spec = load_spec(name, scales(name)[0])
    done = subprocess.run(["make", "-s", "help"], capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [name]]
    assert line.split(maxsplit=1)[1] == f"{spec.title} ({spec.time})"


def test_an_exhibit_without_its_facts_is_refused(tmp_path, monkeypatch):
    (tmp_path / "configs" / "tasks").mkdir(parents=True)
    write_text(tmp_path / "configs" / "scales" / "quick.yaml", "")
    write_text(
        tmp_path / "configs" / "exhibits" / "table-1.yaml", "title: T\ntime: 1 min\nclaim: c\nscales: {quick: {seeds: [0]}}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"table-1.yaml: published is missing"):
        load_spec("table-1", "quick")


def test_the_table_of_claims():
    yaml = {"figure-1": {"claim": "a | b", "time": "1 min", "published": "-"}, "figure-2": {}}
    record = {"files": ["paper/figures/figure-1.pdf", "paper/figures/figure-1.png"], "headline": "|g| is small"}
    larger = {**record, "files": ["paper/figures/figure-1-laptop.png"]}
    text = claims.table(yaml, {("figure-1", "quick"): record})
    row = r"| figure-1 | a \| b | \|g\| is small ([quick](paper/figures/figure-1.png)) | `make figure-1`, 1 min |"
    assert text.splitlines()[2:] == [row]
    text = claims.table(yaml, {("figure-1", "quick"): record, ("figure-1", "laptop"): larger})
    assert r"\|g\| is small ([laptop](paper/figures/figure-1-laptop.png); [quick](paper/figures/figure-1.png)) |" in text


# ---------------------------------------------------------------------- Markdown


def test_a_table():
    assert table(["|g|", "n"], [["a\nb", 1], ["c|d", number(-0.5, 1)]]) == (
        "| \\|g\\| | n |\n|:---|---:|\n| a b | 1 |\n| c\\|d | \N{MINUS SIGN}0.5 |\n"
    )
    assert ":---|:---|" in table(["a", "b"], [], text=["b"])
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(1.23456), "1.2346"),
        (number(1.23456, sign=True), "+1.2346"),
        (number(0.0), "0.0000"),
        (number(0.00004), "< .0001"),
        (number(0.00004, sign=True), "< +.0001"),
        (number(-0.00004), "> \N{MINUS SIGN}.0001"),
        (number(0.04, 1), "< .1"),
        (number(float("nan")), ""),
        (number(float("inf")), "infinite"),
        (significant(-12345.0), "\N{MINUS SIGN}1.23e+04"),
        (interval(0.5, 0.25, 2), "0.50 \N{PLUS-MINUS SIGN} 0.25"),
        (interval(0.5, float("inf"), 2), "0.50"),
        (interval(float("inf"), float("nan"), 2), "infinite"),
    ],
)
def test_numbers(text, expected):
    assert text == expected


# ---------------------------------------------------------------------- notebooks, old runs


def test_an_executed_notebook_keeps_no_trace_of_when_and_where(tmp_path):
    book = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 1}})
    declared = nbformat.v4.new_code_cell('scale = "quick"', metadata={"tags": ["parameters"]})
    injected = nbformat.v4.new_code_cell('# Parameters\nscale = "laptop"\n', metadata={"tags": ["injected-parameters"]})
    last = nbformat.v4.new_code_cell("1", metadata={"papermill": {}, "execution": {}, "tags": []})
    book.cells = [declared, injected, last]
    nbformat.write(book, tmp_path / "n.ipynb")
    notebooks._tidy(tmp_path / "n.ipynb")
    found = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    assert [cell.source for cell in found.cells] == ['scale = "laptop"', "1"]
    assert found.cells[1].metadata == {}
    assert "papermill" not in found.metadata


@pytest.mark.parametrize("name", exhibits.known())
def test_a_notebook_draws_writes_and_shows_its_own_exhibit(name):
    """Committed at scale quick, the one that the others are made of."""
    source = "\n".join(cell.source for cell in nbformat.read(exhibits.notebook(name), as_version=4).cells)
    assert f'exhibit = draw("{name}", scale)\nwrite(exhibit)\n' in source
    assert 'scale = "quick"' in source
    assert exhibits.notebook(name, "laptop").name == f"{name.replace('-', '_')}_laptop.ipynb"


def test_status_says_which_directories_are_of_an_earlier_version(home, capsys):
    configs = exhibits.needed("figure-1")[:3]
    do(configs)
    old, renamed = (Run(config).directory for config in configs[1:])
    text = (old / "config.yaml").read_text()
    assert "  micro_batch: null\n" in text
    write_text(old / "config.yaml", text.replace("  micro_batch: null\n", "  micro_batch: 0\n"))
    renamed.rename(home / "runs" / "language-adamw-0123456789ab")
    assert runs.status_command(argparse.Namespace(directory="runs")) == 0
    out = capsys.readouterr().out
    assert re.search(rf"{old.name} .*of an earlier version, or damaged: training.micro_batch=0", out)
    assert f"of an earlier version, or renamed: today its settings are those of {renamed.name}" in out
    assert "runs: 1 runs; 1 " in out
    assert "2 directories hold no run of this version" in out
    assert released.load_pack("figure-1", "quick") is None
