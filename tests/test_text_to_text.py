"""T5 text to text: what it reads and answers, its head, the methods against their definitions, plans against real steps."""

import json

import huggingface_hub
import numpy as np
import pyarrow
import pytest
import torch
from any_task import in_table, killed_and_resumed, settings_read, timeless, with_one_mask
from memory_simulation import Storages
from pyarrow import parquet
from test_superglue import question_of
from tiny_pretrained import save_tokenizer_of_t5
from torch.utils.flop_counter import FlopCounterMode

from functional_sam.config import compose
from functional_sam.data.labelled import pretrained_directory
from functional_sam.data.text_to_text import in_words
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy
from functional_sam.models.t5 import t5
from functional_sam.planning import Layout, gpu, memory, need
from functional_sam.planning.cost import run_cost
from functional_sam.sharpness import SharpnessAware
from functional_sam.study.design import load_study, make, trials
from functional_sam.tasks import prepare
from functional_sam.tasks.text_to_text import SIZES, TextToText
from functional_sam.training import loop
from functional_sam.training.optimizers import optimizer_of

SPOKEN = [*"abcdefghijklmnopqrstuvwxyz", *"*#.?", "rte", "premise:", "hypothesis:", "entailment", "not_entailment", "yes", "no"]
SPOKEN += ["multirc", "question:", "paragraph:"]
SMALL = ["model.width=32", "model.depth=2", "model.heads=3", "model.head_width=8", "model.mlp=48", "model.length=24"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Overrides of a tiny T5 that judges made-up texts in SuperGLUE's files."""
    root, tokenizer, cache = (tmp_path_factory.mktemp(name) for name in ("hub", "tokenizer", "cache"))
    vocab = save_tokenizer_of_t5(tokenizer, SPOKEN)
    draw = np.random.RandomState(0)
    for task in ("rte", "multirc"):
        folder = root / "super_glue" / task
        folder.mkdir(parents=True)
        for split, count in (("train", 60), ("validation", 16)):
            rows = []
            for i in range(count):
                words = [" ".join(draw.choice(list("abcdefgh"), size=draw.randint(2, 7))) for _ in range(2)]
                own = {"premise": f"{words[0]} {i}", "hypothesis": words[1], "label": int(draw.randint(2))}
                rows += [own] if task == "rte" else question_of(task, i, draw, False)
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    given = ["model.pretrained=null", f"data.tokenizer={tokenizer}", f"runtime.data={root}", f"runtime.cache={cache}"]
    given += [
        *SMALL,
        f"data.vocab={vocab + 3}",
        "training.batch=8",
        "training.steps=4",
        "training.eval_batch=7",
        "runtime.threads=1",
    ]
    return [*given, "optimizer.warmup_steps=1", "measure.doses=0", "measure.ascents=[gradient]", "runtime.log_every=1"]


def config(made, method="adamw", *overrides, task="t5-small-superglue"):
    return compose(task, method, overrides=[*made, *overrides])


@pytest.fixture(scope="module")
def task(made):
    return prepare(config(made))


@pytest.fixture(scope="module")
def model(task):
    return task.model().double().eval()


# ---------------------------------------------------------------------- what it reads, and what it answers


def test_fields_have_names():
    assert in_words("super-glue/rte", ("A b.", "C.", 1.0)) == ("rte premise: A b. hypothesis: C.", None, 1.0)
    assert in_words("super-glue/wsc", ("* A * # it #", None, 0.0))[0] == "wsc text: * A * # it #"
    assert in_words("super-glue/copa", ("A.", "so b", 1.0))[0] == "copa premise: A. choice: so b"
    # what may be cut, the passage, comes last
    assert in_words("super-glue/multirc", ("Q? x", "P.", 1.0))[0] == "multirc question: Q? x paragraph: P."
    assert in_words("super-glue/boolq", ("q", "p", 1.0))[0] == "boolq question: q passage: p"
    assert in_words("question-type", ("Who?", None, 3.0))[0] == "question-type text: Who?"


def test_answers_are_the_names_of_the_classes_and_their_end(task):
    spelled = {word: 3 + i for i, word in enumerate(SPOKEN)}
    assert task.data.answers == [[spelled["entailment"], 1], [spelled["not_entailment"], 1]]
    inputs, targets = task.rows(0)
    _, labels = super(type(task.data), task.data).train_batch(0, 8, 0)
    assert targets.tolist() == [task.data.answers[label] for label in labels.tolist()]
    assert (inputs["input_ids"][:, :2] == torch.tensor([spelled["rte"], spelled["premise:"]])).all()
    assert (inputs["input_ids"] == spelled["hypothesis:"]).sum(1).tolist() == [1] * 8
    ends = inputs["attention_mask"].sum(1) - 1
    assert (inputs["input_ids"].gather(1, ends[:, None]) == 1).all()


def test_answers_of_different_lengths_are_padded_and_shifted_as_t5_does_it(task, model, monkeypatch):
    monkeypatch.setitem(task.data.manifest, "answers", [[9, 1], [8, 7, 6, 1]])
    inputs, targets = task.data.answered({}, torch.tensor([0, 1]))
    assert targets.tolist() == [[9, 1, IGNORE, IGNORE], [8, 7, 6, 1]]
    assert inputs["decoder_input_ids"].tolist() == [[0, 9, 1, 0], [0, 8, 7, 6]]
    assert torch.equal(inputs["decoder_input_ids"], model._shift_right(targets))


def test_loss_is_the_models_own(task, model):
    inputs, targets = task.rows(0)
    with torch.no_grad():
        total, count = cross_entropy(task.forward(model, inputs), targets)
    own = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=targets)
    assert float(total / count) == pytest.approx(own.loss.item(), rel=1e-12)
    assert float(total / count) == pytest.approx(np.log(task.config.data.vocab), rel=0.5)


def wider(batch, more=5):
    """The same rows in more columns."""
    inputs, targets = batch
    pad = torch.nn.functional.pad
    return {name: pad(tensor, (0, more)) for name, tensor in inputs.items()}, pad(targets, (0, more), value=IGNORE)


@pytest.mark.parametrize("method", ["adamw", "functional-sam"])
def test_padding_changes_nothing(task, method):
    """But for T5's norms, which are taken in float32 whatever the weights are."""
    found = []
    for change in (lambda batch: batch, wider):
        model = task.model().double().eval()
        optimizer = optimizer_of(task.config.optimizer, task, model)
        sharpness = SharpnessAware(model, optimizer, method, loss_fn=task.loss_fn, forward=task.forward)
        batch = change(task.rows(0))
        with torch.no_grad():
            logits = task.forward(model, batch[0])[batch[1] >= 0]
        loss = sharpness.backward([batch])
        found.append((logits, loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert found[0][2].norm() > 1e-3


def test_a_text_is_judged_by_the_likelihood_of_whole_names(task, model, monkeypatch):
    """Names of different lengths; against the loss that the model itself takes of one text and one name, alone and unpadded."""
    monkeypatch.setitem(task.data.manifest, "answers", [[9, 1], [8, 7, 6, 1], [5, 5, 1]])
    inputs, _ = next(task.held_out("test", 8, None))
    with torch.no_grad():
        scores = task.scores(model, inputs)
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            text = ids[mask.bool()][None]
            for label, answer in enumerate(task.data.answers):
                own = -model(input_ids=text, labels=torch.tensor([answer])).loss * len(answer)
                assert float(scores[row, label]) == pytest.approx(float(own), abs=1e-4)
    assert scores.std(0).min() > 1e-5  # the text matters


def test_an_evaluation_counts_right_answers_and_nats_of_the_class_among_the_classes(task):
    model = task.model().eval()
    found = task.evaluate(model, "test")
    right, nats = [], []
    with torch.no_grad():
        for inputs, labels in task.held_out("test", 100, None):
            log_p = task.scores(model, inputs)
            right += (log_p.argmax(1) == labels).tolist()
            own = log_p.log_softmax(-1)
            nats += (-own.gather(1, labels[:, None])).flatten().tolist()
    beside = {name: found.pop(name) for name in ("matthews", "f1")}  # tests/test_finetune.py says what they are
    assert found == pytest.approx({"accuracy": np.mean(right), "loss": np.mean(nats), "texts": 16}, rel=1e-5)
    assert all(-1 <= value <= 1 for value in beside.values())
    assert len(set(right)) == 2


# ---------------------------------------------------------------------- the model


def test_the_head_is_its_own_unless_it_is_tied(task, made):
    own = task.model()
    assert own.lm_head.weight is not own.shared.weight
    assert own.encoder.embed_tokens.weight is own.decoder.embed_tokens.weight is own.shared.weight
    assert float(own.lm_head.weight.detach().std()) == pytest.approx(32**-0.5, rel=0.1)
    tied = prepare(config(made, "adamw", "model.tied=true"))
    for a, b, more in ((task, own, 1), (tied, tied.model(), 0)):
        shape = TextToText.shape(a.config)
        assert sum(p.numel() for p in b.parameters()) == shape.parameters == run_cost(a.config).parameters
        assert shape.parameters - shape.non_embedding == (1 + more) * a.config.data.vocab * 32
    inputs, _ = task.rows(0)
    for model, scale in ((own.eval(), 1.0), (tied.model().eval(), 32**-0.5)):
        with torch.no_grad():
            h = model(**inputs, output_hidden_states=True, use_cache=False)
        torch.testing.assert_close(h.logits, scale * h.decoder_hidden_states[-1] @ model.lm_head.weight.T)
    assert torch.equal(task.model().lm_head.weight, own.lm_head.weight)
    other = prepare(config(made, "adamw", "training.init_seed=1")).model()
    assert not torch.equal(other.lm_head.weight, own.lm_head.weight)


def test_a_local_folder_is_what_was_saved_there(task, made, tmp_path):
    saved = task.model()
    saved.save_pretrained(tmp_path)
    given = f"model.pretrained={tmp_path}"
    loaded = prepare(config(made, "adamw", given)).model()
    assert loaded.training
    assert loaded.lm_head.weight is not loaded.shared.weight
    theirs = saved.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(UserError, match=r"head of .* is its own: set model\.tied=false"):
        prepare(config(made, "adamw", given, "model.tied=true")).model()
    for override, words in (
        ("model.mlp=64", r"has d_ff=48: set model\.mlp"),
        ("model.head_width=16", r"d_kv=8: set model\.head_width"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(config(made, "adamw", given, override)).model()
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"feed_forward_proj": "relu"}))
    with pytest.raises(UserError, match=r"feed_forward_proj=relu: a t5 is T5\.1\.1 here"):
        prepare(config(made, "adamw", given)).model()


@pytest.mark.parametrize(("size", "parameters"), [("small", 76_961_152), ("base", 247_577_856)])
def test_published_sizes(size, parameters):
    """The numbers of parameters of google/t5-v1_1-small and -base."""
    own = compose(f"t5-{size}-superglue", "sam", "paper")
    with torch.device("meta"):
        model = t5(sizes_of(own), own.model.tied, own.model.dropout)
    assert sum(p.numel() for p in model.parameters()) == run_cost(own).parameters == parameters
    assert (own.optimizer.name, own.optimizer.relative, own.optimizer.lr, own.training.batch) == ("adafactor", False, 1e-3, 128)


def sizes_of(own):
    s = TextToText.shape(own)
    return dict(zip(SIZES.values(), (s.D, s.N, s.H, s.head, s.F, s.V), strict=True))


# ---------------------------------------------------------------------- methods and optimizer


def by_hand(model, batch, method, rho):
    """g at theta, theta' = theta + rho g / |g|, and there J^T u with u of theta' (SAM) or of theta (Functional-SAM)."""
    inputs, targets = batch
    params = list(model.parameters())

    def logits():
        return model(**inputs, use_cache=False).logits

    def u_of(z):
        leaf = z.detach().requires_grad_()
        flat, wanted = leaf.flatten(0, 1), targets.flatten()
        log_p = flat.log_softmax(-1)[wanted != IGNORE]
        loss = -log_p.gather(1, wanted[wanted != IGNORE][:, None]).mean()
        return torch.autograd.grad(loss, leaf)[0]

    z = logits()
    u = u_of(z)
    g = torch.autograd.grad(z, params, u)
    size = torch.sqrt(sum(one.square().sum() for one in g))
    with torch.no_grad():
        for p, one in zip(params, g, strict=True):
            p += rho * one / size
    z_ = logits()
    found = torch.autograd.grad(z_, params, u_of(z_) if method == "sam" else u)
    with torch.no_grad():
        for p, one in zip(params, g, strict=True):
            p -= rho * one / size
    return torch.cat([one.flatten() for one in found]), torch.cat([one.flatten() for one in g])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["sam", "functional-sam"])
def test_methods_are_their_definitions(method, tied, made):
    """In float64 on rows of different lengths, in two micro-batches. T5's norms are taken in float32: hence 1e-5."""
    own = prepare(config(made, method, f"model.tied={str(tied).lower()}", "model.dropout=0"))
    model = own.model().double()
    optimizer = optimizer_of(own.config.optimizer, own, model)
    sharpness = SharpnessAware(model, optimizer, method, 0.1, loss_fn=own.loss_fn, forward=own.forward)
    inputs, targets = own.rows(0)
    parts = [({name: value[rows] for name, value in inputs.items()}, targets[rows]) for rows in (slice(3), slice(3, 8))]
    sharpness.backward(parts)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected, g = by_hand(model, (inputs, targets), method, 0.1)
    other, _ = by_hand(model, (inputs, targets), "functional-sam" if method == "sam" else "sam", 0.1)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (other - expected).norm() > 1e-3 * expected.norm()  # the test can tell them apart, and from the plain gradient
    assert (g - expected).norm() > 1e-3 * expected.norm()


def test_both_passes_have_the_same_dropout(task):
    with_one_mask(task, "functional-sam")


def test_a_step_of_adafactor_is_the_learning_rate_whatever_the_weights_are(task, made):
    """Of a vector, whose second moment after one step is g^2: lr sign(g), or, relative, that times the root mean square."""
    relative = prepare(config(made, "adamw", "optimizer.relative=true"))
    for own, factor in ((task, 1.0), (relative, 7.0)):
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.full((5,), 7.0))
        optimizer = optimizer_of(own.config.optimizer, own, model)
        model.w.grad = torch.tensor([1.0, -2.0, 0.1, 3.0, -1.0])
        optimizer.step()
        torch.testing.assert_close(7.0 - model.w.detach(), 1e-3 * factor * model.w.grad.sign(), rtol=1e-2, atol=0)
    with pytest.raises(UserError, match=r"optimizer\.relative=False is for optimizer\.name=adafactor"):
        config(made, "adamw", "optimizer.name=adamw")


def test_adafactor_has_no_second_moment_to_look_along(made, tmp_path):
    """It keeps sums of rows and columns alone."""
    with pytest.raises(UserError, match="second moment"):
        loop.train(config(made, "precond-sam"), tmp_path)


@pytest.mark.slow
def test_a_step_of_t5_small_as_it_is():
    """Its real shape and vocabulary on two rows: SAM with Adafactor, every weight put back before the step and changed by it."""
    own = compose("t5-small-superglue", "sam", overrides=["training.batch=2"])
    torch.manual_seed(0)
    model = t5(sizes_of(own), tied=False, dropout=0.1).train()
    holder = TextToText.__new__(TextToText)
    holder.config = own
    optimizer = optimizer_of(own.optimizer, holder, model)
    sharpness = SharpnessAware(model, optimizer, "sam", 0.05, forward=holder.forward)
    before = [p.detach().clone() for p in model.parameters()]
    loss = float(sharpness.backward([row(own, 2, read=48)], measure_dose=True))
    assert loss == pytest.approx(np.log(32128), rel=0.2)
    assert 0 < sharpness.dose < 10
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step()
    moved = [float((p.detach() - old).square().mean().sqrt()) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(0 < size <= 1.001e-3 for size in moved)  # lr, at a root mean square of at most 1
    with torch.no_grad():
        again = cross_entropy(holder.forward(model.eval(), row(own, 2, read=48)[0]), row(own, 2, read=48)[1])
    assert float(again[0] / again[1]) < loss


# ---------------------------------------------------------------------- plans


def row(own, rows, read=0):
    """Rows as long as the plan takes all of them to be, or of `read` pieces."""
    s = TextToText.shape(own)
    ids = torch.full((rows, read or s.L), 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": torch.full((rows, s.T), 5)}
    return inputs, torch.full((rows, s.T), 6)


def ready(own):
    torch.manual_seed(0)
    model = t5(sizes_of(own), own.model.tied, own.model.dropout).train()
    holder = TextToText.__new__(TextToText)
    holder.config = own
    optimizer = optimizer_of(own.optimizer, holder, model)
    return model, optimizer, SharpnessAware(model, optimizer, own.method.name, own.method.rho, forward=holder.forward)


@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam", "asam"])
def test_flops_are_those_counted(made, method):
    own = config(made, method)
    model, optimizer, sharpness = ready(own)
    model.set_attn_implementation("eager")  # plain products, which the counter knows
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            sharpness.backward([row(own, 8)])
            optimizer.step()
    assert run_cost(own).step == pytest.approx(counter.get_total_flops(), rel=1e-9)


CASES = [
    ("adamw", ()),
    ("adamw", ("model.depth=4", "model.mlp=256")),
    ("functional-sam", ("model.length=64",)),
    ("functional-sam", ("training.micro_batch=4",)),
    ("sam", ("model.dropout=0", "data.vocab=4000", "model.tied=true")),
]


@pytest.mark.parametrize(("method", "overrides"), CASES, ids=[f"{m} {' '.join(o)}" for m, o in CASES])
def test_peak_of_real_steps(made, method, overrides):
    """Every byte of storage on this CPU, within 3 %."""
    own = config(made, method, "data.vocab=300", *overrides)
    model, optimizer, sharpness = ready(own)
    batches = [row(own, own.micro_batch) for _ in range(8 // own.micro_batch)]
    tracker = Storages()
    tracker.see([*model.parameters(), *model.buffers()])
    given = sum(x.untyped_storage().nbytes() for inputs, labels in batches for x in (*inputs.values(), labels))
    tracker.see(batches)
    with tracker:
        for step in range(2):
            tracker.peak = tracker.now if step else 0
            sharpness.backward(batches)
            optimizer.step()
            optimizer.zero_grad()
    assert memory(own, Layout(cpu=True)).total == pytest.approx(tracker.peak - given, rel=0.03)


def test_the_study_of_the_paper_is_planned_as_published():
    study = load_study("finetune", "paper")
    cells = [cell for cell in study.part("methods") if cell.task.startswith("t5-")]
    tried = {cell.name: {name: trials(study, cell, name, cell.lr[0]) for name in cell.entries} for cell in cells}
    assert all(len(found) == 1 for of in tried.values() for found in of.values())  # nothing is chosen
    runs = [make(study, cell, name, tried[cell.name][name][0], 0, reported=True) for cell in cells for name in cell.entries]
    assert {(own.model.pretrained, own.method.rho) for own in runs if own.method.name != "adamw"} == {
        ("google/t5-v1_1-small", 0.05),
        ("google/t5-v1_1-base", 0.15),
    }
    assert {own.data.share for own in runs} == {1.0, 0.05}
    assert len({own.data.texts for own in runs}) == 8
    assert {(own.optimizer.lr, own.training.batch, own.optimizer.name) for own in runs} == {(1e-3, 128, "adafactor")}
    found = need(runs[0], gpu("a100-80"))
    assert found.layout is not None
    assert found.hours > 0


# ---------------------------------------------------------------------- runs


def test_a_resumed_run_equals_an_uninterrupted_one(made, tmp_path):
    own = config(made, "functional-sam", "runtime.checkpoint_every=2", "training.test=true", "measure.doses=2", "measure.points=1")
    whole = loop.train(own, tmp_path / "whole")
    again = killed_and_resumed(own, tmp_path / "cut", step=2)
    assert [timeless(line) for line in whole.metrics()] == [timeless(line) for line in again.metrics()]
    assert {"loss", "accuracy", "test_accuracy", "test_loss", "test_texts"} <= set(whole.summary())
    (line,) = whole.metrics("decompose")
    assert 0 < line["gradient"]["share"] < 1


def test_multirc_is_judged_by_f1a(made, tmp_path):
    own = config(made, "sam", "training.test=true", "data.texts=super-glue/multirc", "model.length=32", task="t5-small-multirc")
    summary = loop.train(own, tmp_path).summary()
    assert 0 <= summary["test_f1a"] <= 1
    assert (summary["test_questions"], summary["test_texts"]) == (16, 48)


def test_a_tiny_t5_learns_to_answer(made):
    """The hypothesis is not needed: premises with an even number are entailed, by their label."""
    own = config(made, "adamw", "optimizer.lr=0.01", "model.dropout=0", "training.batch=54", "data.unique_texts=20")
    task = prepare(own)
    model = task.model()
    optimizer = optimizer_of(own.optimizer, task, model)
    for step in range(60):
        total, count = task.loss_fn(task.forward(model, task.rows(step)[0]), task.rows(step)[1])
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, targets = task.rows(0)
    reads = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        chosen = task.scores(model.eval(), reads).argmax(1)
    right = torch.tensor([task.data.answers[label] for label in chosen.tolist()]) == targets
    assert right.all(1).float().mean() > 0.9
    generated = model.generate(**reads, max_new_tokens=3, do_sample=False)[:, 1:3]
    assert (generated == targets).all(1).float().mean() > 0.9  # what it would write is what is likeliest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=encoder", "a task of kind text-to-text has a t5"),
        ("data.tokenizer=null", r"model\.pretrained or data\.tokenizer is needed"),
        ("data.texts=glue/stsb", "does not fit: kind text-to-text has classes"),
        ("data.texts=super-glue/multirc", "does not fit kind text-to-text"),
        ("model.frozen=1", "are for encoders, not for t5"),
        ("runtime.parallel=fsdp", "train a t5 with ddp"),
        ("model.checkpoint_blocks=true", "not for t5"),
        ("data.unique_pairs=5", "not for labelled texts"),
        ("measure={curvature: true, temperature: true}", "measure.temperature=True: a t5 answers in words"),
    ],
)
def test_settings_that_cannot_be(made, override, message):
    with pytest.raises(UserError, match=message):
        config(made, "adamw", override)


def test_a_tokenizer_that_does_not_fit_is_refused(made, tmp_path):
    with pytest.raises(UserError, match=r"data\.vocab=16, but the tokenizer has"):
        prepare(config(made, "adamw", "data.vocab=16"))
    save_tokenizer_of_t5(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match=r"spells two classes of super-glue/rte alike \(entailment, not_entailment\)"):
        prepare(config(made, "adamw", f"data.tokenizer={tmp_path}"))


def test_a_name_of_the_hub_is_what_was_fetched_of_it(monkeypatch, tmp_path):
    """Asked of the hub's own client, which knows where it keeps files; nothing is fetched."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: asked.append(names))
    with pytest.raises(UserError, match="hf download google/t5-v1_1-small"):
        prepare(compose("t5-small-superglue", "adamw", "paper"))
    assert asked == [("google/t5-v1_1-small", "config.json")]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    assert pretrained_directory("google/t5-v1_1-small") == tmp_path


def test_the_table_of_settings_holds_all_that_it_reads(made, monkeypatch):
    assert settings_read(config(made), monkeypatch) <= in_table("t5")
