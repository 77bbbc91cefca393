"""A study that is not finished, drawn as far as it goes; its released records, which exhibits share; commands on all of a kind."""

import argparse
import gzip
import json
import math

import pandas as pd
import pytest
from test_study import bowl, fill, finish, missing, record, study_of

from functional_sam import exhibits
from functional_sam.commands import groups, results
from functional_sam.config import to_yaml
from functional_sam.errors import UserError
from functional_sam.exhibits import figure_3, figure_7  # noqa: F401 - reads the real results/benchmark, also where it is imported later
from functional_sam.exhibits import study as module
from functional_sam.exhibits.spec import load_spec
from functional_sam.exhibits.study import cells, configs_of, load_study, plan_cell, plan_cells, repeated, smallest_of_the_best
from functional_sam.exhibits.table_8 import parts
from functional_sam.files import write_text
from functional_sam.records import Run, released

SMALL = "language-0.006M"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory in which runs/, paper/ and results/ are made, with the study of scale quick going cell by cell."""
    content = module.read_yaml("studies", "language")
    content["scales"]["quick"] |= {"in_turn": True, "extensions": 0, "fixed_steps": 300, "variants_shown": []}
    content["scales"]["quick"]["epochs"] = [8, 32]
    content["variants"] = {"gnp": {}}
    monkeypatch.setattr(module, "read_yaml", lambda *_: json.loads(json.dumps(content)))
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    for place in ("functional_sam.records.released", "functional_sam.exhibits", "functional_sam.exhibits.check"):
        monkeypatch.setattr(f"{place}.results_directory", lambda: tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(configs, loss=None):
    for config in configs:
        if not Run(config).done:
            record(config, (loss or bowl())(config))
            write_text(Run(config).directory / "config.yaml", to_yaml(config))


def do_cells(study, wanted, seeds=None):
    for cell in wanted:
        while left := missing(plan_cell(study, cell, seeds=seeds).configs):
            do(left)


def options(exhibit, **more):
    return argparse.Namespace(exhibit=exhibit, scale="quick", overrides=[], no_notebook=True, **more)


def study_here():
    return load_study(load_spec("table-2", "quick"))


def test_cells_in_turn_keep_what_exists_a_complete_smaller_study(tmp_path):
    study = study_of(tmp_path, "laptop")
    assert study.in_turn
    wanted = cells(study, "chinchilla")
    assert {c.task for c in configs_of(plan_cells(study, wanted))} == {wanted[0].task}
    fill(study, wanted[0], bowl())
    assert [one.complete for one in plan_cells(study, wanted)] == [True, False]


def test_what_is_complete_is_drawn_and_the_caption_says_what_is_not(home):
    study = study_here()
    small, large = cells(study, "fixed")
    with pytest.raises(exhibits.NotComplete, match="functional-sam run table-2 --scale quick"):
        exhibits.draw("table-2")
    do_cells(study, [small])
    for name in ("table-2", "table-1", "figure-3", "figure-5"):
        exhibit = exhibits.draw(name)
        assert set(exhibit.frame["size"]) == {SMALL}
        assert "because their fixed length runs are not complete: 0.014M." in exhibit.caption
    with pytest.raises(exhibits.NotComplete):
        exhibits.draw("table-3")
    with pytest.raises(exhibits.NotComplete):
        exhibits.draw("table-8")  # its own size is the larger one
    assert missing(exhibits.plan("table-2"))  # the next cell is still planned
    do_cells(study, [large])
    caption = exhibits.draw("table-2").caption
    assert "not complete" not in caption
    assert "width 16, depth 2), 0.014M" in caption


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        ([[5.0, 5.1, 5.2], [4.0, 4.1, 4.2], [3.9, 4.2, 4.1]], 1),  # -0.1, 0.1, -0.1: within one standard error
        ([[5.0, 5.1, 5.2], [4.0, 4.1, 4.2], [3.9, 4.0, 4.0]], 2),  # -0.1, -0.1, -0.2: not
        ([[4.0, 4.25], [4.125, 4.125], [4.0, 4.0]], 0),  # 0, 0.25 above the last: mean and standard error are both 0.125
        ([[4.0], [3.999]], 1),  # one run a value: the lowest
        ([[math.inf, 4.0], [4.0, 4.0]], 1),
        ([[math.inf, 4.0], [math.inf, 4.0]], 0),
    ],
)
def test_the_smallest_of_equally_good_rates(losses, index):
    assert smallest_of_the_best(losses) == index


def test_the_functional_path_is_compared_at_equal_rho_over_seeds():
    """By hand: -0.2 and -0.4 at 0.1, twice 0.2 at 0.2; nothing of one seed, nor of a radius that one method alone has."""
    losses = {
        ("sam", 0.1): (4.0, 5.0), ("functional-sam", 0.1): (3.8, 4.6), ("sam", 0.2): (4.0, 5.0),
        ("functional-sam", 0.2): (4.2, 5.2), ("sam", 0.4): (4.0, 5.0),
    }  # fmt: skip
    rows = [
        {"size": "language-1M", "method": method, "rho": rho, "seed": seed, "validation_loss": values[seed]}
        for (method, rho), values in losses.items()
        for seed in (0, 1)
    ]
    rows += [{"size": "language-2M", "method": m, "rho": 0.1, "seed": 0, "validation_loss": 1.0} for m in ("sam", "functional-sam")]
    (sentence,) = figure_3.at_equal_rho(pd.DataFrame(rows))
    assert sentence == (
        "Functional-SAM minus SAM at equal rho, 1M (n=2, paired, 95 %): -0.3000 +- 0.1000 at 0.1 (inconclusive), "
        "+0.2000 +- 0.0000 at 0.2 (worse)."
    )


def test_repeated_data_does_not_wait_for_the_other_regime(home):
    study = study_here()
    do_cells(study, cells(study, "fixed"))
    epochs = {config.data.unique_tokens for config in exhibits.plan("figure-5")}
    assert len(epochs) > 1
    assert "repeated data of 8, 32 epochs" in exhibits.draw("figure-5").caption
    do_cells(study, repeated(study)[1:], study.middle_seeds)  # not in turn: drawn all the same
    exhibit = exhibits.draw("figure-5")
    assert "32 epochs" in set(exhibit.frame.regime)
    assert "repeated data of 8 epochs" in exhibit.caption
    do_cells(study, repeated(study), study.middle_seeds)
    exhibit = exhibits.draw("figure-5")
    assert "repeated data of" not in exhibit.caption
    assert "Chinchilla-style runs are not complete: 0.006M, 0.014M" in exhibit.caption


def test_table_8_is_drawn_block_by_block(home):
    study = study_here()
    blocks = []
    while left := missing(exhibits.plan("table-8")):
        do(left)
        try:
            frame = exhibits.draw("table-8").frame
        except exhibits.NotComplete:
            assert parts(study).cheap is None or missing(exhibits.plan("table-8"))
            continue
        if not blocks or set(frame.block) != blocks[-1]:
            blocks.append(set(frame.block))
            exhibits.draw("figure-7")
    assert blocks == [{"equal compute"}, {"equal compute", "variants"}, {"equal compute", "variants", "repeated data"}]
    assert "not complete" not in exhibits.draw("table-8").caption


def test_exhibits_of_a_study_share_one_pack_and_redraw_from_it(home, monkeypatch):
    study = study_here()
    do_cells(study, cells(study, "fixed"))
    do_cells(study, cells(study, "chinchilla")[:1])
    assert results.release_command(options("table-2")) == 0
    path = home / "results" / "runs" / "language-quick.jsonl.gz"
    names = [json.loads(line)["run"] for line in gzip.decompress(path.read_bytes()).splitlines()[1:]]
    assert len(names) == len(set(names))
    both = plan_cells(study, [*cells(study, "fixed"), *cells(study, "chinchilla")[:1]])
    assert {config.name for one in both for config in one.configs} == set(names)  # table-3's complete cell too
    here = {name: exhibits.draw(name).frame for name in ("table-1", "table-2", "table-3")}
    (home / "runs").rename(home / "elsewhere")
    for name, frame in here.items():
        exhibit = exhibits.draw(name)
        assert exhibit.source == "results/runs/language-quick.jsonl.gz"
        assert exhibit.frame.equals(frame)
    # Another machine has one cell more and lacks the others: its release adds to what is there.
    do_cells(study, cells(study, "fixed")[:1])
    with pytest.raises(UserError, match="only complete runs can be released"):
        results.release_command(options("table-2"))  # the pack has more of it than is here
    assert str(home) not in gzip.decompress(path.read_bytes()).decode()


def test_a_release_keeps_what_others_made(home):
    study = study_here()
    fixed = cells(study, "fixed")
    do_cells(study, fixed)
    do_cells(study, repeated(study), study.middle_seeds)
    results.release_command(options("figure-5"))
    before = set(released.load_pack("language", "quick").runs)
    (home / "runs").rename(home / "elsewhere")
    do_cells(study, fixed)
    do_cells(study, cells(study, "chinchilla"))
    results.release_command(options("table-3"))
    after = released.load_pack("language", "quick")
    assert before < set(after.runs)
    data = {content["files"]["provenance.json"]["data"]["sha256"] for content in after.runs.values()}
    assert data == {"s"}


# ---------------------------------------------------------------- all of a kind


def test_members():
    assert exhibits.members("figure-1", "quick") == ["figure-1"]
    assert [*exhibits.members("figures", "quick"), *exhibits.members("tables", "quick")] == exhibits.known()
    assert exhibits.members("tables", "paper") == ["table-1", "table-2", "table-3", "table-8"]
    with pytest.raises(UserError, match="none of the figures has a scale 'cloud': laptop, paper, quick"):
        exhibits.members("figures", "cloud")


def test_all_of_a_kind_plan_every_run_once(home):
    names = [config.name for config in exhibits.plan("tables")]
    assert len(names) == len(set(names))
    assert set(names) == {config.name for name in exhibits.members("tables", "quick") for config in exhibits.plan(name)}


def test_each_goes_on_and_says_what_was_left_out(capsys):
    seen = []

    def command(one):
        seen.append(one.exhibit)
        if one.exhibit == "table-2":
            raise exhibits.NotComplete("table-2 at scale laptop: nothing")
        return 1 if one.exhibit == "table-3" else 0

    assert groups.each(command, options("tables")) == 1
    assert seen == exhibits.members("tables", "quick")
    assert "left out: table-2 at scale laptop: nothing" in capsys.readouterr().out

    def none(one):
        raise exhibits.NotComplete("nothing")

    with pytest.raises(UserError, match="nothing to draw of the tables"):
        groups.each(none, options("tables"))
    with pytest.raises(exhibits.NotComplete):
        groups.each(none, options("table-2"))


@pytest.mark.parametrize("name", ["table-1", "table-2", "table-3", "table-8", "figure-3", "figure-5", "figure-7"])
def test_the_published_sizes_are_drawn_by_the_same_code(name, tmp_path, monkeypatch):
    """Made-up records of the whole study at scale paper: no curvature there, one seed of the largest model."""
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    overrides = finish(name, tmp_path, bowl(best_lr=0.0016, best_rho=0.03, gain=0.1), "paper")
    exhibit = exhibits.draw(name, "paper", overrides)
    assert "nan" not in exhibit.verdict
    assert "nan" not in exhibit.caption
    assert "paper" in exhibit.caption
