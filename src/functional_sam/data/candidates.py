"""Questions with candidate answers (COPA, MultiRC, ReCoRD): a pair of texts a candidate, right or wrong, judged by question."""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from functional_sam.data.labels import Row
from functional_sam.data.sources import normalize

Columns = dict[str, Any]  # of one row of a file


@dataclass(frozen=True)
class Candidate:
    """row: a pair and whether it is right (1 or 0). context: what training and validation never share. question: of that context.

    worth: what it counts to choose it, 0 to 1; that of a right one is 1.
    """

    context: str
    question: str
    row: Row
    worth: float


def copa(row: Columns) -> Iterator[Candidate]:
    """Two choices: the premise, and "because" (what caused it?) or "so" (what came of it?) with the choice."""
    premise, question = normalize(row["premise"]), row["question"]
    link = {"cause": "because", "effect": "so"}[question]
    choices = [normalize(row[f"choice{number}"]) for number in (1, 2)]
    for number, choice in enumerate(choices):
        right = float(row["label"] == number)
        yield Candidate(premise, json.dumps([question, *choices]), (premise, f"{link} {choice}", right), right)


def multirc(row: Columns) -> Iterator[Candidate]:
    """One answer of several, of which any number are right: question and answer, and the paragraph."""
    paragraph, question, answer = (normalize(row[name]) for name in ("paragraph", "question", "answer"))
    right = float(row["label"])
    yield Candidate(paragraph, question, (f"{question} {answer}", paragraph, right), right)


def record(row: Columns) -> Iterator[Candidate]:
    """The entities of a passage, each in the place of the query's gap, and the passage. Right is one that equals an answer."""
    passage = normalize(re.sub(r"([.?!\"'])?\s*@highlight\s*", lambda match: f"{match[1] or '.'} ", row["passage"]))
    query, answers = normalize(row["query"]), [str(answer) for answer in row["answers"]]
    for entity in dict.fromkeys(map(str, row["entities"])):
        right = float(any(words(entity) == words(answer) for answer in answers))
        worth = max((overlap(entity, answer) for answer in answers), default=0.0)
        yield Candidate(passage, query, (query.replace("@placeholder", normalize(entity)), passage, right), worth)


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles: how SQuAD and ReCoRD compare answers."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def overlap(answer: str, truth: str) -> float:
    """F1 of the words that two texts have in common (SQuAD's)."""
    own, theirs = words(answer), words(truth)
    common = sum((Counter(own) & Counter(theirs)).values())
    return 2 * common / (len(own) + len(theirs)) if common else float(own == theirs)


@dataclass(frozen=True)
class Part:
    """The candidates of a split, those of a question together. questions: a number for each candidate's, from 0."""

    rows: list[Row]
    questions: list[int]
    worths: list[float]


def divided(train: Iterable[Candidate], test: Iterable[Candidate]) -> tuple[dict[str, Part], dict[str, int]]:
    """Train, validation and test, questions in the order of hashes, and how much was left out of the first two, by reason.

    A context, with all of its questions, trains or validates (a tenth do). Copies of a candidate count once, one that is both
    right and wrong is left out, and so is a question that the test has, from training. The test is whole, as it was published.
    """
    held: dict[str, list[Candidate]] = {}
    for one in test:
        held.setdefault(_hash(one.context, one.question), []).append(one)
    found, left_out = by_question(train)
    left_out["in the test"] = len(found.keys() & held.keys())
    found = {key: own for key, own in found.items() if key not in held}
    validates = {key: _fraction(own[0].context) < 0.1 for key, own in found.items()}
    chosen = {
        "train": {key: own for key, own in found.items() if not validates[key]},
        "validation": {key: own for key, own in found.items() if validates[key]},
        "test": held,
    }
    return {split: _part([questions[key] for key in sorted(questions)]) for split, questions in chosen.items()}, left_out


def by_question(candidates: Iterable[Candidate]) -> tuple[dict[str, list[Candidate]], dict[str, int]]:
    """Hash of context and question -> candidates in their order; how many were copies, and how many both right and wrong."""
    found: dict[str, dict[str, list[Candidate]]] = {}
    count = 0
    for one in candidates:
        count += 1
        own = found.setdefault(_hash(one.context, one.question), {})
        own.setdefault(_hash(*map(str, one.row[:2])), []).append(one)
    clear = {key: [same[0] for same in own.values() if len({c.row[2] for c in same}) == 1] for key, own in found.items()}
    different = sum(map(len, found.values()))
    kept = {key: own for key, own in clear.items() if own}
    return kept, {"copies": count - different, "right and wrong": different - sum(map(len, kept.values()))}


def _part(questions: Sequence[list[Candidate]]) -> Part:
    together = [(number, one) for number, own in enumerate(questions) for one in own]
    return Part([one.row for _, one in together], [number for number, _ in together], [one.worth for _, one in together])


def _hash(*texts: str) -> str:
    return hashlib.sha256(json.dumps([text.casefold() for text in texts]).encode()).hexdigest()


def _fraction(context: str) -> float:
    """From 0 to 1, by the hash's last digits: questions are in the order of the first ones of theirs."""
    return int(_hash(context)[-8:], 16) / 16**8


def f1(chosen: Sequence[bool], right: Sequence[bool]) -> float:
    """Of the candidates that are said to be right: harmonic mean of precision and recall; 0 where none is rightly said."""
    hits = int(np.sum(np.logical_and(chosen, right)))
    return 2 * hits / (int(np.sum(chosen)) + int(np.sum(right))) if hits else 0.0


def judged(scores: Sequence[float], right: Sequence[bool], worths: Sequence[float], questions: Sequence[int]) -> dict[str, float]:
    """What SuperGLUE reports, from scores (log-odds of "right") of whole questions.

    accuracy: questions whose highest score is of a right candidate (COPA; ReCoRD's EM). f1: mean worth of the candidate with the
    highest score (ReCoRD's F1, of the best answer). f1a: F1 of the candidates with a score above 0, over all questions together,
    and exact_match: questions all of whose candidates are on the right side of 0 (MultiRC).
    """
    of: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        of.setdefault(question, []).append(place)
    best = [max(own, key=lambda place: scores[place]) for own in of.values()]
    said = [score > 0 for score in scores]
    return {
        "accuracy": sum(right[place] for place in best) / len(of),
        "f1": sum(worths[place] for place in best) / len(of),
        "f1a": f1(said, right),
        "exact_match": sum(all(said[place] == right[place] for place in own) for own in of.values()) / len(of),
    }
