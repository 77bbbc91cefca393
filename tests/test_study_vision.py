"""The vision study: accuracy is better when higher, equal trials, what is kept of a gain, and its exhibits from made-up records."""

import copy
import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest
from made_up import MadeUp
from rich.console import Console
from scipy import stats

from functional_sam.cli import main
from functional_sam.errors import UserError
from functional_sam.exhibits import draw_plan, figure_10, planned
from functional_sam.exhibits.comparison import DESCRIBED
from functional_sam.exhibits.figure_10 import _chosen, _share, _verdicts, what_is_kept
from functional_sam.exhibits.output import write
from functional_sam.exhibits.vision import DOUBLES, accuracies, gained
from functional_sam.exhibits.words import answer
from functional_sam.jobs.launch import submit
from functional_sam.sharpness.methods import resolve
from functional_sam.study import design
from functional_sam.study.compare import Verdict, ratio
from functional_sam.study.design import LR, RHO, load_study, make, trials
from functional_sam.study.report import by_seed, frame, judge
from functional_sam.study.tune import plan_cell, score

GAIN = {"sam": 0.1, "functional-sam": 0.06, "logit-sam": 0.01, "precond-sam": 0.08, "precond-functional-sam": 0.07}


def error(config):
    """1 - accuracy: the method's gain grows with noise; the best learning rate is .002, the best radius .2."""
    seed, noise = config.training.init_seed, config.data.noise
    value = 0.2 + noise / 2 + 0.01 * math.sin(seed)
    if config.optimizer.name == "adamw":
        value += 0.02 * math.log(config.optimizer.lr / 0.002) ** 2
    gain = GAIN.get(config.method.name, 0.0) * noise * (1 if config.method.rho == 0.2 else 0.5)
    return value - gain + 0.0005 * math.cos(5 * seed + len(config.method.name) + 10 * config.training.label_smoothing)


class MadeUpAccuracies(MadeUp):
    """Accuracies of which the last is .05 lower than the best."""

    def summary(self, config):
        found = self.loss(config)
        if found is None:
            return {"diverged": True, "error": "e", "loss": None}
        numbers = {"loss": 2 * found, "accuracy": 0.95 - found}
        if config.training.test_best:
            numbers |= {"best_loss": found, "best_step": 7, "best_accuracy": 1 - found}
        tested = {f"test_{key}": value for key, value in numbers.items()} if config.training.test else {}
        return {"step": config.training.steps, "seconds": 2.0, "images": 100, **numbers, **tested}

    def metrics(self, config, kind=None):
        if kind == "decompose":
            return [
                {"step": step, "gradient": {"share": 0.1 * (step > 1) + config.data.noise}} for step in (1, config.training.steps)
            ]
        if kind == "validation":
            found = self.loss(config)
            return [{"step": step, "loss": found, "accuracy": value - found} for step, value in ((7, 1.0), (9, 0.95))]
        return super().metrics(config, kind)


def done(source, study):
    for cell in study.cells.values():
        while source.do(plan_cell(study, cell, source).configs):
            pass
    return source


@pytest.fixture(scope="module")
def study():
    return load_study("vision", "quick")


@pytest.fixture(scope="module")
def complete(study):
    return done(MadeUpAccuracies(error), study)


def test_higher_accuracy_wins(study, complete):
    """In tuning, in the best checkpoint, in the sign of a difference and in its verdict; a diverged run loses."""
    cell = study.cells["noise-40"]
    one = plan_cell(study, cell, complete)
    assert one.centre.best.get(LR) == 0.002
    assert one.searches["sam"].best.get(RHO) == 0.2
    config = one.reported["sam", one.searches["sam"].best][0]
    assert score(config, complete, best=True) == -(1 - error(config))
    trial = one.searches["sam"].runs[0][0]  # it tests nothing: by its own evaluations, of which the best counts
    assert score(trial, complete, best=True) == -(1 - error(trial))
    data = judge(frame([one], complete), study.margin).set_index("entry")
    assert data.test["sam"] > data.test["adamw"]
    assert data.validation["sam"] == pytest.approx(np.mean([1 - error(c) for c in one.by_entry["sam"]]))
    seeds = by_seed([one], complete)
    base = seeds[seeds.entry == "adamw"].set_index("seed").test
    assert [row.minus_baseline for row in seeds.itertuples()] == pytest.approx(
        [row.test - base[row.seed] for row in seeds.itertuples()]
    )
    assert data.minus_baseline["sam"] == pytest.approx(0.04, abs=0.002)
    assert data.verdict_baseline["sam"] == str(Verdict.BETTER)
    assert data.verdict_baseline["smoothing"] == str(Verdict.SAME)
    lost = MadeUpAccuracies(lambda c: None if c.method.name == "sam" and c.training.init_seed == cell.seeds[1] else error(c))
    lost.records = complete.records
    data = judge(frame([one], lost), study.margin).set_index("entry")
    assert data.verdict_baseline["sam"] == str(Verdict.LOST)
    assert data.minus_baseline["sam"] == -math.inf


@pytest.mark.parametrize("scale", ["quick", "laptop", "paper"])
def test_every_entry_gets_as_many_trials_and_seeds_pair_all_that_is_drawn(scale):
    study = load_study("vision", scale)
    for cell in study.cells.values():
        tried = {name: trials(study, cell, name, 0.002) for name in cell.entries}
        assert len({len(found) for found in tried.values()}) == 1, cell.name
        assert all(design.tuned(study, cell, name) for name in cell.entries)
        configs = [make(study, cell, name, found[0], cell.seeds[-1], reported=True) for name, found in tried.items()]
        drawn = {(c.training.init_seed, c.training.data_seed, c.data.noise, c.data.augment, c.data.unique_images) for c in configs}
        assert len(drawn) == 1
        assert all(c.training.test and c.training.test_best and c.training.eval_every for c in configs)
        steps = {name: c.training.steps for name, c in zip(cell.entries, configs, strict=True)}
        longer = [name for name in steps if name.endswith("double")]
        assert all(steps[name] == 2 * steps[cell.entries[0]] for name in longer)
        assert longer or cell.part in DESCRIBED


def test_paper_scale_has_the_published_settings():
    """Of GSAM's ViT-S: 3e-3 to 3e-5, weight decay .3, 300 epochs, 10,000 steps of warm-up, radius .6 that follows lr."""
    study = load_study("vision", "paper")
    for cell in (study.cells["vit-s-16"], study.cells["vit-s-32"]):
        config = make(study, cell, "gsam", trials(study, cell, "gsam", 0.003)[1], 0)
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.lr * optimizer.lr_end) == (0.003, pytest.approx(3e-5))
        assert (optimizer.weight_decay, config.method.rho) == (0.3, 0.6)
        assert optimizer.warmup_steps == pytest.approx(10_000, abs=5)
        assert (optimizer.schedule, optimizer.clip) == ("linear", 1.0)
        _, options = resolve("gsam", config.method.options)  # rho is 0 where the rate is at its lowest
        assert (options["rho_schedule"], options["lr_min"]) == ("lr", pytest.approx(3e-5))
        assert config.training.steps * config.training.batch / 1_268_355 == pytest.approx(300, rel=0.01)


def test_paper_scale_is_planned_and_submitted_in_stages(tmp_path, monkeypatch, capsys):
    """Its learning rate is given, so all trials of the baseline are known at once, at either length: 3 of 2 entries in 3 cells."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("time: 2-00:00:00\npartition: gpu\ngpus_per_node: 8\ncpus_per_task: 10\n")
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM here
    submit("table-5", "paper", str(profile), [f"runtime.runs={tmp_path}/runs"], True, Console(width=80))
    first, second = capsys.readouterr().out.split("# ---- after them")
    assert {"#SBATCH --array=0-17%18", "#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=8"} <= set(first.splitlines())
    assert "#SBATCH --dependency=afterok:ARRAY" in second
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["estimate", "table-5", "--gpu", "a100-80"]) == 0
    cells = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines() if "│" in line]
    found = {(row[1].rpartition(" x ")[0], row[4]): (float(row[5]), float(row[-2])) for row in cells if row[4] and row[-2]}
    plain, doubled, sharp = (
        np.array(found[f"vision-vit-s-16 {name}", f"{images} B images"])
        for name, images in (("adamw", 0.38), ("adamw", 0.76), ("gsam", 0.38))
    )
    assert doubled / plain == pytest.approx([2, 2], rel=0.01)
    assert sharp / plain == pytest.approx([2, 1], rel=0.01)  # a small model: both wait for images
    assert {name for name, _ in found} >= {"vision-vit-s-32 gsam", "vision-resnet-50 gsam, sgd"}


def test_ratio_is_fiellers():
    """Its ends are where a t test of a - r b gives p = 5 %; where the denominator is not told from zero there is no interval."""
    draw = np.random.default_rng(0)
    b = draw.normal(1.0, 0.2, 6)
    a = 0.6 * b + draw.normal(0, 0.1, 6)
    mean, low, high = ratio(a, b)
    assert mean == pytest.approx(a.mean() / b.mean())
    assert low < mean < high
    for end in (low, high):
        assert stats.ttest_1samp(a - end * b, 0.0).pvalue == pytest.approx(0.05, abs=1e-9)
    assert math.isnan(ratio(a, [1.0, -1.0, 2.0, -2.0, 0.5, 0.1])[1])
    assert ratio([2.0, 2.0], [1.0, 1.0]) == pytest.approx((2.0, 2.0, 2.0))


# ---------------------------------------------------------------- the exhibits


@pytest.mark.parametrize("name", ["table-5", "figure-10"])
def test_every_cell_is_drawn(name, complete, tmp_path):
    exhibit = draw_plan(planned(name, "quick", source=complete))
    assert not exhibit.plan.missing
    assert set(exhibit.frame.cell) == {cell.name for cell in load_study("vision", "quick").part(*exhibit.plan.spec.parts)}
    assert "Not shown" not in exhibit.caption
    assert all(file.stat().st_size for file in write(exhibit, tmp_path))
    assert exhibit.headline


def test_figure_10_compares_at_the_same_rate_and_decay_too():
    """alike-40: AdamW's own choice is another one; by hand, a family of ten that others do not know."""

    def loss(config):
        """AdamW is best at half the rate and three times the decay; SAM gains .04 at rate .002 and loses .04 at .004."""
        seed, name, lr = config.training.init_seed, config.method.name, config.optimizer.lr
        chosen = 0.05 * (name == "adamw" and lr == 0.001 and config.optimizer.weight_decay == 3)
        gain = 0.0 if name == "adamw" else 0.04 if lr < 0.003 else -0.04
        more = 0.001 * math.sin(9 * seed + len(name) + 1000 * lr)
        return 0.5 + 0.02 * abs(math.log2(lr / 0.002)) + 0.03 * math.sin(seed) - chosen - gain + more

    source = MadeUpAccuracies(loss)
    cells = ("cells=noise-40,noise-0,alike-40,alike-40-twice,control-40",)
    while source.do(planned("figure-10", "laptop", cells, source).configs):
        pass
    exhibit = draw_plan(planned("figure-10", "laptop", cells, source))
    data = exhibit.frame[exhibit.frame.checkpoint.eq("best")]
    control = data[data.part.eq("control") & data.rho.notna()]
    assert list(control.entry) == ["sam", "functional-sam", "logit-sam"]
    assert set(control.n) == {12}
    assert set(control.verdict_baseline) == {str(Verdict.BETTER)}
    assert "same rate and decay, 12 fresh seeds: SAM +4.0" in exhibit.caption or "12 fresh seeds: SAM +4.0" in exhibit.headline
    assert "On fresh seeds, written down beforehand, with one rate and weight decay for all (40 % noise, decay 1" in exhibit.caption
    longer = data[data.cell.eq("noise-40") & data.entry.eq("sam")].iloc[0]
    said = f"Points over AdamW of twice the epochs, as much compute: SAM {100 * longer.minus_longer:+.1f} ±"
    assert said in exhibit.caption  # it gains
    own = data[data.part.eq("alike") & data.rho.notna()]
    assert len(own) == 10
    assert set(own.weight_decay) == {1}
    for row in own.itertuples():
        runs = [c for c, _ in source.records.values() if c.optimizer.lr == row.lr and c.data.noise == 0.4]
        runs = [c for c in runs if c.optimizer.weight_decay == 1 and c.training.init_seed < 5 and c.training.test]
        of = {name: {c.training.init_seed: c for c in runs if c.method.name == name} for name in ("adamw", row.entry)}
        of[row.entry] = {seed: c for seed, c in of[row.entry].items() if c.method.rho == 0.05} or of[row.entry]
        a, b = ([source.summary(of[name][seed])["test_best_accuracy"] for seed in range(5)] for name in (row.entry, "adamw"))
        assert row.minus_baseline == pytest.approx(np.mean(np.subtract(a, b)))
    signs = own.groupby("lr").verdict_baseline.agg(set)
    assert signs[0.002] == {str(Verdict.BETTER)}
    assert signs[0.004] == {str(Verdict.WORSE)}
    assert "With one rate and weight decay for all (40 % noise, decay 1, rho 0.05" in exhibit.caption
    assert set(exhibit.frames["kept"].cell) == {"noise-40", "noise-0", "control-40"}
    without = draw_plan(planned("figure-10", "laptop", ("cells=noise-40,noise-0",), source))
    assert without.frame.verdict_baseline.equals(
        exhibit.frame[~exhibit.frame.part.isin(["alike", "control"])].reset_index(drop=True).verdict_baseline
    )


def test_figure_10_says_what_the_records_say(complete):
    exhibit = draw_plan(planned("figure-10", "quick", source=complete))
    data = exhibit.frame.set_index(["checkpoint", "noise", "entry"])
    assert data.test["best", 0.4, "sam"] - data.test["last", 0.4, "sam"] == pytest.approx(0.05)
    assert data.share_func_last["last", 0.4, "adamw"] == pytest.approx(0.5)
    assert data.test_loss["best", 0.0, "adamw"] == pytest.approx(1 - data.test["best", 0.0, "adamw"])
    kept = exhibit.frames["kept"].set_index(["checkpoint", "noise", "half"])
    assert kept.kept["best", 0.4, "functional-sam"] == pytest.approx(0.6, abs=0.05)
    assert kept.kept["best", 0.4, "logit-sam"] == pytest.approx(0.1, abs=0.05)
    assert math.isnan(kept.low["best", 0.0, "functional-sam"])  # without noise there is no gain to keep
    assert re.search(r"kept at 40 % noise by Functional-SAM (5\d|6\d) % \(", exhibit.caption)
    assert exhibit.headline.startswith("points over AdamW at 40 % label noise, best checkpoint: SAM +4.0")
    words = data.verdict_baseline["best"]
    assert {words[0.4, entry] for entry in ("sam", "functional-sam")} == {"better"}
    assert {words[0.0, entry] for entry in ("sam", "functional-sam")} == {"no difference"}
    assert exhibit.answer == "holds"  # it is of noisy labels


def test_the_share_at_other_rates_is_not_read_as_one_of_noise():
    """AdamW chose another rate and decay with noise: what it is at those of clean labels stands beside it."""
    rows = [
        ("noise", 0.0, 0.002, 1.0, 0.17),
        ("noise", 0.4, 0.001, 3.0, 0.64),
        ("alike", 0.4, 0.002, 1.0, 0.37),
        ("alike", 0.4, 0.004, 1.0, 0.5),
    ]
    data = pd.DataFrame(rows, columns=["part", "noise", "lr", "weight_decay", "share_func_last"]).assign(
        entry="adamw", checkpoint="last", n=5
    )
    said = _share(data)
    assert "0.17 at 0 % (rate 0.002, decay 1), 0.64 at 40 % (rate 0.001, decay 3) noise" in said
    assert said.endswith("at the first of these rates and decays 0.37 at 40 % (n = 5).")
    alike = _share(data[data.part == "noise"].assign(lr=0.002, weight_decay=1.0))
    assert alike.endswith("0.17 at 0 %, 0.64 at 40 % noise.")


def test_figure_10_says_which_weight_decays_it_compares_and_what_lies_at_an_end():
    rows = [
        {"noise": noise, "rho": rho, "weight_decay": decay, "edges": edges}
        for noise, decays in ((0.4, (3.0, 1.0)), (0.0, (1.0, 1.0)))
        for rho, decay, edges in ((math.nan, decays[0], ""), (0.1, decays[1], "rho:low" if noise else math.nan))
    ]
    decays, ends, _ = _chosen(pd.DataFrame(rows)).split(". ")
    assert decays == "At 40 % noise AdamW's weight decay is 3, the methods' 1"
    assert ends == "Chosen at an end of what was tried: 1 of 4 entries (the CSV says which)"
    assert _chosen(pd.DataFrame(rows[2:])) == ""


def test_what_is_only_described_is_a_family_of_its_own_and_keeps_no_answer_open(study, complete):
    """Copies of the cell under 40 % noise as the part `activation`: they change no verdict of the others."""
    one = plan_cell(study, study.cells["noise-40"], complete)
    copy_of = dataclasses.replace(one, cell=dataclasses.replace(one.cell, name="copy", part="activation"))
    alone, both = accuracies([one], complete), accuracies([one, copy_of, copy_of], complete)
    assert list(both.verdict_baseline[: len(alone)]) == list(alone.verdict_baseline)
    plan = planned("figure-10", "quick", source=complete)
    described = dataclasses.replace(plan, left=("relu-40",), growing=False)
    exhibit = draw_plan(described)
    assert "relu-40; their comparisons are a family of their own." in exhibit.caption
    assert not exhibit.answer.endswith("so far")


def test_nothing_is_kept_of_a_loss(study, complete):
    """Where SAM is worse than AdamW, a ratio of the two would be large and mean nothing."""
    worse = MadeUpAccuracies(lambda c: error(c) + (0.2 if c.method.name == "sam" else 0.0))
    worse.records = complete.records
    kept = what_is_kept([plan_cell(study, study.cells["noise-40"], complete)], worse).set_index(["checkpoint", "half"])
    assert math.isnan(kept.kept["best", "functional-sam"])
    assert math.isnan(kept.low["best", "logit-sam"])
    assert kept.kept["best", "precond-functional-sam"] == pytest.approx(7 / 8, abs=0.05)


def test_what_is_kept_is_asked_of_one_trial_of_each_entry(study, complete):
    """Where a cell reports all its trials, none of them is the entry's: until now the last one was taken without a word."""
    both = dataclasses.replace(study.cells["noise-40"], choose=False)
    source = copy.copy(complete)
    source.records = dict(complete.records)
    while source.do(plan_cell(study, both, source).configs):
        pass
    one = plan_cell(study, both, source)
    assert len([name for name, _ in one.reported if name == "sam"]) == 4
    with pytest.raises(UserError, match=r"noise-40 .* several trials of adamw"):
        what_is_kept([one], source)


def test_table_5_compares_with_twice_the_epochs_apart(complete):
    exhibit = draw_plan(planned("table-5", "quick", source=complete))
    data = exhibit.frame.set_index(["model", "entry"])
    assert data.steps["ViT", "adamw-double"] == 2 * data.steps["ViT", "adamw"]
    assert data.minus_longer["ViT", "sam"] == pytest.approx(data.test["ViT", "sam"] - data.test["ViT", "adamw-double"])
    assert data.verdict_longer["ViT", "adamw-double"] == ""
    assert exhibit.answer == answer(exhibit.frame.query("entry == 'sam'").verdict_baseline, Verdict.BETTER)
    methods = {line.split("|")[2].strip() for line in exhibit.markdown.splitlines() if "|" in line}
    assert methods >= {"AdamW", "SGD with momentum", "GSAM", "ASAM"}
    assert "78.1" in exhibit.markdown.partition("Published")[2]


def test_a_caption_says_which_images_are_augmented():
    """At laptop those of the residual network alone, at paper all, at quick none."""
    study = load_study("vision", "laptop")
    source = MadeUpAccuracies(error)
    for cell in study.part("clean", "convnet"):
        while source.do(plan_cell(study, cell, source).configs):
            pass
    caption = draw_plan(planned("table-5", "laptop", source=source)).caption
    assert "2,048 images of fashion-mnist (ConvNet: shifted and mirrored at random), in float32" in caption
    caption = draw_plan(planned("table-5", "laptop", ("cells=vit",), source)).caption
    assert "2,048 images of fashion-mnist, in float32" in caption


def test_table_5_at_paper_scale_tells_its_models_and_baselines_apart():
    """Two sizes of patches are two models; ResNet-50 is trained by SGD, and so is what its methods are compared with."""
    source = done(MadeUpAccuracies(error), load_study("vision", "paper"))
    exhibit = draw_plan(planned("table-5", "paper", source=source))
    data = exhibit.frame
    assert list(dict.fromkeys(data.model)) == ["ViT-S/32", "ViT-S/16", "ResNet-50"]
    assert not data[["model", "entry"]].duplicated().any()
    said = "AdamW (SGD with momentum for ResNet-50)"
    assert f"minus {said}, verdict" in exhibit.markdown
    assert f"Against {said} at equal epochs: ViT-S/32: " in exhibit.caption
    assert f"Against {said} with twice the epochs: " in exhibit.verdict
    assert exhibit.headline.startswith(f"SAM minus {said} ")
    assert "imagenet-1k (ViT-S/32, ViT-S/16, ResNet-50: cropped and mirrored at random), in bf16" in exhibit.caption


def test_a_cell_that_is_not_complete_is_named(complete):
    source = copy.copy(complete)
    source.records = {key: value for key, value in complete.records.items() if not key.startswith("vision-convnet")}
    assert "Not shown, their runs are not complete: convnet" in draw_plan(planned("table-5", "quick", source=source)).caption


def test_a_gain_is_said_of_a_run_that_diverged_and_of_one_seed():
    def said(mean, stderr, n):
        return gained(pd.Series({"minus_baseline": mean, "minus_baseline_stderr": stderr, "n": n}))

    assert said(-math.inf, math.nan, 3) == "(diverged)"
    assert said(math.nan, math.inf, 3) == "(diverged)"
    assert said(0.01, math.nan, 1) == "+1.0"
    assert said(-0.0001, 0.0, 3) == "\N{MINUS SIGN}0.0 \N{PLUS-MINUS SIGN} 0.0"


def test_figure_10_says_that_nothing_is_there_at_40_per_cent(complete):
    exhibit = draw_plan(planned("figure-10", "quick", ("cells=noise-0",), complete))
    assert exhibit.headline == "nothing at 40 % label noise"


def test_verdicts_at_equal_epochs_do_not_wait_for_twice_the_epochs(complete):
    frame = draw_plan(planned("figure-10", "quick", source=complete)).frame
    alone = frame[frame.checkpoint.eq("best") & ~frame.entry.isin(DOUBLES)]
    assert _verdicts(alone.assign(verdict_longer=""), "best") == _verdicts(frame[frame.checkpoint.eq("best")], "best")


def test_figure_10_names_the_gains_at_other_noises():
    """Of the methods that the claim is about; without noise there is nothing to gain."""
    entries = ["adamw", "sam", "functional-sam", "precond-sam"]
    rows = [
        {"noise": noise, "entry": name, "minus_baseline": noise / 10 + 0.001 * (name == "functional-sam")}
        for noise in (0.4, 0.0, 0.8, 0.2)
        for name in entries
    ]
    data = pd.DataFrame(rows).assign(part="noise", checkpoint="best", n=1, minus_baseline_stderr=math.nan)
    found = figure_10.headline(data)
    gains = "; tuned, SAM / Functional-SAM: 20 % +2.0 / +2.1, 80 % +8.0 / +8.1"
    assert found == f"points over AdamW at 40 % label noise, best checkpoint: SAM +4.0, Functional-SAM +4.1{gains}"
