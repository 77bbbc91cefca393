"""Changes of the final weights: rounding and noise by hand, the weights put back, the other text cut by the run's own tokenizer."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from functional_sam.config import compose
from functional_sam.errors import UserError
from functional_sam.records import Run
from functional_sam.tasks import TASKS, prepare
from functional_sam.training import robustness as changes
from functional_sam.training import train

TINY = [
    "data.sources=[encyclopedia]",
    "training.steps=3",
    "training.eval_rows=8",
    "model.width=16",
    "model.depth=1",
    "model.length=16",
]
TINY += ["training.test=false", "measure.points=0", "training.batch=2", "optimizer.warmup_steps=1"]


def test_rounding_by_hand():
    p = torch.tensor([[3.0, -1.6, 0.4], [0.7, 0.1, 0.0]], dtype=torch.float64)
    # 3 bits: levels -3..3; row 1 in units of 1, row 2 in units of 0.7 / 3
    wanted = torch.tensor([[3.0, -2.0, 0.0], [0.7, 0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(changes.rounded(p, 0, 3), wanted, atol=1e-12)
    assert torch.equal(changes.rounded(torch.zeros(2, 2), 0, 4), torch.zeros(2, 2))
    vector = torch.randn(5)
    assert torch.equal(changes.rounded(vector, 0, 3), vector)


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_rounding_is_within_half_a_level(bits):
    p = torch.randn(20, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = p.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)
    assert ((changes.rounded(p, 0, bits) - p).flatten(1).abs() <= level[:, None] / 2 + 1e-12).all()


def test_noise_has_its_size_and_is_one_draw():
    p = torch.randn(200, 300, dtype=torch.float64) * 0.3
    moved = changes.jittered(p, 5, 0.1, 0) - p
    assert float(moved.std() / p.std()) == pytest.approx(0.1, rel=0.02)
    other = changes.jittered(2 * p, 5, 0.1, 0) - 2 * p
    assert torch.allclose(other, 2 * moved)
    assert not torch.equal(changes.jittered(p, 6, 0.1, 0), p + moved)  # another tensor of the same shape


def test_the_loss_under_noise_is_the_mean_over_draws_that_differ():
    """By hand, for a loss that is the sum of all weights."""
    task = SimpleNamespace(
        evaluate=lambda model, split: {"loss": sum(p.detach().sum().item() for p in model.parameters())}, elsewhere=lambda: None
    )
    model = make_model()
    found = changes.robustness(model, task, "cpu", torch.float64)
    for size in changes.NOISE:
        draws = [
            sum(float(changes.jittered(p.detach(), index, size, draw).sum()) for index, p in enumerate(model.parameters()))
            for draw in range(changes.DRAWS)
        ]
        assert len(set(draws)) == changes.DRAWS
        assert found["noise"][f"{size:g}"] == pytest.approx(sum(draws) / changes.DRAWS)


def test_weights_come_back_also_after_an_error():
    model = make_model()
    model.register_buffer("seen", torch.tensor(3.0))  # as a running statistic, which training elsewhere moves
    before = {name: p.clone() for name, p in model.named_parameters()}

    def fail():
        with changes.changed(model, lambda p, _: p + 1):
            assert all(torch.allclose(p, before[name] + 1) for name, p in model.named_parameters())
            model.seen.add_(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.seen == 3.0


def test_a_run_records_it_and_is_the_same_run(tmp_path):
    plain = compose("language-0.006M", "sam", "quick", overrides=[*TINY, f"runtime.runs={tmp_path}"])
    more = ["measure.robustness=true", "data.elsewhere=[technical]"]
    measured = compose("language-0.006M", "sam", "quick", overrides=[*TINY, *more, f"runtime.runs={tmp_path}"])
    assert plain.hash != measured.hash
    first, second = train(plain), train(measured)
    assert first.summary()["loss"] == second.summary()["loss"]
    record = json.loads((Run(measured).directory / "robustness.json").read_text())
    assert record["loss"] == second.summary()["loss"]
    assert record["rounding"]["8"] == pytest.approx(record["loss"], abs=0.01)
    assert list(record["elsewhere"]) == ["0", "25", "50", "100", "200"]
    there = [record["elsewhere"][step]["there"] for step in ("0", "200")]
    assert there[1] < there[0] - 0.1  # it learns the other text


def test_the_other_text_is_cut_by_the_same_tokenizer(tmp_path):
    config = compose("language-0.006M", "adamw", "quick", overrides=[*TINY, "data.elsewhere=[technical]"])
    task = TASKS["language"](config)
    other = task.elsewhere()
    assert other.data.tokenizer.decode(other.data.tokenizer.encode("a loss")) == "a loss"
    assert (other.data.directory / "tokenizer.model").read_bytes() == (task.data.directory / "tokenizer.model").read_bytes()
    assert other.data.manifest["text_sha256"] != task.data.manifest["text_sha256"]


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("language-0.006M", "data.elsewhere=[tecnical]", "technical"),
        ("vision", "data.elsewhere=[technical]", "not for images"),
    ],
)
def test_other_text_that_cannot_be(task, override, message):
    with pytest.raises(UserError, match=message):
        compose(task, "adamw", "quick", overrides=[override])


def test_a_run_is_tested_on_text_of_another_kind_cut_by_its_own_tokenizer(cache):
    """Against the loss of all its targets, row by row."""
    given = [*TINY, "data.transfer=[technical]", "training.test_rows=12", f"runtime.cache={cache}"]
    task = prepare(compose("language-0.006M", "adamw", "quick", overrides=given))
    model = task.model().eval()
    found = task.evaluate(model, "test")
    assert set(found) == {"loss", "bits_per_byte", "tokens", "loss_technical", "bits_per_byte_technical"}
    assert set(task.evaluate(model, "validation")) == {"loss", "bits_per_byte", "tokens"}
    other = task.data.elsewhere(["technical"])
    assert task.provenance["transfer"] == {"technical": other.sha256} != {"technical": task.data.sha256}
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for inputs, targets, _ in other.eval_batches("test", 1, 16, 12):
            log_p = model(inputs).log_softmax(-1)[0]
            own = [(place, int(target)) for place, target in enumerate(targets[0]) if target >= 0]
            nats -= sum(float(log_p[place, target]) for place, target in own)
            tokens += len(own)
    assert found["loss_technical"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["loss_technical"] != found["loss"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.transfer=[tecnical]", "did you mean 'technical'"),
        ("data.transfer=[news]", "other packaged text than data.sources="),
    ],
)
def test_transfer_is_to_other_text(override, words):
    with pytest.raises(UserError, match=words):
        compose("language-0.006M", "adamw", "quick", overrides=[override])
