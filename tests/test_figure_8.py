"""figure-8 from made-up records: what it says where the share is a function of targets and entropy, and where outputs matter."""

import itertools
import math
import re

import numpy as np
import pytest

from functional_sam.exhibits import figure_8
from functional_sam.exhibits.spec import load_spec


class Measured:
    """A source in which log(|delta_logit| / |delta_func|) is a function of config, targets and entropy, and a little noise."""

    name = "made up"

    def __init__(self, log_ratio):
        self.log_ratio = log_ratio

    def done(self, config):
        return True

    def metrics(self, config, kind):
        assert kind == "targets"
        random = np.random.default_rng([config.training.init_seed, figure_8.outputs(config), len(config.name)])
        run, lines = random.normal(0, 0.05), []
        points = itertools.product((1, 6, 34, 200), (128, 512), config.measure.temperatures)
        for step, targets, temperature in points:
            entropy = math.log(figure_8.outputs(config)) * (1 - 0.1 * math.log10(step)) * min(1.0, temperature) ** 0.3
            found = self.log_ratio(config, targets, entropy) + run + random.normal(0, 0.02)
            numbers = {"norm_logit": math.exp(found), "norm_func": 1.0, "share": 1 / (1 + math.exp(found)), "cosine": -0.5}
            origins = {"same": numbers, "independent": {**numbers, "square_logit": 1.0, "square_func": 1.0}}
            about = {"step": step, "targets": targets, "temperature": temperature, "loss": 1.0, "norm": 1.0, "entropy": entropy}
            lines.append({**about, "gradient": origins})
        return lines


def drawn(log_ratio):
    spec = load_spec("figure-8", "quick")
    plan = figure_8.plan(spec, Measured(log_ratio))
    assert len(plan.configs) == len(spec.seeds) * len(spec.cells)
    assert len({config.name for config in plan.configs}) == len(plan.configs)
    return figure_8.draw(plan)


def alone(config, targets, entropy):
    return 0.3 * math.log(targets) - 0.4 * entropy + 0.03 * entropy**2


def test_a_function_of_targets_and_entropy_alone():
    exhibit = drawn(alone)
    tests = exhibit.frames["tests"].set_index("compared")
    assert list(tests.index[:2]) == ["log outputs", "domain"]
    assert len(tests) == 5
    assert (tests.estimate[:2].abs() < 0.05).all()
    assert "outputs and domain add nothing" in exhibit.caption
    assert "depends on neither outputs nor domain" in figure_8.headline(exhibit.frame)
    assert set(exhibit.frame.origin) == {"same"}
    assert "576 measurements of 24 runs" in exhibit.caption


def test_a_domain_that_matters():
    exhibit = drawn(lambda config, targets, entropy: alone(config, targets, entropy) + 2.0 * (config.kind == "language"))
    tests = exhibit.frames["tests"].set_index("compared")
    assert tests.loc["domain", "estimate"] == pytest.approx(2.0, abs=0.2)
    assert tests.loc["domain", "p_holm"] < 0.001
    assert "is larger in language" in exhibit.caption
    assert "beside it a fit with an indicator" in exhibit.caption
    assert "open:" not in exhibit.caption


def test_a_domain_that_small_embeddings_hide_is_called_open():
    """They are in language alone: what they do is taken from its domain, unless they are told apart."""

    def hidden(config, targets, entropy):
        small = config.model.embedding_scale < 1
        return alone(config, targets, entropy) + 0.5 * (config.kind == "language") - 2.0 * small

    exhibit = drawn(hidden)
    tests, apart = (exhibit.frames[name].set_index("compared") for name in ("tests", "apart"))
    assert tests.loc["domain", "p_holm"] > 0.05
    assert apart.loc["domain", "estimate"] == pytest.approx(0.5, abs=0.2)
    assert apart.loc["domain", "p_holm"] < 0.05
    assert figure_8.told(exhibit.frame)["domain"] == figure_8.OPEN
    assert "may depend on the domain (open)" in exhibit.caption
    assert "open: significant in one of two fits" in exhibit.caption
    assert "domain is open" in figure_8.headline(exhibit.frame)


def test_what_is_held_equal_sets_the_coefficient_of_outputs():
    """A share that follows mostly from the distance to uniform grows with outputs at equal entropy, and less at equal distance."""

    def log_ratio(config, targets, entropy):
        outputs = math.log(figure_8.outputs(config))
        return 0.3 * math.log(targets) + 0.1 * outputs + 0.4 * (outputs - entropy)

    exhibit = drawn(log_ratio)
    tests = exhibit.frames["tests"].set_index("compared")
    assert tests.estimate["log outputs"] == pytest.approx(0.5, abs=0.05)
    assert figure_8.below_uniform(exhibit.frame)["estimate"] == pytest.approx(0.1, abs=0.05)
    assert "grows with the number of outputs" in exhibit.caption
    assert "is held equal and not entropy: log outputs" in exhibit.caption


def test_a_sign_that_turns_is_not_said_to_grow():
    """At equal entropy up, at equal distance from uniform down."""

    def log_ratio(config, targets, entropy):
        return 0.3 * math.log(targets) + 0.2 * math.log(figure_8.outputs(config)) - 0.6 * entropy

    exhibit = drawn(log_ratio)
    assert exhibit.frames["tests"].set_index("compared").estimate["log outputs"] == pytest.approx(0.2, abs=0.05)
    assert figure_8.below_uniform(exhibit.frame)["estimate"] == pytest.approx(-0.4, abs=0.05)
    assert "grows with them at equal entropy, and falls at equal distance from uniform" in exhibit.caption
    assert "it depends on outputs" in figure_8.headline(exhibit.frame)
    assert figure_8.told(exhibit.frame)["log outputs"] == figure_8.RISES  # the answer is the protocol's


def test_contrasts_are_paired_by_seed():
    """The share at 640 minus 10 classes, by hand."""
    exhibit = drawn(lambda config, targets, entropy: 0.1 * math.log(figure_8.outputs(config)))
    end = figure_8.at_end(exhibit.frame)
    many, few = (end[(end.task == "vision") & (end.outputs == n)].sort_values("seed").share_logit.to_numpy() for n in (640, 10))
    tests = exhibit.frames["tests"].set_index("compared")
    assert tests.loc["vision, 640 minus 10 outputs", "estimate"] == pytest.approx((many - few).mean())
    assert "language, embeddings of 0.1 minus 1" in tests.index


def test_a_share_that_falls_with_outputs_and_grows_at_equal_entropy_is_mixed():
    """Both are comparisons of the protocol's family; that it falls at equal distance from uniform changes words alone."""
    exhibit = drawn(lambda config, targets, entropy: 0.6 * math.log(figure_8.outputs(config)) - 1.5 * entropy)
    tests = exhibit.frames["tests"].set_index("compared")
    assert tests.loc["log outputs", "estimate"] > 0 > tests.loc["vision, 640 minus 10 outputs", "estimate"]
    assert exhibit.answer == "mixed"
    shares = [figure_8.at_end(exhibit.frame).query("task == 'vision' and outputs == @n").share_logit.mean() for n in (10, 640)]
    few, many = (rf"{share:.2f} \S [\d.< ]+" for share in shares)  # and its interval
    assert re.match(f"logit share {few} at 10 classes, {many} at 640; ", figure_8.headline(exhibit.frame))
    assert "given targets and entropy it depends on outputs" in figure_8.headline(exhibit.frame)


def test_clustered_by_setting_seeds_are_no_further_evidence():
    """The same coefficients, and clusters of all runs that have outputs, domain and embeddings in common."""
    exhibit = drawn(alone)
    data = exhibit.frame
    runs, settings = figure_8.judged_family(data).iloc[:2], figure_8.by_setting(data)
    assert list(settings.estimate) == pytest.approx(list(runs.estimate))
    assert set(settings.n) == {len(data[["task", "outputs", "embedding_scale"]].drop_duplicates())}
    assert set(runs.n) == {len(data[["task", "outputs", "embedding_scale", "seed"]].drop_duplicates())}
    assert f"The runs are of {settings.n.iloc[0]} settings" in exhibit.caption
