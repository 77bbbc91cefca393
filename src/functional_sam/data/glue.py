"""GLUE and SuperGLUE in the layout of the Hugging Face hub: parquet files, one folder a task."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_sam.data.candidates import Candidate, Columns, copa, multirc, record
from functional_sam.data.hub import layout, rows
from functional_sam.data.labels import Row
from functional_sam.data.sources import normalize
from functional_sam.errors import UserError

GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class Set:
    """One task. columns: of the text, and of the second text of a pair. classes: none where texts have grades (stsb).

    texts: where the texts are not columns as they are, what makes them of a row whose `columns` are read. candidates: where a
    question has several possible answers, what makes them. fields: what the texts are, in words; none: the columns.
    """

    folder: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    hub: str = GLUE
    train: str = "train"
    test: str = "validation"  # labels of the published test splits are not public
    texts: Callable[[Columns], tuple[str, str | None]] | None = None
    candidates: Callable[[Columns], Iterator[Candidate]] | None = None
    fields: tuple[str, ...] = ()
    any_right: bool = False  # any number of a question's candidates are right, else the best one is chosen


def wic(row: Columns) -> tuple[str, str | None]:
    """Two sentences with the word in question between asterisks, the first behind the word itself. Read as a pair, not by spans."""
    sentences = []
    for number in (1, 2):
        text, start, end = row[f"sentence{number}"], row[f"start{number}"], row[f"end{number}"]
        if not 0 <= start < end <= len(text):
            raise UserError(f"wic: no characters {start} to {end} in {text!r}: not the files of {SUPERGLUE}? Fetch them again")
        sentences.append(normalize(f"{text[:start]}* {text[start:end]} *{text[end:]}"))
    return f"{normalize(row['word'])}: {sentences[0]}", sentences[1]


def wsc(row: Columns) -> tuple[str, str | None]:
    """One text with the noun between asterisks and the pronoun between number signs, as T5 has it."""
    text = row["text"]
    for mark, number in sorted((("*", 1), ("#", 2)), key=lambda one: -row[f"span{one[1]}_index"]):  # the later one first
        text = _marked(text, row[f"span{number}_index"], row[f"span{number}_text"], mark)
    return normalize(text), None


def _marked(text: str, index: int, span: str, mark: str) -> str:
    """Marks around the span that begins at word number `index`; around its whole words where the text spells it differently."""
    words = list(re.finditer(r"\S+", text))[index:] if index >= 0 else []
    if len(words) < len(span.split()):
        raise UserError(f"wsc: no word {index} for {span!r} in {text!r}: not the files of {SUPERGLUE}? Fetch them again")
    start = words[0].start()
    end = start + len(span)
    if text[start:end].casefold() != span.casefold():
        end = words[len(span.split()) - 1].end()
    return f"{text[:start]}{mark} {text[start:end]} {mark}{text[end:]}"


TWO = ("no", "yes")
ENTAILMENT = ("entailment", "not_entailment")
THREE = ("entailment", "neutral", "contradiction")
_WIC = ("word", "sentence1", "sentence2", "start1", "start2", "end1", "end2")
_WSC = ("text", "span1_index", "span2_index", "span1_text", "span2_text")
_COPA = ("premise", "choice1", "choice2", "question")
SETS: dict[str, Set] = {
    "glue/cola": Set("cola", ("sentence",), TWO),
    "glue/sst2": Set("sst2", ("sentence",), ("negative", "positive")),
    "glue/mrpc": Set("mrpc", ("sentence1", "sentence2"), TWO),
    "glue/stsb": Set("stsb", ("sentence1", "sentence2"), ()),
    "glue/qqp": Set("qqp", ("question1", "question2"), TWO),
    "glue/mnli": Set("mnli", ("premise", "hypothesis"), THREE, test="validation_matched"),
    "glue/qnli": Set("qnli", ("question", "sentence"), ENTAILMENT),
    "glue/rte": Set("rte", ("sentence1", "sentence2"), ENTAILMENT),
    "super-glue/boolq": Set("boolq", ("question", "passage"), TWO, SUPERGLUE),
    "super-glue/cb": Set("cb", ("premise", "hypothesis"), ("entailment", "contradiction", "neutral"), SUPERGLUE),
    "super-glue/rte": Set("rte", ("premise", "hypothesis"), ENTAILMENT, SUPERGLUE),
    "super-glue/wic": Set("wic", _WIC, TWO, SUPERGLUE, texts=wic, fields=("sentence1", "sentence2")),
    "super-glue/wsc": Set("wsc", _WSC, TWO, SUPERGLUE, texts=wsc, fields=("text",)),
    "super-glue/copa": Set("copa", _COPA, TWO, SUPERGLUE, candidates=copa, fields=("premise", "choice")),
    "super-glue/multirc": Set(
        "multirc",
        ("paragraph", "question", "answer"),
        TWO,
        SUPERGLUE,
        candidates=multirc,
        fields=("question", "paragraph"),
        any_right=True,
    ),
    "super-glue/record": Set(
        "record", ("passage", "query", "entities", "answers"), TWO, SUPERGLUE, candidates=record, fields=("query", "passage")
    ),
}


def read(one: Set, location: str, split: str) -> Iterator[Row]:
    """The rows of a split; a row without a label (-1) is left out. Raises UserError when the files cannot be had.

    location: a directory with the folders of one of the two benchmarks, or with both as glue/ and super_glue/; or a repository.
    """
    for row in _labelled(one, location, split):
        if one.texts is not None:
            yield (*one.texts(row), float(row["label"]))
        else:
            text, *second = (normalize(row[column]) for column in one.columns)
            yield text, second[0] if second else None, float(row["label"])


def read_candidates(one: Set, location: str, split: str) -> Iterator[Candidate]:
    """The candidates of a split, question by question; location as of `read`."""
    assert one.candidates is not None
    for row in _labelled(one, location, split):
        yield from one.candidates(row)


def _labelled(one: Set, location: str, split: str) -> Iterator[dict[str, Any]]:
    own = Path(location) / one.hub.rpartition("/")[2]
    place = str(own) if location and own.is_dir() else location or one.hub
    label = [] if "answers" in one.columns else ["label"]
    for file in layout(place, one.folder, split, ".parquet", published=one.hub):
        for row in rows(file, "parquet", columns=[*one.columns, *label]):
            if row["label"] >= 0 if label else row["answers"]:
                yield row
