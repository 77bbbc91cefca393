"""GLUE and SuperGLUE in the layout of the Hugging Face hub: parquet files, one folder a task."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from functional_sam.data.hub import layout, rows
from functional_sam.data.labels import Row
from functional_sam.data.sources import normalize

GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class Set:
    """One task. columns: of the text, and of the second text of a pair. classes: none where texts have grades (stsb)."""

    folder: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    hub: str = GLUE
    train: str = "train"
    test: str = "validation"  # labels of the published test splits are not public


TWO = ("no", "yes")
ENTAILMENT = ("entailment", "not_entailment")
THREE = ("entailment", "neutral", "contradiction")
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
}


def read(one: Set, location: str, split: str) -> Iterator[Row]:
    """The rows of a split; a row without a label (-1) is left out. Raises UserError when the files cannot be had.

    location: a directory with the folders of one of the two benchmarks, or with both as glue/ and super_glue/; or a repository.
    """
    own = Path(location) / one.hub.rpartition("/")[2]
    place = str(own) if location and own.is_dir() else location or one.hub
    for file in layout(place, one.folder, split, ".parquet"):
        for row in rows(file, "parquet", columns=[*one.columns, "label"]):
            text, *second = (normalize(row[column]) for column in one.columns)
            if row["label"] >= 0:
                yield text, second[0] if second else None, float(row["label"])
