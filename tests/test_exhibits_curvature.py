"""figure-2, figure-4, table-4 from written records, and the curvature that a real run measures of its final weights."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from functional_sam import exhibits
from functional_sam.config import compose, to_yaml
from functional_sam.curvature import CurvatureProducts, decompose, scaled
from functional_sam.exhibits import figure_2, figure_4, flatness, table_4
from functional_sam.exhibits.spec import load_spec
from functional_sam.files import write_text
from functional_sam.records import Run, RunDirectories
from functional_sam.records.due import lines_due
from functional_sam.study import compare
from functional_sam.study.compare import Estimate, paired_difference
from functional_sam.tasks import prepare
from functional_sam.training import loop
from functional_sam.training.measure import MATRICES, final_curvature


def record(config, **summary):
    run = Run(config)
    run.directory.mkdir(parents=True, exist_ok=True)
    write_text(run.directory / "config.yaml", to_yaml(config))
    places = [("train", config.training.steps), *lines_due(config).elements()]
    lines = [{"kind": kind, "step": step, "loss": 3.0, "dose": None} for kind, step in places]
    write_text(run.directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run.write("done.json", {"seconds": 1.0, "step": config.training.steps, **summary})
    run.write("provenance.json", {"commit": "c", "diff": "", "versions": {}, "data": {"data": "d", "sha256": "s"}})
    return run


def spectrum(eigenvalues, quadratic=1.0, size=1.0, order=4):
    """What a run writes of one matrix, as if all its eigenvalues were known."""
    nodes = sorted(eigenvalues)[:order]
    return {
        "quadratic": quadratic,
        "norm": size,
        "trace": {"mean": sum(eigenvalues), "stderr": 0.1, "n": 4, "num_products": 4},
        "top": {"value": max(eigenvalues), "residual": 1e-4, "converged": True},
        "bottom": {"value": min(eigenvalues), "residual": 1e-4, "converged": True},
        "num_products": 10,
        "density": {"nodes": [nodes] * 2, "weights": [[1 / len(nodes)] * len(nodes)] * 2, "size": 1000},
    }


def curvature(scale=1.0, share=0.25, top=3.0):
    """A made-up curvature.json whose every measure is proportional to scale."""
    matrices = {
        "hessian": spectrum([-1 * scale, 0.0, 2 * scale, 7 * scale], 1.5 * scale, 3 * scale),
        "gauss_newton": spectrum([0.0, 0.0, 1 * scale, 6 * scale], 2 * scale, 3 * scale),
        "functional": spectrum([-2 * scale, 0.0, 0.0, top * scale], -0.5 * scale, 1 * scale),
    }
    own = {"loss": 3.0, "norm_gradient": scale, "share": share, **matrices}
    return {"step": 1, "rows": 4, "loss": 3.0, "logits": {"norm": 2.0, "entropy": 1.0}, "geometries": {"plain": own, "adam": own}}


def sentences(caption):
    """Their number: a full stop, then a capital letter."""
    return len(re.findall(r"\.(?= [A-Z]|$)", caption))


def test_figure_2_pairs_seeds_and_shows_divergence(tmp_path):
    """In language the loss rises with phi, in vision nothing happens but noise, and one run diverged."""
    overrides = (f"runtime.runs={tmp_path / 'runs'}",)
    spec = load_spec("figure-2", "quick")
    for config in exhibits.needed("figure-2", overrides=overrides):
        seed, phi = config.training.init_seed, config.method.options.get("phi")
        assert config.method.options.get("dose") == (None if phi is None else 0.1)
        if config.task == "language":
            gone = seed == 1 and phi == 90
            loss = 4.0 + seed if phi is None else 4.0 + seed + 1e-3 * (phi - 45) + 1e-4 * math.sin(seed * (phi + 1) + 1)
            record(config, loss=None, diverged=True, error="step 3") if gone else record(config, loss=loss)
        else:
            record(config, loss=0.5, accuracy=0.8 + (0.0 if phi is None else (0.01, -0.02, 0.011)[seed] * (1 + phi / 90)))
    exhibit = exhibits.draw("figure-2", overrides=overrides)
    data = exhibit.frame
    assert len(data) == len(spec.seeds) * 2 * (1 + len(spec.dose) * len(spec.phi))
    one = data[(data.task == "language") & (data.phi == 45) & (data.seed == 2)].iloc[0]
    assert one.minus_adamw == pytest.approx(1e-4 * math.sin(2 * 46 + 1))
    assert np.isinf(data[data.diverged].value).all()
    assert data.diverged.sum() == 1
    assert "The paper's order in language is supported" in exhibit.verdict
    assert exhibit.answer == "holds"  # of language alone
    language, vision = exhibit.verdict.split("against AdamW")[1:]
    assert "better at phi 0, 5, 10, 20;" in language
    assert "worse at phi 70;" in language
    assert "worse (diverged) at phi 90" in language
    assert vision.startswith(" inconclusive at phi 0, 5, 10, 20, 45, 70, 90 ")
    written = exhibits.write(exhibit, tmp_path / "paper")
    assert (tmp_path / "paper" / "figures" / "figure-2-comparisons.csv") in written
    assert (tmp_path / "paper" / "figures" / "figure-2.png").stat().st_size > 10_000
    assert sentences(exhibit.caption) == 3
    assert "float32" in exhibit.caption


def test_figure_2_has_the_middle_of_several_doses_in_its_headline():
    def row(seed, dose=math.nan, phi=math.nan, value=4.0):
        method = "adamw" if math.isnan(phi) else "angle-sam"
        own = {"part": figure_2.SWEEP, "task": "language", "method": method, "dose": dose, "phi": phi}
        return own | {"seed": seed, "metric": "loss", "value": value}

    rows = [row(seed) for seed in range(3)]
    rows += [row(seed, dose, phi, 4 + dose * (phi + seed)) for seed in range(3) for dose in (0.05, 0.1, 0.2) for phi in (0, 90)]
    text = figure_2.headline(pd.DataFrame(rows))
    assert "(dose 0.1, not significant)" in text  # the made-up differences have no spread
    assert "dose 0.05" not in text
    assert "dose 0.2" not in text


def test_figure_2_turns_the_sign_of_accuracy_and_corrects_within_families():
    """Higher accuracy is better; the ends are a family of two, the angles against AdamW one of four."""
    rows = []
    for task, metric, sign in (("language", "loss", 1.0), ("vision", "accuracy", -1.0)):
        for seed, noise in enumerate((-1.0, 0.0, 1.0)):
            for phi, value in ((None, 0.0), (0.0, -0.10), (90.0, 0.02)):
                wobble = 0.0 if phi is None else noise * 0.01 * (1 + phi)
                rows.append(
                    {"task": task, "dose": 0.1, "phi": phi, "seed": seed, "metric": metric, "value": sign * (value + wobble)}
                )
    data = pd.DataFrame(rows)
    data["method"] = np.where(data.phi.isna(), "adamw", "angle-sam")
    found = figure_2.comparisons(data, 0.0).set_index(["against", "task", "phi"])
    by_hand = paired_difference([-0.11, -0.10, -0.09], [0.0, 0.0, 0.0])
    assert by_hand.p < 0.05 / 4
    for task in ("language", "vision"):
        assert found.loc[("AdamW", task, 0.0), "verdict"] == "better"
        assert found.loc[("AdamW", task, 90.0), "verdict"] == "inconclusive"
        assert found.loc[("logit part", task, 0.0), "verdict"] == "inconclusive"
    assert found.loc[("AdamW", "vision", 0.0), "difference"] == pytest.approx(0.10)


def test_densities_of_an_exhibit_are_those_of_the_known_eigenvalues(tmp_path):
    overrides = (f"runtime.runs={tmp_path / 'runs'}",)
    configs = exhibits.needed("figure-4", overrides=overrides)
    for config in configs:
        run = record(config, loss=3.0, accuracy=0.5)
        seed = config.training.init_seed
        run.write("curvature.json", curvature(1.0 + 0.1 * seed, top=3.0 + (config.task == "vision") + 0.01 * (seed - 1)))
    plan = exhibits.planned("figure-4", overrides=overrides)
    assert plan.configs == configs
    data = figure_4.density_frame(plan, "language")
    for _, part in data.groupby("matrix"):
        width = part.eigenvalue.diff().iloc[1]
        assert (part.density * width).sum() == pytest.approx(1.0, abs=1e-6)
    G = data[data.matrix == "gauss_newton"]
    width = G.eigenvalue.diff().iloc[1]
    assert (G.density * width)[G.eigenvalue > 0.5].sum() == pytest.approx(0.5, abs=1e-6)  # two of its four eigenvalues

    exhibit = exhibits.draw("figure-4", overrides=overrides)
    tops = exhibit.verdict.partition("tops, plain: ")[2]  # 3 / 6 and 4 / 6 at any scale
    assert re.match(r"language 0.50 [^,]*, vision 0.67 [^,]*, difference .0.17", tops)
    tests = exhibit.frames["tests"].set_index(["measure", "geometry"])
    assert tests.loc[("traces", "adam"), ["language", "vision"]].to_list() == pytest.approx([1 / 8, 2 / 8])
    assert "smaller in language by all measures" in exhibit.caption
    assert exhibit.answer == "holds"
    written = {path.name for path in exhibits.write(exhibit, tmp_path / "paper")}
    assert written == {f"figure-4{end}" for end in (".pdf", ".png", ".csv", "-density.csv", "-tests.csv", ".json")}
    assert sentences(exhibit.caption) == 3
    top = exhibit.frame[(exhibit.frame.matrix == "functional") & (exhibit.frame.seed == 1)].top_value
    assert top.to_list() == pytest.approx([3.3, 3.3, 4.4, 4.4])
    axis = exhibit.figure.axes[0]
    low, high = axis.get_xlim()
    marks = [x for line in axis.lines if line.get_marker() == "v" for x in line.get_xdata()]
    assert len(marks) == 5  # of H and H_F both ends
    assert low < min(marks)
    assert max(marks) < high


def flat(trained, fitted, share=0.25, scale=1.5):
    """The same with a fitted temperature."""
    return {
        **curvature(trained, share),
        "temperature": {"scale": scale, "loss": 3.0, "fitted_loss": 2.9, **curvature(fitted, share)},
    }


def test_table_4_has_its_lengths_in_units_of_the_steps_of_the_command_line():
    configs = exhibits.needed("table-4", overrides=("training.steps=10", "optimizer.warmup_steps=1"))
    assert {config.training.steps for config in configs if config.method.name == "adamw"} == {7, 10, 14}
    assert {config.training.steps for config in configs if config.method.name == "sam"} == {10}


def test_table_4_tells_temperature_from_flatness(tmp_path):
    """SAM's flatness goes with the temperature, Functional-SAM's stays, others have none; one method diverged once."""
    overrides = (f"runtime.runs={tmp_path / 'runs'}",)
    configs = exhibits.needed("table-4", overrides=overrides)
    spec = load_spec("table-4", "quick")
    random = np.random.default_rng(0)
    gone = next(c for c in configs if c.method.name == "asam" and c.training.init_seed == 1)
    assert gone.method.rho == pytest.approx(0.5)  # ten times the others': its own unit
    lengths = sorted({config.training.steps for config in configs if config.method.name == "adamw"})
    assert [steps / lengths[1] for steps in lengths] == [0.7, 1.0, 1.4]
    trained = {"sam": 0.5, "functional-sam": 0.5, "logit-sam": 1.5}
    fitted = {"sam": 0.95, "functional-sam": 0.52, "logit-sam": 1.5}
    shares, losses = {}, {}
    for config in configs:
        method, seed = config.method.name, config.training.init_seed
        if config is gone:
            record(config, loss=None, diverged=True, error="step 7")
            continue
        wobble = 1 + 0.01 * math.sin(7 * seed + len(method))
        share = float(random.uniform(0.1, 0.9))
        if method == "adamw":  # longer training: a lower loss, and exp of it the curvature
            loss = 4.0 + 0.3 * seed + {0.7: 0.1, 1.0: 0.0, 1.4: -0.1}[config.training.steps / lengths[1]]
            content = flat(math.exp(4.0 + 0.3 * seed - loss), math.exp(4.0 + 0.3 * seed - loss), share)
        else:
            loss = 4.0 + 0.01 * spec.methods.index(method) + 0.3 * seed
            content = flat(trained.get(method, 1.0) * wobble, fitted.get(method, 1.0) * wobble, share)
        if config.training.steps == lengths[1]:
            shares.setdefault(seed, {})[method] = share
            losses.setdefault(seed, {})[method] = loss
        content["temperature"]["fitted_loss"] = loss
        record(config, loss=loss).write("curvature.json", content)
    exhibit = exhibits.draw("table-4", overrides=overrides)
    found = exhibit.frames["temperature"].set_index("method")
    assert found.verdict.to_dict() == {
        "sam": "mostly temperature",
        "functional-sam": "mostly not temperature",
        **dict.fromkeys(["logit-sam", "precond-sam", "precond-functional-sam", "sam-on"], "flatness not significant"),
        "asam": flatness.UNKNOWN,
    }
    assert found.fraction["sam"] == pytest.approx(1 - math.log(0.95) / math.log(0.5), abs=0.05)
    assert found.low["sam"] < found.fraction["sam"] < found.high["sam"]
    assert found.b["logit-sam"] == pytest.approx(math.log(1.5), abs=0.01)
    # At the loss of SAM, .01 above AdamW's, AdamW's curve of log tr H against the loss lies .01 lower.
    assert found.matched_b["sam"] == pytest.approx(found.b["sam"] + 0.01, abs=1e-9)
    assert found.matched_n["sam"] == 3

    taus = exhibit.frames["kendall"].set_index(["state", "field"])
    by_seed = [stats.kendalltau(list(shares[seed].values()), list(losses[seed].values()))[0] for seed in (0, 1, 2)]
    assert taus.loc[("trained", "share"), "tau"] == pytest.approx(np.mean(by_seed))
    assert taus.loc[("trained", "share"), "stderr_seeds"] == pytest.approx(np.std(by_seed, ddof=1) / math.sqrt(3))
    left_out = []  # the jackknife by hand
    for method in spec.methods:
        kept = [[(shares[s][m], losses[s][m]) for m in shares[s] if m != method] for s in (0, 1, 2)]
        left_out.append(np.mean([stats.kendalltau(*zip(*pairs, strict=True))[0] for pairs in kept]))
    m = len(spec.methods)
    by_hand = math.sqrt((m - 1) / m * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    assert taus.loc[("trained", "share"), "stderr_methods"] == pytest.approx(by_hand)
    assert exhibit.answer == "holds"  # SAM's flatness is the temperature's, Functional-SAM's is not
    exhibits.write(exhibit, tmp_path / "paper")
    text = (tmp_path / "paper" / "tables" / "table-4.md").read_text()
    assert "| ASAM | infinite |" in text
    assert "1 of 30 runs diverged, of methods of whose flatness nothing is told: ASAM" in text
    assert f"{flatness.UNKNOWN}: ASAM" in exhibit.verdict
    assert "|delta_func|".replace("|", "\\|") in text
    widths = {line.replace("\\|", "").count("|") - 1 for line in text.splitlines() if line.startswith("|")}
    assert max(widths) == 9
    assert sentences(exhibit.caption) == 3
    assert "Published: values not available." in text
    assert "as the paper says" in exhibit.verdict


def test_a_loss_that_follows_all_curvature_is_ranked_by_it():
    """tau 1 in every seed and without any method; the bottom counts by its magnitude."""
    rows = [
        {"geometry": "plain", "state": "trained", "length": 1.0, "seed": seed, "method": f"m{k}", "loss": 4 + k + seed}
        | dict.fromkeys(flatness.RANKED, float(k))
        | {"bottom_functional": -1.0 - k, "norm_gradient": -float(k)}
        for seed in range(3)
        for k in range(5)
    ]
    taus = flatness.kendall(pd.DataFrame(rows)).set_index("field")
    assert taus.loc[["top_hessian", "bottom_functional"], "tau"].to_list() == pytest.approx([1.0, 1.0])
    assert taus.reading.top_hessian == "ranks as the loss"
    assert taus.reading.norm_gradient == "ranks against the loss"
    assert taus.stderr_methods.top_hessian == pytest.approx(0.0, abs=1e-12)


def test_half_of_the_flatness_is_the_limit_and_no_loss_is_matched_beyond_adamws():
    """A temperature undoes .4 of SAM's flatness and .6 of ASAM's, whose loss is above those of AdamW of all lengths."""

    def row(method, seed, state, loss, log_trace, length=1.0):
        own = {"geometry": "plain", "method": method, "length": length, "seed": seed, "state": state}
        return own | {"loss": loss + seed, "trace_hessian": math.exp(log_trace)}

    rows = []
    for seed in range(4):
        for number, state in enumerate(flatness.STATES):
            rows += [row("adamw", seed, state, loss, 0.0, length) for loss, length in ((4.0, 1.0), (4.1, 0.7), (3.9, 1.4))]
            for method, undone, loss in (("sam", 0.4, 4.05), ("asam", 0.6, 4.3)):
                rows.append(row(method, seed, state, loss, number * undone - 1.0 + 0.01 * math.sin(7 * seed + number)))
    found = flatness.undone(pd.DataFrame(rows)).set_index("method")
    assert found.verdict.to_dict() == {"sam": flatness.OWN, "asam": flatness.EXPLAINED}
    assert found.matched_n.to_dict() == {"sam": 4, "asam": 0}
    assert math.isnan(found.matched_b["asam"])
    assert math.isnan(found.matched_a["asam"])


def test_taus_that_few_methods_carry_are_no_ranking_though_all_seeds_agree():
    """The larger p of the two decides: over seeds there is no spread at all."""
    rows = [
        {"geometry": "plain", "state": "trained", "length": 1.0, "seed": seed, "method": f"m{k}", "loss": 4.0 + k + seed}
        | dict.fromkeys(flatness.RANKED, float(rank))
        for seed in range(3)
        for k, rank in enumerate((2, 1, 3, 5, 4))
    ]
    taus = flatness.kendall(pd.DataFrame(rows)).set_index("field")
    assert taus.tau.top_hessian == pytest.approx(0.6)
    assert taus.stderr_seeds.top_hessian == 0.0
    assert Estimate(0.6, taus.stderr_methods.top_hessian, 5).p > 0.05
    assert set(taus.reading) == {flatness.OPEN}


def test_the_loss_at_the_fitted_temperature_is_the_fitted_one(tmp_path):
    config = exhibits.needed("table-4", overrides=(f"runtime.runs={tmp_path}",))[0]
    record(config, loss=3.0).write("curvature.json", flat(2.0, 1.0))
    rows = pd.DataFrame(flatness.measures(config, RunDirectories(), 1.0)).query("geometry == 'plain'").set_index("state")
    trained, fitted = rows.loc[list(flatness.STATES), ["loss", "scale", "trace_hessian"]].to_numpy().tolist()
    assert (trained, fitted) == ([3.0, 1.0, 16.0], [2.9, 1.5, 8.0])


def test_a_run_measures_the_curvature_of_its_final_weights(cache, tmp_path):
    size = ["model.width=16", "model.depth=1", "model.length=32", "training.steps=6", "training.batch=4", "training.eval_rows=8"]
    size += ["measure.rows=4", "measure.micro_batch=2", "optimizer.warmup_steps=2", "runtime.threads=1"]
    size += ["training.precision=float64", f"runtime.cache={cache}"]
    more = ["measure.curvature=true", "measure.probes=8", "measure.density_probes=2", "measure.density_order=12"]
    more += ["measure.temperature=true", "measure.lanczos=20"]
    plain = loop.train(compose("language", "sam", "quick", overrides=[*size, f"runtime.runs={tmp_path / 'plain'}"]))
    config = compose("language", "sam", "quick", overrides=[*size, *more, f"runtime.runs={tmp_path / 'measured'}"])
    run = loop.train(config)
    assert config.hash != plain.config.hash
    without_times = [{k: v for k, v in line.items() if k not in loop.TIMES} for line in run.metrics()]
    assert without_times == [{k: v for k, v in line.items() if k not in loop.TIMES} for line in plain.metrics()]

    found = run.read("curvature.json")
    state = torch.load(next((run.directory / "checkpoint").glob("*.pt")), weights_only=True)
    task = prepare(config)
    model = task.model().double()
    model.load_state_dict(state["model"])
    batches = task.measured()
    products = CurvatureProducts(model.eval(), batches)
    parts = decompose(model, batches)
    assert found["ascents"]["gradient"]["norm_func"] == pytest.approx(parts.norm_func, rel=1e-9)
    H = {}
    for name in MATRICES:  # the whole matrix, a column at a time, of the norms only
        chosen = CurvatureProducts(model, batches, parameters=["blocks.0.*norm*", "norm*"])
        columns = []
        for i in range(sum(p.numel() for p in chosen.parameters)):
            flat = torch.zeros(sum(p.numel() for p in chosen.parameters), dtype=torch.float64)
            flat[i] = 1.0
            v = [
                part.view_as(p)
                for part, p in zip(flat.split([p.numel() for p in chosen.parameters]), chosen.parameters, strict=True)
            ]
            columns.append(torch.cat([x.flatten() for x in getattr(chosen, name)(v)]))
        H[name] = torch.linalg.eigvalsh(torch.stack(columns))
        own = found["geometries"]["plain"][name]
        # Eigenvalues of a block lie between those of the whole (Cauchy).
        assert own["top"]["value"] >= float(H[name].max()) - 1e-6
        assert own["bottom"]["value"] <= float(H[name].min()) + 1e-6 + own["bottom"]["residual"]
        weights = torch.tensor(own["density"]["weights"])
        assert weights.shape == (2, 12)
        assert torch.allclose(weights.sum(1), torch.ones(2))
    traces = {name: found["geometries"]["plain"][name]["trace"] for name in MATRICES}
    assert traces["hessian"]["mean"] == pytest.approx(traces["gauss_newton"]["mean"] + traces["functional"]["mean"])
    g = products.loss_and_gradient()[1]
    linear = found["ascents"]["gradient"]["quadratic_fit"][0]["linear"]
    assert linear == pytest.approx(0.01 * math.sqrt(sum(float(x.square().sum()) for x in g)), rel=1e-6)
    with torch.no_grad():
        logits = torch.cat([model(x)[t >= 0] for x, t in batches])
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert found["logits"]["entropy"] == pytest.approx(float(entropy), rel=1e-5)
    spread = (logits.var(-1, correction=0) * logits.shape[-1]).sqrt().mean()
    assert found["logits"]["norm"] == pytest.approx(float(spread), rel=1e-5)

    fitted = found["temperature"]
    assert fitted["fitted_loss"] < fitted["loss"] == pytest.approx(run.summary()["loss"], rel=1e-9)
    assert fitted["logits"]["norm"] == pytest.approx(fitted["scale"] * found["logits"]["norm"], rel=1e-6)
    there = decompose(model, batches, forward=scaled(task.forward, fitted["scale"]))
    assert fitted["geometries"]["plain"]["functional"]["norm"] == pytest.approx(there.norm_func, rel=1e-9)
    assert set(fitted["geometries"]) == {"plain", "adam"}


def test_measuring_leaves_the_model_as_it_was(cache):
    config = compose(
        "vision",
        "adamw",
        "quick",
        overrides=["model.width=16", "model.depth=1", "measure.rows=4", "measure.micro_batch=4", f"runtime.cache={cache}"],
    )
    task = prepare(config)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets = task.batch(0)[0]
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    before, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    json.dumps(final_curvature(model, optimizer, task, task.measured()))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_a_method_that_broke_does_not_choose_the_unit_of_a_column():
    head, cells = table_4._scaled("top of H", [Estimate(mean, 0.1, 5) for mean in (1.93, 1.18, 1.36, 1430.2)])
    assert head == "top of H"
    assert [cell.split()[0] for cell in cells] == ["1.93", "1.18", "1.36", "1430"]


def test_table_4_says_of_flatness_that_is_not_there_that_nothing_is_undone():
    row = {"geometry": "plain", "b_half": 0.1, "fraction": 0.4, "low": math.nan, "high": math.nan, "verdict": flatness.FLAT}

    def said(sam, monkeypatch):
        found = pd.DataFrame([row | {"method": "sam", "b": sam}, row | {"method": "functional-sam", "b": -0.2}])
        monkeypatch.setattr(table_4, "undone", lambda _: found)
        return table_4.headline(pd.DataFrame())

    with pytest.MonkeyPatch.context() as patch:
        assert said(-0.3, patch).endswith("; temperature undoes 0.40 of SAM's")
        assert "undoes" not in said(0.3, patch)  # SAM is sharper
        assert "SAM not known, Functional-SAM" in said(math.nan, patch)


def test_the_second_family_holds_all_methods_and_not_those_that_passed_the_first():
    """p is .02 for the contrast of the one that is flatter: significant alone, not among three."""
    flat, not_flat = Estimate(-1.0, 0.01, 5), Estimate(0.1, 1.0, 5)
    contrast = Estimate(0.37, 0.1, 5)
    assert 0.05 / 3 < contrast.p < 0.05
    family = [({"b": -1.0}, flat, contrast), *[({"b": 0.1}, not_flat, Estimate(0.0, 1.0, 5))] * 2]
    assert flatness._judged(family[:1])[0]["verdict"] == flatness.OWN
    assert [row["verdict"] for row in flatness._judged(family)] == [flatness.OPEN, flatness.FLAT, flatness.FLAT]


def test_the_level_that_a_notebook_changes_moves_verdicts_too(monkeypatch):
    """The cell "Change one thing" sets compare.LEVEL: no exhibit may have read it before."""
    tests = pd.DataFrame({"p_holm": [0.1], "difference": [-1.0]})
    trained, contrast = Estimate(-1.0, 0.3, 3), Estimate(-1.0, 0.3, 3)  # p = .08
    assert figure_4.smaller_in_language(tests) == ["inconclusive"]
    assert flatness._judged([({"b": -1.0}, trained, contrast)])[0]["verdict"] == flatness.FLAT
    monkeypatch.setattr(compare, "LEVEL", 0.8)
    assert figure_4.smaller_in_language(tests) == ["better"]
    assert flatness._judged([({"b": -1.0}, trained, contrast)])[0]["verdict"] == flatness.EXPLAINED


def test_flatness_without_a_logarithm_is_not_known():
    """A trace may come out negative, of a method that broke: that is no flatness that is "not significant"."""
    rows = [
        {
            "geometry": "plain",
            "method": method,
            "length": 1.0,
            "seed": seed,
            "state": state,
            "loss": 4.0 + seed,
            "trace_hessian": trace,
        }
        for method, traces in (("adamw", (5.0, 6.0)), ("gsam", (7.0, -1.0)))
        for seed, trace in enumerate(traces)
        for state in flatness.STATES
    ]
    (row,) = flatness.undone(pd.DataFrame(rows)).itertuples()
    assert row.verdict == flatness.UNKNOWN
