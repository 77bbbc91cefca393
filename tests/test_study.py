"""The study behind the language-modeling exhibits: stages kept apart, grids extended, comparisons that are none refused."""

import copy
import dataclasses
import json
import math

import pandas as pd
import pytest

from functional_sam import exhibits
from functional_sam.config import compose
from functional_sam.data.tokenizer import BOS
from functional_sam.errors import UserError
from functional_sam.exhibits import study as module
from functional_sam.exhibits.comparison import DIAGNOSIS, check, comparison
from functional_sam.exhibits.figure_5 import power_law
from functional_sam.exhibits.spec import load_spec
from functional_sam.exhibits.study import (
    REGIMES,
    Cell,
    Entry,
    cells,
    check_grid,
    load_study,
    non_embedding,
    plan_cell,
    search,
)
from functional_sam.files import write_text
from functional_sam.models import Decoder
from functional_sam.records import Run
from functional_sam.sharpness import cost
from functional_sam.tasks import prepare

TASK = "language-0.014M"


def study_of(tmp_path, scale="quick"):
    return load_study(load_spec("table-2", scale), (f"runtime.runs={tmp_path}",))


def record(config, loss, tokens=10, sha256="s", step=None, norm_func=1.0):
    """A finished run, as training would leave it; loss None = diverged."""
    run = Run(config)
    run.directory.mkdir(parents=True, exist_ok=True)
    done = {"step": step or config.training.steps, "loss": loss, "bits_per_byte": loss, "tokens": tokens, "seconds": 1.0}
    if config.training.test:
        done |= {"test_loss": loss, "test_bits_per_byte": loss, "test_tokens": tokens}
    run.write("done.json", done if loss is not None else {"diverged": True, "error": "e", "loss": None})
    line = {"kind": "validation", "step": config.training.steps, "loss": loss}
    write_text(run.directory / "metrics.jsonl", json.dumps(line) + "\n" if loss is not None else "")
    run.write("provenance.json", {"commit": "c", "diff": "", "versions": {}, "data": {"data": "d", "sha256": sha256}})
    record = {}
    for key, path in DIAGNOSIS.items():
        place = record
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = norm_func if key == "norm_func" else 1.0
    if config.measure.curvature and loss is not None:
        run.write("curvature.json", record)


def missing(configs):
    return [config for config in configs if not Run(config).done]


def fill(study, cell, loss, entries=None):
    """Do the cell's runs stage by stage with made-up losses; every stage as the list of its runs."""
    stages = []
    while left := missing(plan_cell(study, cell, entries).configs):
        stages.append(left)
        for config in left:
            record(config, loss(config))
    return stages


def bowl(best_lr=0.02, best_rho=0.016, gain=0.0):
    """A loss with its optimum at best_lr and best_rho; every method is `gain` better than AdamW per unit of its name's length."""

    def loss(config):
        value = 4 + abs(math.log(config.optimizer.lr / best_lr)) + 0.01 * config.training.init_seed % 1
        if config.method.rho is not None:
            value += 0.1 * abs(math.log(config.method.rho / best_rho)) - gain
        return value

    return loss


# ---------------------------------------------------------------- what is planned


@pytest.mark.parametrize("scale", ["quick", "laptop"])
def test_sizes_are_those_of_the_models(scale, tmp_path):
    """The count by formula is that of the decoder itself, a size is named by it, and Chinchilla-style steps follow from it."""
    study = study_of(tmp_path, scale)
    for cell in cells(study, "chinchilla"):
        config = compose(cell.task, "adamw", scale)
        shape = config.model
        model = Decoder(config.data.vocab, shape.width, shape.depth, shape.heads, shape.length, shape.mlp)
        counted = sum(p.numel() for p in model.parameters()) - (config.data.vocab + shape.length) * shape.width
        assert counted == non_embedding(shape)
        assert float(cell.task.removeprefix("language-").removesuffix("M")) == pytest.approx(counted / 1e6, rel=0.04)
        tokens = cell.steps * config.training.batch * shape.length
        assert 20 * counted <= tokens < 20 * counted + config.training.batch * shape.length
    parameters = [non_embedding(compose(task, "adamw", scale).model) for task in study.sizes]
    assert parameters == sorted(parameters)
    if scale == "laptop":
        assert len(parameters) >= 3
        assert parameters[-1] / parameters[0] >= 8


@pytest.mark.parametrize("scale", ["quick", "laptop"])
@pytest.mark.parametrize("regime", REGIMES)
def test_main_tables_never_repeat_data(scale, regime, tmp_path, cache):
    """At most one epoch: every window of a run is met once."""
    study = study_of(tmp_path, scale)
    for cell in cells(study, regime):
        config = compose(cell.task, "adamw", scale, overrides=(f"runtime.cache={cache}",))
        assert cell.steps * config.training.batch <= prepare(config).data.train_windows(config.model.length)


def test_gradient_evaluations_are_those_of_the_methods(tmp_path):
    study = study_of(tmp_path)
    for name, entry in (study.methods | study.cheap | study.variants).items():
        assert entry.passes == pytest.approx(cost(entry.method or name, entry.options).gradients, abs=0.01)


def test_stages_tune_on_one_seed_and_report_others(tmp_path):
    study = study_of(tmp_path)
    (cell, *_) = cells(study, "fixed")
    stages = fill(study, cell, bowl())
    assert {config.method.name for config in stages[0]} == {"adamw"}  # the learning rate first
    for stage, seeds in zip(stages[:-1], (study.tuning_seeds, study.tuning_seeds[:1]), strict=True):
        assert {config.training.init_seed for config in stage} == set(seeds)
        assert {config.training.data_seed for config in stage} == set(seeds)
        assert not any(config.training.test for config in stage)
    assert {config.optimizer.lr for config in stages[1]} == {0.02}
    reported = stages[-1]
    assert all(config.training.test for config in reported)
    assert {config.training.init_seed for config in reported} == set(study.sizes[cell.task])
    assert [config.method.name for config in reported[:5]] == list(study.methods)  # all methods of the first seed first
    assert {config.method.rho for config in reported} == {None, 0.016}
    for config in reported:
        twin = next(c for c in reported if c.method.name == "adamw" and c.training.data_seed == config.training.data_seed)
        assert dataclasses.replace(config, method=twin.method) == twin


def test_two_exhibits_that_plan_a_cell_have_the_same_runs(tmp_path):
    one, two = study_of(tmp_path), study_of(tmp_path)
    (cell, *_) = cells(one, "fixed")
    fill(one, cell, bowl())
    assert [c.name for c in plan_cell(one, cell).configs] == [c.name for c in plan_cell(two, cell).configs]
    assert not missing(plan_cell(two, cell).configs)


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize(
    ("loss", "extensions", "values", "best", "edge"),
    [
        (lambda rho: abs(math.log(rho / 0.02)), 3, [0.01, 0.02, 0.04], 0.02, ""),  # interior at once
        (lambda rho: abs(math.log(rho / 0.0025)), 3, [0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04], 0.0025, ""),
        (lambda rho: -rho, 2, [0.01, 0.02, 0.04, 0.08, 0.16], 0.16, "high"),  # the cap, and it says so
        (lambda rho: rho, 1, [0.005, 0.01, 0.02, 0.04], 0.005, "low"),
        (lambda rho: None if rho > 0.015 else 3.0 - rho, 2, [0.005, 0.01, 0.02, 0.04], 0.01, ""),  # diverged: never the best
        (lambda rho: None, 1, [0.005, 0.01, 0.02, 0.04], 0.005, "low"),  # all diverged: towards AdamW
        (lambda rho: 3.0, 1, [0.005, 0.01, 0.02, 0.04], 0.005, "low"),  # equal: the smaller
    ],
)
def test_a_grid_grows_by_its_own_factor_until_its_best_is_interior(loss, extensions, values, best, edge, tmp_path):
    def config_of(value):
        return [compose(TASK, "sam", "quick", [{"method": {"rho": value}}], (f"runtime.runs={tmp_path}",))]

    while (result := search([0.01, 0.02, 0.04], config_of, extensions)).best is None:
        for config in missing(result.configs):
            record(config, loss(config.method.rho))
    assert (result.values, result.best, result.edge) == (values, best, edge)


@pytest.mark.parametrize("values", [[], [0.01, 0.02, 0.03], [0.02, 0.01], [0.0, 0.1], [-1.0]])
def test_a_grid_that_cannot_be_extended_is_refused(values):
    with pytest.raises(UserError, match="a log grid is needed"):
        check_grid(values, "here")


def test_a_study_that_reports_its_tuning_seed_is_refused(monkeypatch):
    content = module.read_yaml("studies", "language")
    content["scales"]["quick"]["sizes"][TASK] = [0, content["tuning_seeds"][1]]
    monkeypatch.setattr(module, "read_yaml", lambda *_: content)
    with pytest.raises(UserError, match="none of tuning_seeds"):
        load_study(load_spec("table-2", "quick"))


# ---------------------------------------------------------------- comparisons


def complete(study, cell=None, loss=None):
    cell = cell or cells(study, "fixed")[0]
    fill(study, cell, loss or bowl())
    return plan_cell(study, cell)


def test_what_is_compared_is_comparable(tmp_path):
    check([complete(study_of(tmp_path))])


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "data_seed", 7),  # another order of the data
        ("training", "init_seed", 7),
        ("optimizer", "lr", 0.1),  # a learning rate tuned for one method only
        ("training", "steps", 60),  # another number of updates
        ("training", "micro_batch", 8),
        ("data", "unique_tokens", 4096),
        ("data", "vocab", 512),
        ("training", "eval_rows", 8),
    ],
)
def test_methods_that_differ_in_more_than_the_method_are_refused(section, key, value, tmp_path):
    one = complete(study_of(tmp_path))
    config = one.reported["sam"][1]
    setattr(getattr(config, section), key, value)
    with pytest.raises(UserError, match="differ in more than the method"):
        check([one])


def test_tuning_on_a_reported_seed_or_on_the_test_split_is_refused(tmp_path):
    one = complete(study_of(tmp_path))
    for configs in one.reported.values():
        configs[0].training.init_seed = 1000
    with pytest.raises(UserError, match="reported on seed 1000, but tuned on it"):
        check([one])
    one = complete(study_of(tmp_path))
    one.rho["sam"].configs[0].training.test = True
    with pytest.raises(UserError, match="a tuning run reads the test split"):
        check([one])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "other"}, "text and tokenizer"),
        ({"tokens": 11}, "validation tokens"),
        ({"step": 60}, "60 updates instead of 545"),
    ],
)
def test_records_that_do_not_fit_together_are_refused(change, message, tmp_path):
    study = study_of(tmp_path)
    first, second = cells(study, "fixed")
    one, two = complete(study, first), complete(study, second)
    record(two.reported["sam"][0], 4.0, **change)
    with pytest.raises(UserError, match=message):
        check([one, two])


def test_a_diverged_run_counts(tmp_path):
    one = complete(study_of(tmp_path), loss=lambda c: None if c.method.name == "sam" and c.training.test else bowl(gain=0.5)(c))
    rows = comparison([one]).set_index("method")
    assert rows.loc["sam", "n"] == 3
    assert rows.loc["sam", "diverged"] == 3
    assert rows.loc["sam", "test_loss"] == math.inf
    assert rows.loc["sam", "verdict_adamw"] == "worse (diverged)"
    assert rows.loc["functional-sam", "minus_adamw"] == pytest.approx(-0.5)
    assert rows.loc["functional-sam", "verdict_adamw"] == "better"
    assert rows.loc["functional-sam", "minus_sam"] == -math.inf


def test_differences_are_paired_and_rho_carried_over_is_priced(tmp_path):
    study = study_of(tmp_path)
    first, second = cells(study, "fixed")
    planned = [complete(study, first, bowl(best_rho=0.004)), complete(study, second, bowl(best_rho=0.016, gain=-0.25))]
    frame = comparison(planned).set_index(["size", "method"])
    row = frame.loc[(second.task, "sam")]
    assert row.minus_adamw == pytest.approx(0.25)
    assert row.minus_adamw_stderr == pytest.approx(0, abs=1e-9)
    assert (row.verdict_adamw, frame.loc[(second.task, "precond-sam")].verdict_sam) == ("worse", "inconclusive")
    assert row.rho == 0.016
    assert row.rho_carried == 0.001 or row.rho_carried == 0.004
    assert row.lost_by_carrying == pytest.approx(0.1 * math.log(0.016 / row.rho_carried))
    assert math.isnan(frame.loc[(first.task, "sam")].lost_by_carrying)
    assert row.gradients == 2 * second.steps
    assert row.n_curvature == study.curvature_seeds == 1


def test_evaluation_rows_are_whole_documents_from_their_start(cache):
    """One document a row: BOS first and nowhere else, so that no document's start is hidden behind another's end."""
    config = compose(TASK, "adamw", "quick", overrides=(f"runtime.cache={cache}",))
    for inputs, _, _ in prepare(config).data.eval_batches("test", 64, config.model.length, config.training.eval_rows):
        assert (inputs[:, 0] == BOS).all()
        assert not (inputs[:, 1:] == BOS).any()


# ---------------------------------------------------------------- exhibits


def finish(name, tmp_path, loss, scale="quick"):
    overrides = (f"runtime.runs={tmp_path}",)
    while left := missing(exhibits.plan(name, scale, overrides)):
        for config in left:
            record(config, loss(config))
    return overrides


@pytest.mark.parametrize(("name", "regime"), [("table-2", "fixed"), ("table-3", "chinchilla")])
def test_tables_of_a_regime(name, regime, tmp_path, monkeypatch):
    overrides = finish(
        name, tmp_path, lambda c: 4 + 0.1 * c.training.init_seed + {"adamw": 0, "sam": 0.5}.get(c.method.name, -0.25)
    )
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    exhibit = exhibits.draw(name, overrides=overrides)
    assert set(exhibit.frame.regime) == {regime}
    assert list(dict.fromkeys(exhibit.frame["size"])) == list(study_of(tmp_path).sizes)
    assert "worse: SAM" in exhibit.verdict
    assert "Still at an end of the grid after all extensions" in exhibit.caption  # equal losses: the smallest, never interior
    text = (tmp_path / "paper" / "tables" / f"{name}.md").read_text()
    assert "3.59" in text  # the published pair stands below ours
    assert "not in level" in text


def test_a_cell_takes_its_learning_rate_from_another(tmp_path):
    study = study_of(tmp_path)
    (parent, *_) = cells(study, "fixed")
    fill(study, parent, bowl())
    cell = Cell(parent.task, "repeated", parent.steps, 16_384, parent)
    entries = {"adamw": Entry(passes=1), "sam": Entry()}
    stages = fill(study, cell, bowl(best_rho=0.064), entries)
    assert all(config.method.name == "sam" for config in stages[0])  # no learning rate of its own
    assert {config.optimizer.lr for stage in stages for config in stage} == {0.02}
    assert {config.data.unique_tokens for stage in stages for config in stage} == {16_384}


@pytest.mark.parametrize("seeds", [1, 2])
def test_figure_3_shows_every_radius_and_counts_what_diverged(seeds, tmp_path, monkeypatch):
    content = module.read_yaml("studies", "language")
    content["scales"]["quick"]["curve_seeds"] = seeds
    monkeypatch.setattr(module, "read_yaml", lambda *_: copy.deepcopy(content))

    def of(config):
        diverges = config.method.name == "precond-sam" and config.method.rho > 0.05
        return None if diverges else bowl(gain=0.25)(config)

    overrides = finish("figure-3", tmp_path, of)
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    exhibit = exhibits.draw("figure-3", overrides=overrides)
    study, data = study_of(tmp_path), exhibit.frame
    assert data[data["size"] == study.middle].seed.nunique() == seeds
    assert ("means over it and 1001, bands" in exhibit.caption) == (seeds > 1)
    best = data[data.best]
    assert set(best.rho) == {0.016}
    assert list(best.minus_adamw) == pytest.approx([-0.25] * len(best))
    lost = data[data.diverged]
    assert set(lost.method) == {"precond-sam"}
    assert (lost.minus_adamw == math.inf).all()
    chosen = [c for c in exhibits.plan("figure-3", overrides=overrides) if c.training.init_seed in study.tuning_seeds]
    assert chosen
    assert not any(config.training.test for config in chosen)  # the curves report nothing


def test_power_law_is_found_again_and_refused_below_three_sizes():
    sizes = [1e4, 3e4, 1e5, 3e5]
    part = pd.DataFrame({"parameters": sizes, "test_loss": [7 * n**-0.05 for n in sizes], "test_loss_stderr": [0.01] * 4})
    exponent, factor = power_law(part)
    assert (exponent.mean, factor) == (pytest.approx(0.05), pytest.approx(7.0))
    assert exponent.stderr == pytest.approx(0, abs=1e-6)
    assert power_law(part.head(2)) is None
    assert power_law(part.assign(test_loss=math.inf)) is None


def test_figure_5_finds_where_the_sign_changes(tmp_path, monkeypatch):
    def of(config):
        gain = -0.1 if not config.data.unique_tokens else 0.1 if config.method.name == "sam" else 0.0
        return bowl(gain=gain)(config)

    overrides = finish("figure-5", tmp_path, of)
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    exhibit = exhibits.draw("figure-5", overrides=overrides)
    study, data = study_of(tmp_path), exhibit.frame
    assert set(data.regime) == {*REGIMES, *(f"{epochs} epochs" for epochs in study.epochs)}
    repeated = data[data.regime == f"{study.epochs[-1]} epochs"]
    assert set(repeated.steps) == set(data[(data.regime == "fixed")].steps)  # the same budget
    assert list(repeated.epochs) == pytest.approx([study.epochs[-1]] * len(repeated))
    assert f"SAM from {study.epochs[0]} epochs" in exhibit.verdict
    assert "Functional-SAM never" in exhibit.verdict
    assert "stopped at its lowest validation loss: SAM at 32." in exhibit.verdict
    assert "Hollow: as if every run" in exhibit.caption
    assert "no fit: fewer than 3 sizes" in exhibit.caption


def test_table_8_and_figure_7_compare_at_the_time_each_method_takes(tmp_path, monkeypatch):
    steps = study_of(tmp_path).fixed_steps

    def of(config):  # a step more is worth 0.001, a method 0.05: not its time, except where it takes little
        own = {"sam": 0.05, "momentum-functional-sam": 0.05}.get(config.method.name, 0.0)
        return 4 + 0.1 * config.training.init_seed % 1 - own - 0.001 * (config.training.steps - steps)

    overrides = finish("table-8", tmp_path, of)
    assert not missing(exhibits.plan("figure-7", overrides=overrides))  # the same runs
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    frame = exhibits.draw("table-8", overrides=overrides).frame
    equal = frame[frame.block == "equal compute"].set_index("method")
    assert equal.loc["adamw 2 x", "steps"] == 2 * steps
    assert equal.loc["adamw 1.29 x", "steps"] == round(1.29 * steps)
    assert equal.loc["sam", "minus_adamw"] == pytest.approx(-0.05)
    assert equal.loc["sam", "minus_baseline"] == pytest.approx(-0.05 + 0.001 * steps)
    assert equal.loc["momentum-functional-sam", "baseline"] == "AdamW, 1.29 x"
    assert equal.loc["momentum-functional-sam", "minus_baseline"] == pytest.approx(-0.05 + 0.001 * (round(1.29 * steps) - steps))
    assert set(frame[frame.block == "variants"].method) == set(study_of(tmp_path).variants)
    assert set(frame[frame.block == "variants"].steps) == {steps}
    points = exhibits.draw("figure-7", overrides=overrides).frame.set_index("method")
    assert points.loc["sam", "minus_adamw"] == pytest.approx(-0.05)
    assert points.loc["sam", "cost"] == pytest.approx(2.0, abs=0.2)
    assert set(points.index) == set(equal.index) - {"adamw"} | set(study_of(tmp_path).variants)
