"""The tasks of SuperGLUE that are not one text or pair with a class: what the model reads, and how its answers are judged."""

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from scipy.special import log_softmax
from tiny_pretrained import SIZES, save_bert
from torchmetrics.functional.classification import binary_f1_score

from functional_sam import planning
from functional_sam.config import compose
from functional_sam.data import candidates, glue
from functional_sam.data.candidates import Candidate, copa, judged, multirc, overlap, record
from functional_sam.data.labelled import prepare_labelled
from functional_sam.errors import UserError
from functional_sam.study.design import load_study, make, trials
from functional_sam.tasks import prepare
from functional_sam.training import loop

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPOKEN = [*LETTERS, *"*#:.?", "because", "so"]
COUNTS = {"train": 90, "validation": 15, "test": 6}  # questions


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"), SPOKEN)


def config_of(name, pretrained, location, cache, *overrides, method="adamw"):
    kind = "answers" if name == "super-glue/multirc" else "finetune"
    given = [f"model.pretrained={pretrained}", f"data.texts={name}", f"runtime.cache={cache}", f"runtime.data={location}"]
    given += [*SIZES, f"data.vocab={5 + len(SPOKEN)}", "model.frozen=null", "model.length=32", "training.batch=8", f"kind={kind}"]
    return compose("question-type", method, "quick", overrides=[*given, *overrides])


# ---------------------------------------------------------------------- files as the hub has them


def question_of(task, i, draw, hidden):
    """The rows of a made-up question, with the columns of aps/super_glue; hidden: without its labels, as in the test split."""

    def text(least=3, most=6):
        return " ".join(draw.choice(list(LETTERS), size=draw.randint(least, most)))

    label = -1 if hidden else int(draw.randint(2))
    if task == "copa":
        row = {"premise": text(), "choice1": text(), "choice2": text(), "question": ["cause", "effect"][i % 2], "label": label}
        return [row | {"idx": i}]
    if task == "wic":
        first, second = f"{text()} q {text()}", f"q {text()}"
        start = first.index(" q ") + 1
        spans = {"start1": start, "end1": start + 1, "start2": 0, "end2": 1}
        return [{"word": "q", "sentence1": first, "sentence2": second, "label": label, "idx": i, **spans}]
    if task == "wsc":
        spans = {"span1_index": 1, "span2_index": 3, "span1_text": "b", "span2_text": "z"}
        return [{"text": f"a b {LETTERS[i % 26]} z {text()}", "label": label, "idx": i, **spans}]
    if task == "multirc":
        paragraph, question = text(8, 9), f"{text()} ?"
        where = {"paragraph": i, "question": i}
        labels = [-1 if hidden else int(draw.randint(2)) for _ in range(3)]
        return [
            {
                "paragraph": paragraph,
                "question": question,
                "answer": f"{text()} {LETTERS[k]}",
                "label": one,
                "idx": {**where, "answer": k},
            }
            for k, one in enumerate(labels)
        ]
    names = [
        f"{one} {other}" for one, other in zip(draw.permutation(list(LETTERS))[:4], draw.permutation(list(LETTERS)), strict=False)
    ]
    spans = [{"text": name, "start": 0, "end": 1} for name in names]
    asked = {"passage": f"{text(8, 9)}.\n@highlight\n{text()}", "query": f"{text()} @placeholder {text()}"}
    answers = [] if hidden else names[: draw.randint(1, 3)]
    return [asked | {"entities": names, "entity_spans": spans, "answers": answers, "idx": {"passage": i, "query": i}}]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """DIR/super_glue/TASK/SPLIT-00000-of-00001.parquet."""
    root = tmp_path_factory.mktemp("hub")
    for task in ("copa", "wic", "wsc", "multirc", "record"):
        folder = root / "super_glue" / task
        folder.mkdir(parents=True)
        draw = np.random.RandomState(0)
        for split, count in COUNTS.items():
            rows = [row for i in range(count) for row in question_of(task, i, draw, split == "test")]
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize(("task", "each"), [("copa", 2), ("multirc", 3), ("record", 4), ("wic", 1), ("wsc", 1)])
def test_they_are_read_from_local_files_in_the_hubs_layout(task, each, hub, pretrained, tmp_path):
    data = prepare_labelled(f"super-glue/{task}", str(pretrained), 32, tmp_path, str(hub))
    texts = data.manifest["texts"]
    assert texts["train"] + texts["validation"] == each * COUNTS["train"]
    assert texts["test"] == each * COUNTS["validation"]  # the published validation split
    assert 0 < texts["validation"] < texts["train"] / 4
    inputs, labels, *more = next(data.eval_batches("test", 1000))
    assert set(labels.tolist()) == {0, 1}
    assert (inputs["input_ids"] == 1).sum() == 0  # no word that the made-up texts do not have
    if each > 1:
        assert data.manifest["questions"]["test"] == COUNTS["validation"]
        questions, worths = more
        assert torch.bincount(questions).tolist() == [each] * COUNTS["validation"]
        assert (worths[labels == 1] == 1).all()
        if task == "copa":
            assert (
                torch.zeros(COUNTS["validation"]).index_add(0, questions, labels.float()).tolist() == [1.0] * COUNTS["validation"]
            )
    else:
        assert not more
        marks = [5 + SPOKEN.index(mark) for mark in "*#"]
        counts = [(inputs["input_ids"] == mark).sum(1).tolist() for mark in marks]
        assert counts == ([[4] * 15, [0] * 15] if task == "wic" else [[2] * 15, [2] * 15])


def test_a_question_is_never_cut(hub, pretrained, tmp_path):
    data = prepare_labelled("super-glue/record", str(pretrained), 32, tmp_path, str(hub))
    for rows, whole in ((4, 1), (11, 2), (12, 3), (1000, 15), (None, 15)):
        found = [questions for _, _, questions, _ in data.eval_batches("test", 3, rows)]
        assert sorted(torch.cat(found).tolist()) == [number for number in range(whole) for _ in range(4)]
    with pytest.raises(UserError, match="so few candidates: raise the rows"):
        data.eval_batches("test", 3, 3)


# ---------------------------------------------------------------------- what the model reads


def test_wic_marks_its_word_in_both_sentences():
    row = {
        "word": "bank",
        "sentence1": "The bank  of a river.",
        "sentence2": "A bank",
        "start1": 4,
        "end1": 8,
        "start2": 2,
        "end2": 6,
    }
    assert glue.wic(row) == ("bank: The * bank * of a river.", "A * bank *")
    with pytest.raises(UserError, match="wic: no characters 2 to 99 in 'A bank'"):
        glue.wic(row | {"end2": 99})


def test_wsc_marks_noun_and_pronoun():
    row = {"text": "Mark told Pete  lies about himself, which he hid.", "span1_index": 0, "span2_index": 7}
    row |= {"span1_text": "Mark", "span2_text": "he"}
    assert glue.wsc(row) == ("* Mark * told Pete lies about himself, which # he # hid.", None)
    turned = {"span1_index": 7, "span1_text": "he", "span2_index": 0, "span2_text": "Mark"}
    assert glue.wsc(row | turned)[0] == "# Mark # told Pete lies about himself, which * he * hid."
    assert glue.wsc(row | {"span2_index": 5, "span2_text": "himself"})[0].endswith("about # himself #, which he hid.")
    assert glue.wsc(row | {"span1_text": "mark Told"})[0].startswith("* Mark told * Pete")
    assert glue.wsc(row | {"span1_text": "Marc"})[0].startswith("* Mark * told")  # spelled differently: its whole words
    with pytest.raises(UserError, match="wsc: no word 99 for 'he'"):
        glue.wsc(row | {"span2_index": 99})


def test_copa_asks_for_a_cause_or_an_effect():
    row = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I sang.", "question": "effect", "label": 0}
    assert [one.row for one in copa(row)] == [("It rained.", "so I got wet.", 1.0), ("It rained.", "so I sang.", 0.0)]
    assert [one.row[1:] for one in copa(row | {"question": "cause", "label": 1})] == [
        ("because I got wet.", 0.0),
        ("because I sang.", 1.0),
    ]


def test_multirc_has_a_pair_an_answer():
    rows = [
        {"paragraph": "P.", "question": "Q?", "answer": answer, "label": label} for answer, label in (("x", 1), ("y", 1), ("z", 0))
    ]
    found = [one for row in rows for one in multirc(row)]
    assert [one.row for one in found] == [("Q? x", "P.", 1.0), ("Q? y", "P.", 1.0), ("Q? z", "P.", 0.0)]
    assert {(one.context, one.question) for one in found} == {("P.", "Q?")}


def test_record_puts_each_entity_into_the_gap():
    row = {"passage": "Ada met Bob\n@highlight\nThey spoke.\n@highlight\nIt ended", "query": "@placeholder met Bob."}
    row |= {"entities": ["Ada", "Bob", "The U.S.", "Ada"], "answers": ["ada", "US"]}
    found = list(record(row))
    assert [one.row[0] for one in found] == ["Ada met Bob.", "Bob met Bob.", "The U.S. met Bob."]
    assert [one.row[2] for one in found] == [1.0, 0.0, 1.0]
    assert {one.row[1] for one in found} == {"Ada met Bob. They spoke. It ended"}


def test_answers_overlap_by_words():
    assert overlap("the White House", "White House") == 1.0
    assert overlap("Barack Obama", "Obama") == pytest.approx(2 / 3)
    assert overlap("Obama", "Bush") == 0.0


# ---------------------------------------------------------------------- splits and judgement


def test_a_context_is_in_one_split_and_a_tested_question_is_not_trained_on():
    def asked(context, question, names="ab"):
        return [
            Candidate(context, question, (f"{question} {name}", context, float(name == "a")), float(name == "a")) for name in names
        ]

    train = [one for c in range(300) for q in range(2) for one in asked(f"context {c}", f"question {q}")]
    test = asked("CONTEXT 0", "question 0") + asked("new", "question 0")
    parts, left_out = candidates.divided([*train, *asked("context 1", "question 0")], test)
    where = {split: {row[1] for row in part.rows} for split, part in parts.items()}
    assert not where["train"] & where["validation"]
    assert 10 < len(where["validation"]) < 60
    kept = {(row[1], row[0]) for split in ("train", "validation") for row in parts[split].rows}
    assert ("context 0", "question 0 a") not in kept
    assert ("context 0", "question 1 a") in kept
    assert left_out == {"copies": 2, "right and wrong": 0, "in the test": 1}
    assert all(part.questions == sorted(part.questions) for part in parts.values())
    both = Candidate("c", "q", ("q a", "c", 0.0), 0.0)
    assert candidates.by_question([*asked("c", "q"), both])[1] == {"copies": 1, "right and wrong": 1}


def test_a_published_test_is_whole():
    """SuperGLUE counts an answer of a question as often as it is there."""
    test = [
        Candidate("c", "q", (f"q {name}", "c", right), right) for name, right in (("a", 1.0), ("A", 1.0), ("b", 0.0), ("b", 1.0))
    ]
    parts, _ = candidates.divided([], test)
    assert parts["test"].rows == [one.row for one in test]
    assert parts["test"].questions == [0, 0, 0, 0]


def test_questions_are_judged_as_superglue_does():
    """Against torchmetrics, and by hand."""
    draw = np.random.RandomState(0)
    questions = np.repeat(np.arange(40), draw.randint(1, 6, size=40))
    scores, right = draw.randn(len(questions)), draw.rand(len(questions)) < 0.4
    worths = np.where(right, 1.0, draw.rand(len(questions)))
    order = draw.permutation(len(questions))  # an evaluation has the longest first
    found = judged(*(list(column[order]) for column in (scores, right, worths, questions)))
    assert found["f1a"] == pytest.approx(float(binary_f1_score(torch.tensor(scores > 0), torch.tensor(right))))
    own = [np.flatnonzero(questions == question) for question in range(40)]
    best = [places[np.argmax(scores[places])] for places in own]
    assert found["accuracy"] == pytest.approx(right[best].mean())
    assert found["f1"] == pytest.approx(worths[best].mean())
    assert found["exact_match"] == pytest.approx(np.mean([np.array_equal(scores[p] > 0, right[p]) for p in own]))
    assert judged([-1.0], [True], [1.0], [0])["f1a"] == 0.0


@pytest.mark.parametrize("task", ["copa", "multirc", "record"])
def test_a_model_is_judged_by_its_questions(task, hub, pretrained, tmp_path):
    task = prepare(config_of(f"super-glue/{task}", pretrained, hub, tmp_path, "training.test_rows=null", "training.eval_batch=7"))
    model = task.model().eval()
    found = task.evaluate(model, "test")
    scores, columns, nats = [], [], []
    with torch.no_grad():
        for inputs, labels, questions, worths in task.held_out("test", 1000, None):
            log_p = log_softmax(model(**inputs).double().numpy(), axis=1)
            scores += list(log_p[:, 1] - log_p[:, 0])
            nats += [-log_p[i, label] for i, label in enumerate(labels)]
            columns.append((labels == 1, worths, questions))
    expected = judged(scores, *(torch.cat(part).tolist() for part in zip(*columns, strict=True)))
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["questions"] == 15
    assert task.metric.name == ("f1a" if task.config.kind == "answers" else "accuracy")


@pytest.mark.parametrize(("task", "metric"), [("copa", "accuracy"), ("multirc", "f1a")])
def test_a_whole_run(task, metric, hub, pretrained, tmp_path):
    quick = ["training.steps=3", "optimizer.warmup_steps=1", "training.test=true", "measure.doses=1"]
    config = config_of(f"super-glue/{task}", pretrained, hub, tmp_path, *quick, method="functional-sam")
    summary = loop.train(config, tmp_path / "runs").summary()
    assert 0 <= summary[f"test_{metric}"] <= 1
    assert summary["test_questions"] == 15


def test_a_set_fits_one_kind_alone():
    for overrides, words in [
        (["data.texts=super-glue/multirc"], "which kind answers judges"),
        (["data.texts=super-glue/copa", "kind=answers"], "does not fit kind answers"),
        (["data.texts=super-glue/copa", "data.transfer=[super-glue/record]"], "not for sets with candidate answers"),
        (["data.texts=super-glue/rekord"], "did you mean 'super-glue/record'"),
    ]:
        with pytest.raises(UserError, match=words):
            compose("roberta-glue", "adamw", "paper", overrides=overrides)


def test_the_study_of_the_paper_has_all_of_superglue():
    study = load_study("finetune", "paper")
    cells = [cell for cell in study.part("methods") if cell.task.startswith("roberta")]
    runs = [make(study, cell, "sam", trials(study, cell, "sam", cell.lr[0])[0], 0) for cell in cells]
    kinds = {config.data.texts: config.kind for config in runs if str(config.data.texts).startswith("super-glue/")}
    assert set(kinds) == {name for name in glue.SETS if name.startswith("super-glue/")}
    assert [name for name, kind in kinds.items() if kind == "answers"] == ["super-glue/multirc"]
    long = {config.data.texts for config in runs if config.model.length == 512}
    assert long == {"super-glue/multirc", "super-glue/record"}  # whole passages
    assert all(found.layout is not None for found, _ in planning.rows(runs, planning.gpu("a100-80")))
