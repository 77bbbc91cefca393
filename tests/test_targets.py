"""Shares on exact numbers of targets: which rows, how many, what is found there, and what a run writes of it."""

import itertools
import math
from collections import Counter

import pytest
import torch

from functional_sam.config import compose
from functional_sam.curvature import decompose
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE
from functional_sam.records.due import lines_due
from functional_sam.tasks import prepare
from functional_sam.training import loop
from functional_sam.training.targets import fresh_batches, logits_of, shares_by_targets, tempered

SIZE = ["model.width=16", "model.depth=1", "model.length=32", "model.patch=7", "training.steps=6", "training.batch=4"]
SIZE += ["training.eval_rows=8", "measure.micro_batch=2", "optimizer.warmup_steps=2", "runtime.threads=1", "data.images=mnist-5k"]


def config(cache, task="language", *more):
    return compose(task, "adamw", "quick", overrides=[*SIZE, f"runtime.cache={cache}", *more])


def valid(batches):
    return sum(int((targets != IGNORE).sum()) for _, targets in batches)


@pytest.mark.parametrize("name", ["language", "vision"])
def test_batches_hold_exactly_so_many_targets_of_rows_not_trained_on(cache, name):
    task = prepare(config(cache, name))
    sizes = [40, 2, 64]
    batches = fresh_batches(task, sizes)
    assert [valid(one) for one in batches] == sizes
    assert all(len(inputs) <= 2 for one in batches for inputs, _ in one)
    rows = [row for one in batches for inputs, _ in one for row in inputs]
    later = torch.cat([task.rows(step)[0] for step in range(6, 6 + len(rows))])[: len(rows)]
    assert torch.equal(torch.stack(rows), later)  # those of the steps after the last, each once
    trained = [row for step in range(6) for row in task.rows(step)[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.product(rows, trained))


@pytest.mark.parametrize("name", ["language", "vision"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shares_are_those_of_the_decomposition(cache, name, temperature):
    task = prepare(config(cache, name, f"measure.temperatures=[{temperature}]", "training.precision=float64"))
    model = task.model().double()
    optimizer = torch.optim.AdamW(model.parameters())
    place = lambda batches: [(x.double() if x.is_floating_point() else x, t) for x, t in batches]  # noqa: E731
    (found,) = shares_by_targets(model, optimizer, task, place, 1, [32])
    assert (found["targets"], found["temperature"]) == (32, temperature)
    assert "adam" not in found  # before measure.adam_from
    first, second, other = (place(batches) for batches in fresh_batches(task, [16, 16, 32]))
    forward = lambda model, inputs: task.forward(model, inputs) / temperature  # noqa: E731
    model.eval()
    same = decompose(model, first + second, forward=forward)
    eps = decompose(model, other, forward=forward).gradient
    independent = decompose(model, first + second, ascent=eps, forward=forward)
    halves = [decompose(model, half, ascent=eps, forward=forward) for half in (first, second)]
    assert found["loss"] == pytest.approx(same.loss)
    for origin, expected in (("same", same), ("independent", independent)):
        for field in ("share", "norm_logit", "norm_func", "cosine"):
            assert found["gradient"][origin][field] == pytest.approx(getattr(expected, field), rel=1e-9), (origin, field)
    for part in ("logit", "func"):
        products = zip(*(getattr(half, f"delta_{part}") for half in halves), strict=True)
        inner = sum(float((a * b).sum()) for a, b in products)
        assert found["gradient"]["independent"][f"square_{part}"] == pytest.approx(inner, rel=1e-9)
    flat = [torch.cat([g.flatten() for g in half.gradient]) for half in halves]
    assert found["square_gradient"] == pytest.approx(float(flat[0] @ flat[1]), rel=1e-9)
    assert found["norm_gradient"] == pytest.approx(float((flat[0] + flat[1]).norm()) / 2, rel=1e-9)


def test_a_temperature_divides_the_logits_with_and_without_a_readout(cache):
    task = prepare(config(cache))
    model = task.model()
    inputs, targets = fresh_batches(task, [32])[0][0]
    forward = tempered(task.forward, 4.0)
    expected = model(inputs) / 4
    torch.testing.assert_close(forward(model, inputs), expected)
    torch.testing.assert_close(forward(model, inputs, readout=lambda h, weight: h @ weight.T), expected)
    found = logits_of(model, task, [(inputs, targets)], 4.0)
    entropy = torch.distributions.Categorical(logits=expected[targets != IGNORE]).entropy().mean()
    assert found["entropy"] == pytest.approx(entropy.item(), rel=1e-5)


def test_a_run_writes_them_at_its_points_and_trains_as_without(cache, tmp_path):
    more = ["measure.points=4", "measure.targets=[8]", "measure.more_targets=[16]", "measure.adam_from=3"]
    run = loop.train(config(cache, "language", *more, f"runtime.runs={tmp_path / 'a'}"))
    points = sorted(loop.measure_steps(4, 6))
    assert points == [1, 2, 3, 6]
    lines = run.metrics("targets")
    assert [(line["step"], line["targets"]) for line in lines] == [(1, 8), (2, 8), (2, 16), (3, 8), (6, 8), (6, 16)]
    assert ["adam" in line for line in lines] == [False] * 3 + [True] * 3
    by_config = (one for one in run.metrics() if one["kind"] not in ("train", "test"))
    assert lines_due(run.config) == Counter((one["kind"], one["step"]) for one in by_config)
    assert not run.metrics("decompose")
    assert all(math.isfinite(line["gradient"]["same"]["share"]) for line in lines)
    plain = loop.train(config(cache, "language", f"runtime.runs={tmp_path / 'b'}"))
    assert [line["loss"] for line in run.metrics("train")] == [line["loss"] for line in plain.metrics("train")]


def test_settings_left_alone_change_no_name():
    """The names of runs of before these settings came."""
    assert compose("language", "adamw", "quick").hash == "d86335c62001"
    assert compose("vision", "sam", "laptop").hash == "f953e64cf52c"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("measure.targets=[7]", "7 is no even number of targets"),
        ("measure.more_targets=[8]", "give those too"),
        ("measure.temperatures=[0]", "not above 0"),
        ("model.embedding_scale=0", "embedding_scale=0"),
        ("data.relabel=40", "for images, not for text"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        compose("language", "adamw", "quick", overrides=[override])


def test_the_embedding_scale_is_that_of_the_initial_logits(cache):
    """Of the embeddings and positions alone; the blocks draw the same numbers."""
    models = [prepare(config(cache, "language", f"model.embedding_scale={scale}")).model() for scale in (1.0, 0.1)]
    one, tenth = (dict(model.named_parameters()) for model in models)
    for name in one:
        scale = 0.1 if name in ("tokens", "positions") else 1.0
        torch.testing.assert_close(tenth[name], scale * one[name])
