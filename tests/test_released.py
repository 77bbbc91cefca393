"""Against what was released: the same records drawn again, compared, taken over, and a study that goes on from them."""

import dataclasses
import json

import matplotlib.pyplot as plt
import pytest
from made_up_figure import CELLS, HEADLINE, do, options, share
from rich.console import Console

from functional_sam import exhibits
from functional_sam.commands import results, runs
from functional_sam.errors import Interrupted, UserError
from functional_sam.exhibits import figure_1
from functional_sam.exhibits.output import as_written, csv_text, stem
from functional_sam.exhibits.spec import load_spec
from functional_sam.files import write_text
from functional_sam.jobs.launch import submit
from functional_sam.jobs.profile import load_profile
from functional_sam.jobs.submission import Submission
from functional_sam.records import Run, RunDirectories, released
from functional_sam.training import pool


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
    assert [path.name for path in files[0]] == [f"figure-1{end}" for end in (".pdf", ".png", ".csv", "-tests.csv", ".json")]
    for ours, theirs in zip(*files, strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours.name
    record = json.loads(files[0][-1].read_text())
    assert record["files"][0] == "paper/figures/figure-1.pdf"
    assert [run["run"] for run in record["runs"]] == [config.name for config in here.configs]


@pytest.fixture
def blank(monkeypatch):
    """figure-1 without its axes, where only its numbers are looked at."""
    monkeypatch.setattr(figure_1, "_figure", lambda *_: plt.figure())


def line_of(overridden=False):
    plan = exhibits.ready("figure-1")
    return results.against_released(plan, as_written(exhibits.draw_plan(plan).frame), overridden)


def test_the_last_line_of_a_drawing(home, blank, capsys):
    configs = exhibits.needed("figure-1")
    do(configs)
    assert "not compared with a released result" in line_of()
    results.release_command(options())
    same = f"figure-1: yours {HEADLINE}; released {HEADLINE}; all {CELLS} cells"
    assert line_of() == same + " the same to the last digit"
    do(configs, of=lambda config, step: share(config, step) + 0.001)
    assert line_of().endswith(f"all {CELLS} cells within the tolerance")
    do(configs, "processor B, 64 cores", lambda config, step: share(config, step) + 0.03 * (config.task == "vision"))
    found = line_of()
    assert "\n" not in found
    assert f"138 of {CELLS} cells not within the tolerance (furthest: task vision, seed 0, step" in found
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


def test_a_drawing_with_settings_of_the_command_line_is_not_the_exhibits(home, capsys):
    """Neither its files nor what claims and report read are touched; where runs are is no such setting."""
    steps = ["training={steps: 200}"]
    do(exhibits.needed("figure-1"))
    do(exhibits.needed("figure-1", overrides=tuple(steps)))
    assert results.draw_command(options(overrides=["runtime.runs=runs"])) == 0
    before = {path: path.read_bytes() for path in (home / "paper").rglob("*.*")}
    assert home / "paper" / "figures" / "figure-1.json" in before
    assert results.draw_command(options(overrides=steps)) == 0
    assert "wrote paper/overridden/figures/figure-1.png" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    there = json.loads((home / "paper" / "overridden" / "figures" / "figure-1.json").read_text())
    assert there["overrides"] == steps
    assert "overrides" not in json.loads(before[home / "paper" / "figures" / "figure-1.json"])
    assert not list((home / "paper").glob("overridden/*.json"))  # claims reads paper/*/*.json


def test_fresh_redoes_what_is_named_later_too_and_says_how_to_go_on(home, monkeypatch):
    """Of a study later runs follow from what the first ones find; what lies under their names is of before."""
    configs, begun = exhibits.needed("figure-1"), []
    do(configs)
    stages = iter([configs[:2], configs, configs])
    monkeypatch.setattr(runs, "needed", lambda *_: next(stages))

    def execute(given, *_):
        begun.append([config for config in given if not Run(config).done])
        do(begun[-1])
        return []

    monkeypatch.setattr(pool, "execute", execute)
    assert runs.run_command(options(jobs=1, fresh=True, released=False)) == 0
    assert begun == [configs[:2], configs[2:]]

    def interrupted(*_):
        raise Interrupted(f"stopped by SIGINT; {pool.AGAIN}")

    monkeypatch.setattr(runs, "needed", lambda *_: configs)
    monkeypatch.setattr(pool, "execute", interrupted)
    with pytest.raises(Interrupted, match="SIGINT; `functional-sam run figure-1 --scale quick`, without --fresh, goes on"):
        runs.run_command(options(jobs=1, fresh=True, released=False))


def test_a_release_takes_no_settings_of_the_command_line(home):
    """It would be of the exhibit as it is stated all the same."""
    do(exhibits.needed("figure-1"))
    with pytest.raises(UserError, match=r"release figure-1: training\.steps=7: only runs as the exhibit states them"):
        results.release_command(options(overrides=["training.steps=7"]))
    assert not (home / "results").exists()


def test_check_compares_what_is_written(home, blank):
    do(exhibits.needed("figure-1"))
    results.release_command(options())
    assert results.check_command(options()) == 0
    csv = home / "results" / "figure-1-quick.csv"
    assert csv.read_text() == csv_text(exhibits.draw("figure-1").frame)
    write_text(csv, csv.read_text().replace("seed", "sead"))
    with pytest.raises(UserError, match=r"configs/exhibits/figure-1.yaml, tolerance: columns without a tolerance: sead"):
        results.check_command(options())


def test_what_was_released_of_later_cells_is_taken_too(home, blank, monkeypatch):
    """A study that goes cell by cell names the next ones when the present one is complete; the released records may be further."""
    configs = exhibits.needed("figure-1")
    do(configs)
    results.release_command(options())
    (home / "runs").rename(home / "elsewhere")
    plan = exhibits.planned

    def in_turn(name, scale="quick", overrides=(), source=None):
        whole = plan(name, scale, overrides, source)
        return whole if source is not None else dataclasses.replace(whole, configs=whole.configs[:2])

    monkeypatch.setattr(exhibits, "planned", in_turn)
    assert exhibits.take_released("figure-1", "quick", (), print) == configs[:2]
    assert all(Run(config).done for config in configs)


def test_released_runs_are_taken_and_never_checked_against_themselves(home, blank, capsys):
    do(exhibits.needed("figure-1"))
    results.release_command(options())
    (home / "runs").rename(home / "elsewhere")
    runs.plan_command(options(cluster=None))
    said = "6 of them are released: `functional-sam run figure-1 --scale quick --released` takes them"
    assert said in capsys.readouterr().out
    assert runs.run_command(options(jobs=1, fresh=False, released=True)) == 0
    assert "6 runs taken as they were released in results/runs/figure-1-quick.jsonl.gz" in capsys.readouterr().out
    runs.plan_command(options(cluster=None))
    assert "are released" not in capsys.readouterr().out
    assert exhibits.fresh("figure-1").frame.equals(exhibits.draw("figure-1").frame)  # of run directories
    with pytest.raises(UserError, match=r"6 of 6 runs are the released ones.*functional-sam run figure-1 --scale quick --fresh"):
        results.check_command(options())
    with pytest.raises(UserError, match="give one of them"):
        runs.run_command(options(jobs=1, fresh=True, released=True))


def test_an_unfinished_exhibit_goes_on_from_its_released_runs(home, blank, capsys):
    configs = exhibits.needed("figure-1")
    with pytest.raises(UserError, match="no run is complete"):
        results.release_command(options(unfinished=True))
    do(configs[:2])
    with pytest.raises(exhibits.NotComplete):
        results.release_command(options())
    assert results.release_command(options(unfinished=True)) == 0
    assert not (home / "results" / "figure-1-quick.csv").exists()  # nothing is drawn of it
    with pytest.raises(exhibits.NotComplete, match="4 of 6 runs are not complete"):
        exhibits.draw("figure-1")
    (home / "runs").rename(home / "elsewhere")
    assert exhibits.take_released("figure-1", "quick", (), print) == configs
    assert [Run(config).done for config in configs] == [True] * 2 + [False] * 4
    do(configs[2:3])
    results.release_command(options(unfinished=True))  # the two and the one that came
    assert set(released.load_pack("figure-1", "quick").runs) == {config.name for config in configs[:3]}
    (home / "runs").rename(home / "elsewhere-too")
    do(configs[3:])
    results.release_command(options(unfinished=True))  # what is released stays
    assert set(released.load_pack("figure-1", "quick").runs) == {config.name for config in configs}
    assert len(exhibits.draw("figure-1").frame) == CELLS / 8
    assert "`functional-sam run figure-1 --scale quick --released` goes on" in capsys.readouterr().out


def test_a_submission_takes_what_is_released_too(home, capsys):
    configs = exhibits.needed("figure-1")
    do(configs[:2])
    results.release_command(options(unfinished=True))
    (home / "runs").rename(home / "elsewhere")
    profile = home / "mine.yaml"
    profile.write_text("time: 60\n")
    submit("figure-1", "quick", str(profile), [], True, Console(width=200), released=True)
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-3%" in shown
    assert "nothing submitted: 4 of 6 known runs are missing" in shown
    assert not (home / "runs").exists()  # a dry run only counts them
    Submission(home / "job", "figure-1", "quick", [], load_profile(str(profile)), released=True).save()
    stage = Submission.load(home / "job")
    assert stage.missing() == configs[2:]  # as the job after a stage asks
    assert [run.released for run in map(Run, configs)] == [True] * 2 + [False] * 4
    assert "2 runs taken as they were released" in capsys.readouterr().out


def test_released_numbers_have_the_columns_that_are_drawn_now():
    """One column more, and `make figure-9` would say that it cannot be compared."""
    for path in sorted(released.results_directory().glob("*.csv")):
        name, scale = path.stem.rsplit("-", 1)
        drawn = stem(load_spec(name, scale))
        assert path.read_text().partition("\n")[0] == drawn.with_name(f"{drawn.name}.csv").read_text().partition("\n")[0], path.name
