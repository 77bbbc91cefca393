"""Tuning, reporting and comparing: equal trials, seeds kept apart, numbers of the records, verdicts of the test."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
from made_up import MadeUp, bowl
from scipy import stats

from functional_sam.config import configs_directory, load, to_yaml
from functional_sam.errors import UserError
from functional_sam.sharpness.methods import cost
from functional_sam.study import design
from functional_sam.study.compare import (
    Estimate,
    Verdict,
    equivalent,
    estimate,
    family,
    holm,
    judged,
    paired_difference,
    unpaired_difference,
    verdict,
)
from functional_sam.study.design import LR, RHO, Trial, load_study, make, steps_of, trials, tuning_seeds
from functional_sam.study.report import by_seed, check, difference, frame, judge
from functional_sam.study.tune import foreseen, plan_cell, plan_cells, search, smallest_of_the_best, todo
from functional_sam.tasks import TASKS

# ---------------------------------------------------------------- comparing


def test_interval_and_p_are_those_of_the_t_test():
    values, baseline = [1.0, 1.2, 0.9, 1.4, 1.1], [1.1, 1.1, 1.2, 1.5, 1.3]
    found = paired_difference(values, baseline)
    test = stats.ttest_rel(values, baseline)
    assert found.p == pytest.approx(test.pvalue, rel=1e-12)
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-12)


def test_holm_is_the_closed_test():
    """A hypothesis falls when every set of hypotheses that holds it does, by Bonferroni: Holm's procedure by its definition."""
    for ps in ([0.01, 0.04, 0.03, 0.2], [0.5, 0.5], [0.001], [0.02, 0.02, 0.02], [0.9, 0.0, 0.04]):
        numbers = range(len(ps))
        closed = [
            max(
                min(1.0, size * min(ps[j] for j in chosen))
                for size in range(1, len(ps) + 1)
                for chosen in itertools.combinations(numbers, size)
                if i in chosen
            )
            for i in numbers
        ]
        assert holm(ps) == pytest.approx(closed)


def test_what_is_still_to_come_of_a_family_counts_as_null():
    for ps in ([0.01, 0.04, 0.03, 0.2], [0.004], []):
        for more in (0, 1, 7):
            assert holm(ps, more) == pytest.approx(holm([*ps, *[1.0] * more])[: len(ps)])
    clear = Estimate(-1.0, 0.1, 4)  # p .002
    assert judged([clear], more=20) == [Verdict.BETTER]
    assert judged([clear], more=30) == [Verdict.OPEN]


def test_no_difference_is_two_one_sided_tests():
    values = [0.001, -0.002, 0.0005, 0.0015, -0.001]
    for margin in (*np.linspace(0.0005, 0.003, 26), 0.01):
        below = stats.ttest_1samp(values, margin, alternative="less").pvalue
        above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        assert equivalent(estimate(values), margin) == (max(below, above) < 0.05)


def test_detectable_effect_is_found_as_often_as_it_says():
    """By simulation: of experiments with just that effect, about 4 in 5 find it (a shifted t for the true law: a little off)."""
    generator = np.random.default_rng(0)
    n, sigma = 8, 1.0
    effect = Estimate(0.0, sigma / math.sqrt(n), n).detectable
    drawn = generator.normal(effect, sigma, size=(4000, n))
    assert float((stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean()) == pytest.approx(0.8, abs=0.03)


def test_the_detectable_effect_is_that_of_the_noncentral_t():
    """Of three seeds 5.65 standard errors, where the sum of two quantiles of the central t says 5.36."""
    assert [Estimate(0.0, 1.0, n).detectable for n in (3, 5, 8)] == pytest.approx([5.653, 3.761, 3.270], abs=1e-3)


@pytest.mark.parametrize(
    ("values", "lower", "word"),
    [
        ([-0.1, -0.11, -0.12], True, Verdict.BETTER),
        ([-0.1, -0.11, -0.12], False, Verdict.WORSE),
        ([0.1, -0.1, 0.2], True, Verdict.OPEN),
        ([0.0001, -0.0001, 0.0], True, Verdict.SAME),
        ([0.0, 0.0, 0.0], True, Verdict.OPEN),  # nothing was seen that could have differed
        ([0.00625] * 3, False, Verdict.OPEN),  # one text of 160 in every seed is no spread
        ([math.inf, 0.1, 0.1], True, Verdict.LOST),
        ([-math.inf, 0.1, 0.1], True, Verdict.WON),
        ([-5.0], True, Verdict.OPEN),
    ],
)
def test_verdicts(values, lower, word):
    assert verdict(estimate(values), lower_is_better=lower, margin=0.005) is word


def test_two_diverged_runs_are_equal_and_one_is_worse():
    assert paired_difference([math.inf, 1.0], [math.inf, 1.0]).mean == 0.0
    assert paired_difference([math.inf, 1.0], [2.0, 1.0]).mean == math.inf
    each = paired_difference([math.inf, 1.0, 2.0], [1.0, math.inf, 2.0])  # at a seed of its own: a difference without a mean
    assert math.isnan(each.mean)
    assert (each.stderr, each.n, each.p) == (math.inf, 3, 1.0)


def test_a_family_raises_the_bar():
    one = Estimate(-0.1, 0.03, 5)  # p = 0.029
    assert one.p < 0.05
    assert judged([one])[0] is Verdict.BETTER
    assert judged([one] * 2)[0] is Verdict.OPEN


@pytest.mark.parametrize("sizes", [(3, 8), (8, 3), (5, 5)])
def test_samples_of_two_sizes_are_compared_by_welchs_test(sizes):
    draw = np.random.default_rng(0)
    values, others = (draw.normal(mean, spread, n) for mean, spread, n in zip((1.0, 0.2), (0.3, 0.9), sizes, strict=True))
    found, test = unpaired_difference(values, others), stats.ttest_ind(values, others, equal_var=False)
    assert (found.df, found.p) == pytest.approx((test.df, test.pvalue))
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.n == min(sizes)


# ---------------------------------------------------------------- planning and tuning


@pytest.fixture
def study():
    return copy.deepcopy(load_study("language", "quick"))


def finish(study, cell, source):
    """Do a cell stage by stage; the runs of every stage."""
    stages = []
    while True:
        configs = [config for config in plan_cell(study, cell, source).configs if not source.done(config)]
        if not configs:
            return stages
        stages.append(configs)
        source.do(configs)


@pytest.mark.parametrize("scale", ["quick", "laptop", "paper"])
def test_every_cell_gives_equal_trials_and_keeps_seeds_apart(scale):
    study = load_study("language", scale)
    for cell in study.cells.values():
        numbers = {len(trials(study, cell, name, 0.01)) for name in cell.entries if design.tuned(study, cell, name)}
        assert len(numbers) == 1 or not cell.choose, cell.name
        assert not set(tuning_seeds(study, cell)) & set(cell.seeds)
        config = make(study, cell, cell.entries[0], Trial(((LR, 0.01),)), cell.seeds[0], reported=True)
        assert config.training.test
        assert config.optimizer.warmup_steps == round(study.warmup * config.training.steps)
        if cell.tokens_per_parameter:
            tokens = config.training.steps * config.training.batch * config.model.length
            wanted = cell.tokens_per_parameter * TASKS[config.kind].size(config)
            assert wanted <= tokens < wanted + config.training.batch * config.model.length


def test_a_longer_baseline_has_a_schedule_of_its_own_and_the_data_of_the_others(study):
    """AdamW with twice the steps: warm-up and evaluations by its length, and twice the epochs of what repeats."""
    cell = dataclasses.replace(study.cells["repeated-32"], entries=["adamw", "adamw-double"])
    own, longer = (make(study, cell, name, Trial(((LR, 0.01),)), 5, reported=True) for name in cell.entries)
    steps = steps_of(study, cell)
    for config, times in ((own, 1), (longer, 2)):
        assert config.training.steps == times * steps
        assert config.optimizer.warmup_steps == round(study.warmup * times * steps)
        assert config.training.eval_every == times * steps // study.evaluations
        assert config.data.unique_tokens == steps * config.training.batch * config.model.length // cell.epochs


def test_a_radius_is_in_the_entrys_unit_and_warms_up_with_the_rate(study):
    cell = dataclasses.replace(study.cells["fixed-0.014M"], entries=["adamw", "sam", "asam", "sam-warmup"])
    radii = {name: [trial.get(RHO) for trial in trials(study, cell, name, 0.02)] for name in ("sam", "asam")}
    assert radii["asam"] == pytest.approx([10 * rho for rho in radii["sam"]])
    assert set(radii["sam"]) == set(cell.rho)
    config = make(study, cell, "sam-warmup", trials(study, cell, "sam-warmup", 0.02)[0], 0)
    assert config.method.options["warmup_steps"] == config.optimizer.warmup_steps == round(study.warmup * config.training.steps)


def test_no_run_at_the_published_sizes_reads_a_text_twice_unless_it_is_to():
    """A file of C4 has about 150 million tokens."""
    study = load_study("language", "paper")
    for cell in study.cells.values():
        for name in cell.entries:
            config = make(study, cell, name, Trial(((LR, 0.01),)), cell.seeds[0], reported=True)
            if config.data.unique_tokens is None:
                tokens = config.training.steps * config.training.batch * config.model.length
                assert tokens <= config.data.files * 150e6, (cell.name, name)


def test_stages_follow_each_other(study):
    cell, source = study.cells["fixed-0.014M"], MadeUp(bowl())
    centre, first, tried, reported = finish(study, cell, source)
    assert {config.method.name for config in centre + first} == {"adamw"}
    assert "adamw" not in {config.method.name for config in tried}
    assert {config.training.init_seed for config in centre + first + tried} == set(study.tuning_seeds)
    assert not any(config.training.test for config in centre + first + tried)
    assert {(config.training.init_seed, config.training.data_seed) for config in reported} == {(seed, seed) for seed in cell.seeds}
    assert len(reported) == len(cell.entries) * len(cell.seeds)
    one = plan_cell(study, cell, source)
    assert one.complete
    assert one.centre.best.get(LR) == 0.02
    assert one.searches["sam"].best.get(RHO) == 0.05
    assert one.searches["sam"].edges == {"method.rho": "high"}
    assert [config.training.init_seed for config in reported] == sorted(config.training.init_seed for config in reported)


def test_methods_take_the_weight_decay_that_the_baseline_chose(study):
    """Their trials are as many as before, all at its choice; a placebo has it too, an entry with a grid of its own keeps that."""

    def loss(config):
        return bowl()(config) - (config.optimizer.weight_decay == 0.3)

    study.entries["sam"].grid = {"optimizer.weight_decay": [0.1], RHO: [0.005, 0.05]}
    cell = dataclasses.replace(study.cells["fixed-0.014M"], entries=["adamw", "placebo", "sam", "functional-sam"])
    source = MadeUp(loss)
    finish(study, cell, source)
    one = plan_cell(study, cell, source)
    taken = {name: {c.optimizer.weight_decay for c in configs} for (name, _), configs in one.reported.items()}
    assert taken == {"adamw": {0.3}, "placebo": {0.3}, "sam": {0.1}, "functional-sam": {0.3}}
    assert {c.optimizer.weight_decay for c in one.searches["functional-sam"].configs} == {0.3}
    assert len(one.searches["functional-sam"].trials) == len(one.searches["adamw"].trials)
    assert len(foreseen(study, [cell])) == len(one.configs)
    study.inherit = []
    assert {c.optimizer.weight_decay for c in plan_cell(study, cell, source).searches["functional-sam"].configs} == {0.1}


def test_the_centre_grows_its_grid_until_the_best_is_inside(study):
    study.extensions = 3
    cell, source = study.cells["fixed-0.014M"], MadeUp(bowl(best_lr=0.07))
    finish(study, cell, source)
    best = plan_cell(study, cell, source).centre
    assert best.best.get(LR) == 0.08
    assert len(best.trials) == 5
    study.extensions = 0
    assert plan_cell(study, cell, source).centre.best.get(LR) == 0.04
    study.extensions, far = 1, MadeUp(bowl(best_lr=0.5))
    while far.do(plan_cell(study, cell, far).centre.configs):
        pass
    assert [trial.get(LR) for trial in plan_cell(study, cell, far).centre.trials] == [0.01, 0.02, 0.04, 0.08]


def test_a_diverged_trial_never_wins_and_a_mean_counts(study):
    def loss(config):
        if config.method.rho == 0.05 and config.training.init_seed == study.tuning_seeds[0]:
            return None
        return bowl()(config) - (config.method.rho == 0.05)

    cell, source = study.cells["fixed-0.014M"], MadeUp(loss)
    finish(study, cell, source)
    assert plan_cell(study, cell, source).searches["sam"].best.get(RHO) == 0.005


def test_the_best_trial_has_the_lowest_mean(study):
    """Neither the lowest loss of one seed, nor of the worst seed, nor the lowest median."""
    losses = {0.005: (1.0, 4.1, 1.1), 0.05: (1.2, 2.6, 2.1), 0.5: (2.3, 2.3, 2.3)}
    study.tuning_seeds = [1000, 1001, 1002]
    tried = [Trial(((LR, 0.02), (RHO, rho))) for rho in losses]
    cell, source = study.cells["fixed-0.014M"], MadeUp(lambda config: losses[config.method.rho][config.training.init_seed - 1000])
    source.do(search(study, cell, "sam", tried, source).configs)
    found = search(study, cell, "sam", tried, source)
    assert found.scores == list(map(list, losses.values()))
    assert found.best == tried[1]


def test_trials_are_judged_by_their_best_checkpoint_where_it_counts(study):
    """A trial tests nothing, so its summary has no best: its evaluations say it. The last checkpoint misleads here."""

    class Overfits(MadeUp):
        def metrics(self, config, kind=None):
            if kind != "validation":
                return super().metrics(config, kind)
            return [{"step": 7, "loss": self.loss(config)}, {"step": 9, "loss": 20.0 - self.loss(config)}]

        def summary(self, config):
            return super().summary(config) | {"loss": 20.0 - self.loss(config)}

    study.cells["fixed-0.014M"].entries = ["adamw"]
    cell = study.cells["repeated-32"]
    source = Overfits(bowl(best_lr=0.02, best_rho=0.5))
    finish(study, cell, source)
    one = plan_cell(study, cell, source)
    assert not any(config.training.test_best for config in one.searches["sam"].configs)
    best = min(
        one.searches["sam"].trials, key=lambda trial: abs(math.log(trial.get(RHO) / 0.5)) + abs(math.log(trial.get(LR) / 0.02))
    )
    assert one.searches["sam"].best == best
    assert all(math.isfinite(value) for values in one.searches["sam"].scores for value in values)


def test_one_learning_rate_is_given_and_not_run(study):
    """The trials around it are known at once."""
    cell = dataclasses.replace(study.cells["fixed-0.014M"], lr=[0.02])
    one = plan_cell(study, cell, MadeUp(bowl()))
    assert one.centre.best == Trial(((LR, 0.02),))
    assert not one.centre.configs
    assert list(one.searches) == ["adamw"]  # the others wait for its weight decay
    assert one.searches["adamw"].configs
    study.inherit = []
    assert list(plan_cell(study, cell, MadeUp(bowl())).searches) == cell.entries


def test_nothing_is_chosen_in_a_sweep(study):
    cell, source = study.cells["dose-0.014M"], MadeUp(bowl())
    finish(study, cell, source)
    one = plan_cell(study, cell, source)
    assert {trial.get(RHO) for name, trial in one.reported if name == "sam"} == set(cell.rho)
    assert [trial.get(LR) for name, trial in one.reported if name == "placebo"] == [0.02]
    assert all(config.training.test for configs in one.reported.values() for config in configs)


def test_cells_share_runs_that_are_the_same(study):
    """The sweep over radii holds the batch panel's runs at the radius of both."""
    source = MadeUp(bowl())
    for name in ("batch-4", "dose-0.014M"):
        finish(study, study.cells[name], source)
    batch, dose = (plan_cell(study, study.cells[name], source) for name in ("batch-4", "dose-0.014M"))
    shared = {config.name for config in batch.configs} & {config.name for config in dose.configs}
    assert len(shared) >= 6 * 3


def test_a_study_in_turn_stops_at_the_first_cell_that_is_not_complete(study):
    study.in_turn = True
    cells = study.part("batch")
    source = MadeUp(bowl())
    assert todo(plan_cells(study, cells, source)) == plan_cell(study, cells[0], source).configs
    finish(study, cells[0], source)
    assert {c.training.batch for c in todo(plan_cells(study, cells, source))} == {4, 32}


def test_the_runs_of_all_stages_are_foreseen(study):
    """As many as there are in the end, when the centre's grid did not grow."""
    source, cells = MadeUp(bowl()), study.part("fixed", "compute")
    while any(source.do(one.configs) for one in plan_cells(study, cells, source)):
        pass
    wanted = {config.name for one in plan_cells(study, cells, source) for config in one.configs}
    found = foreseen(study, cells)
    assert len(found) == len(wanted)
    assert sum(config.training.steps for config in found) == sum(source.records[name][0].training.steps for name in wanted)


def test_cells_can_be_named_on_the_command_line():
    study = load_study("language", "paper", ("cells=fixed-23.9M,chinchilla-23.9M", "training.eval_batch=8"))
    assert [cell.name for cell in study.part("fixed", "chinchilla")] == ["fixed-23.9M", "chinchilla-23.9M"]
    assert {config.task for config in foreseen(study, study.part("fixed"))} == {"language-23.9M"}
    assert {config.training.eval_batch for config in foreseen(study, study.part("fixed"))} == {8}
    with pytest.raises(UserError, match=r"fixed-23\.8M.*fixed-23\.9M"):
        load_study("language", "paper", ("cells=fixed-23.8M",))


@pytest.mark.parametrize("name", [path.stem for path in (configs_directory() / "studies").glob("*.yaml")])
def test_a_run_has_the_same_name_when_its_config_is_read_back(name, tmp_path):
    """Also where a study says 1 for 1.0: its worker would else do another run."""
    for scale in ("quick", "laptop", "paper"):
        study = load_study(name, scale)
        for cell in study.cells.values():
            lr = Trial(((LR, 0.01),))
            config = make(study, cell, cell.entries[-1], lr, 0, reported=True)
            (tmp_path / "config.yaml").write_text(to_yaml(config))
            assert load(tmp_path / "config.yaml").name == config.name


def test_smallest_rate_within_one_standard_error():
    assert smallest_of_the_best([[1.0, 1.2], [0.99, 1.21], [2.0, 2.0]]) == 0
    assert smallest_of_the_best([[1.5, 1.6], [0.99, 1.2]]) == 1
    assert smallest_of_the_best([[2.0, 2.1, 2.0], [0.1, 2.2, 0.1]]) == 1  # of the lowest mean, though not in its worst seed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entries": ["adamw", "samm"]}, "did you mean 'sam'"),
        ({"seeds": [1000]}, "tuned on and reported"),
        ({"seeds": [0, 1, 1]}, "seeds=[0, 1, 1]: one is there twice"),
        ({"tuning_seeds": [1000, 1000]}, "tuning_seeds=[1000, 1000]: one is there twice"),
        ({"steps": None}, "one of the two"),
        ({"lr": [0.1, 0.2, 0.3]}, "log grid"),
        ({"lr": [], "lr_of": "nowhere"}, "nowhere"),
        ({"rho": [0.05]}, "same number of trials: adamw 2, sam 1"),
        ({"settings": {"optimizer.warmup_steps": 40}}, "optimizer.warmup_steps is made by the study"),
        ({"settings": {"data.unique_tokens": 900}}, "data.unique_tokens is made by the study"),
    ],
)
def test_bad_cells_are_refused(study, change, words):
    cell = study.cells["fixed-0.014M"]
    for key, value in change.items():
        setattr(cell, key, value)
    with pytest.raises(UserError, match=r"fixed-0\.014M") as error:
        design._check(study, cell, "configs/studies/language.yaml, cell fixed-0.014M")
    assert words in str(error.value)


def test_an_entry_cannot_set_what_the_study_makes_of_each_run(study):
    """It would have been overwritten, and the entry compared with itself."""
    study.entries["sam"].settings = {"optimizer.warmup_steps": 40}
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps is made by the study"):
        design._check(study, study.cells["fixed-0.014M"], "here")


def test_unknown_settings_are_refused(study):
    cell = study.cells["fixed-0.014M"]
    study.entries["sam"].settings = {"training.stepz": 3}
    with pytest.raises(UserError, match=r"training\.stepz"):
        make(study, cell, "sam", Trial(((LR, 0.01),)), 0)


# ---------------------------------------------------------------- reporting


def test_a_row_holds_what_the_records_say(study):
    cell, source = study.cells["fixed-0.014M"], MadeUp(bowl())
    cell.curvature = 1
    finish(study, cell, source)
    one = plan_cell(study, cell, source)
    data = frame([one], source)
    row = next(row for row in data.itertuples() if row.entry == "functional-sam")
    losses = {name: [source.loss(c) + 0.25 for c in configs] for (name, _), configs in one.reported.items()}
    assert row.test == pytest.approx(np.mean(losses["functional-sam"]))
    pairs = np.subtract(losses["functional-sam"], losses["adamw"])
    assert row.minus_baseline == pytest.approx(pairs.mean())
    assert row.minus_baseline_stderr == pytest.approx(stats.sem(pairs))
    assert row.minus_sam == pytest.approx(np.subtract(losses["functional-sam"], losses["sam"]).mean())
    assert (row.n, row.diverged, row.n_curvature, row.share_func) == (3, 0, 1, 0.5)
    assert row.dose == pytest.approx(row.rho)
    assert row.units == steps_of(study, cell) * row.batch * 128
    base = next(row for row in data.itertuples() if row.entry == "adamw")
    assert difference(base).n == 0
    assert (base.gradients, row.gradients) == (base.steps, cost("functional-sam", {}).gradients * row.steps)
    lost = next(configs[0] for (name, _), configs in one.reported.items() if name == "functional-sam")
    source.records[lost.name] = (lost, None)  # it diverged, and has no curvature
    row = next(row for row in frame([one], source).itertuples() if row.entry == "functional-sam")
    assert (row.n, row.diverged, row.n_curvature) == (3, 1, 0)
    assert math.isnan(row.share_func)


def test_a_sweep_compares_at_equal_learning_rate(study):
    cell, source = study.cells["batch-4"], MadeUp(bowl())
    cell.around = [0.5, 1.0]
    finish(study, cell, source)
    seeds = by_seed([plan_cell(study, cell, source)], source)
    base = seeds[seeds.entry == "adamw"].set_index(["lr", "seed"]).test
    for row in seeds.itertuples():
        assert row.minus_baseline == pytest.approx(row.test - base[row.lr, row.seed])


def test_best_checkpoint_is_what_is_compared_where_it_counts(study):
    study.cells["fixed-0.014M"].entries = ["adamw"]
    cell, source = study.cells["repeated-32"], MadeUp(bowl())
    finish(study, cell, source)
    one = plan_cell(study, cell, source)
    data = frame([one], source)
    configs = next(iter(one.reported.values()))
    assert data.test[0] == pytest.approx(np.mean([source.loss(c) - 0.5 + 0.25 for c in configs]))
    assert all(c.training.eval_every and c.training.test_best and c.data.unique_tokens for c in configs)


def test_comparisons_that_are_none_are_refused(study):
    cell, source = study.cells["batch-4"], MadeUp(bowl())
    finish(study, cell, source)
    one = plan_cell(study, cell, source)
    check([one], source)
    key = next(key for key in one.reported if key[0] == "sam")
    config = one.reported[key][0]
    other = copy.deepcopy(config)
    other.training.data_seed = 77
    one.reported[key][0] = other
    source.do([other])
    with pytest.raises(UserError, match=r"not paired: they differ in training\.data_seed"):
        check([one], source)
    one.reported[key][0] = config
    read = source.read
    source.read = lambda c, file: (
        {"data": {"sha256": c.name if c.method.name == "sam" else "s"}} if file.startswith("prov") else read(c, file)
    )
    with pytest.raises(UserError, match=r"same data \(SHA-256\)"):
        check([one], source)
    source.read = read
    for changed, words in (({"step": 7}, r"7 updates instead of"), ({"tokens": 99}, "same size of the validation set: ")):
        summary = source.summary
        source.summary = lambda c, summary=summary, changed=changed: summary(c) | (changed if c.method.name == "sam" else {})
        with pytest.raises(UserError, match=words):
            check([one], source)
        source.summary = summary


def test_holm_runs_over_the_family_alone(study):
    cell, source = study.cells["dose-0.014M"], MadeUp(bowl())
    finish(study, cell, source)
    data = frame([plan_cell(study, cell, source)], source)
    at = data.set_index(["entry", "rho"]).test
    for row in data[data.entry == "functional-sam"].itertuples():
        assert row.minus_sam == pytest.approx(at["functional-sam", row.rho] - at["sam", row.rho])  # of one radius
    every = judge(data, 0.005)
    few = judge(data, 0.005, family=lambda row: row.entry == "sam")
    tested = [row for row in data.itertuples() if difference(row).n and row.entry == "sam"]
    expected = [str(word) for word in judged([difference(row) for row in tested], margin=0.005)]
    assert list(few[few.entry == "sam"].verdict_baseline) == expected
    assert set(every.verdict_baseline) <= {str(word) for word in Verdict}
    assert list(every[every.entry == "adamw"].verdict_baseline) == [""]


@pytest.mark.parametrize("override", ["training={steps: 5}", "training[steps]=5", "training.steps=5"])
def test_an_override_counts_however_it_is_written(override):
    study = load_study("language", "quick", (override,))
    cell = study.cells["batch-4"]
    (trial, *_) = trials(study, cell, "adamw", 0.02)
    assert make(study, cell, "adamw", trial, 0).training.steps == 5


@pytest.mark.parametrize(
    "override",
    [
        "training.test=false",
        "training={init_seed: 7}",
        "training.test_best=true",
        "measure.curvature=true",
        "method.rho=0.1",
        "optimizer.lr=1",
    ],
)
def test_what_tells_the_runs_apart_is_not_overridden(override):
    with pytest.raises(UserError, match=r"the study language sets .* of each of its runs itself"):
        load_study("language", "quick", (override,))


def test_two_that_diverge_at_different_seeds_stay_in_the_family():
    import pandas as pd

    lost = Estimate(math.nan, math.inf, 3)
    rows = [
        {"n": 3, "metric": "loss", "minus_baseline": one.mean, "minus_baseline_stderr": one.stderr}
        for one in (Estimate(-0.1, 0.01, 3), Estimate(math.nan, math.nan, 0), lost)
    ]
    found = judge(pd.DataFrame(rows), 0.005)
    assert list(found.verdict_baseline) == ["better", "", "inconclusive"]
    p = Estimate(-0.1, 0.0165, 3).p
    assert 0.025 < p < 0.05  # of a family of two no longer significant
    rows[0]["minus_baseline_stderr"] = 0.0165
    assert judge(pd.DataFrame(rows[:2]), 0.0).verdict_baseline[0] == "better"
    assert judge(pd.DataFrame(rows), 0.0).verdict_baseline[0] == "inconclusive"


def test_a_family_has_one_correction_for_p_and_verdict():
    """One that diverged is no member: the others' p are those of a family without it."""
    told, lost = Estimate(-0.1, 0.03, 6), Estimate(math.inf, math.inf, 6)
    alone, beside = (family(members, 0.005) for members in ([told, told], [told, lost, told]))
    assert beside["p_holm"] == [alone["p_holm"][0], 1.0, alone["p_holm"][1]]
    assert beside["verdict"][::2] == alone["verdict"]
    assert beside["verdict"][1] == str(Verdict.LOST)
