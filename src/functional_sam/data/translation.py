"""Pairs of texts as pieces of one vocabulary: random rows for training, all rows with their references for evaluation.

Letters: B rows, S pieces of a source, T of a target, both with EOS.
"""

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_sam.data.bitext import Asked, Pair, bitext_of, distinct
from functional_sam.data.cache import Progress, cached, digest, silent, write_array
from functional_sam.data.order import indices
from functional_sam.data.text import SPLITS, split_of, token_dtype
from functional_sam.data.tokenizer import BOS, EOS, PAD, Tokenizer, train_tokenizer
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE

FORMAT = 1  # raise it when the same pairs and vocab give other files
ENCODE_AT_ONCE = 10_000
SIDES = ("source", "target")
CHARACTERS = 1_000_000  # the tokenizer is trained on so many; 4 times as many take 4 times as long where words are not spaced
RESERVED = 261  # pieces that are no text: 256 bytes, PAD, EOS, BOS, UNK and the line's end
Inputs = dict[str, Tensor]


def prepare_pairs(
    names: Sequence[str],
    vocab: int,
    cache: Path,
    location: str | None = None,
    files: int | None = None,
    progress: Progress | None = None,
) -> "PairData":
    """Read the bitext, remove duplicates, split, train a joint tokenizer of `vocab` pieces on the train split, encode; once.

    location: a directory or a data set of the hub instead of the bitext's own. files: the first so many train files of the hub.
    The whole bitext is in memory while it is prepared: 1 GB for a million pairs. Raises UserError where the source cannot be had,
    with the ways out, for a vocab that does not fit, a damaged cache, a full disk.
    """
    say, bitext = progress or silent, bitext_of(names)

    def build(directory: Path) -> dict[str, Any]:
        found = bitext.read(bitext, Asked(Path(cache), location, files), say)
        return {"format": FORMAT, "sources": {bitext.name: found.made_from}} | build_pairs(found.pairs, vocab, directory, say)

    directory = pairs_directory(names, vocab, cache, location, files)
    return PairData(directory, cached(directory, build, say))


def pairs_directory(names: Sequence[str], vocab: int, cache: Path, location: str | None = None, files: int | None = None) -> Path:
    """Where prepare_pairs keeps its result. Raises UserError for an unknown bitext."""
    bitext = bitext_of(names)
    where = str(Path(location).resolve()) if location and Path(location).is_dir() else location or bitext.hub
    made_from = {
        "format": FORMAT,
        "package": str(bitext.package),
        "location": where,
        "files": files,
        "sentencepiece": importlib.metadata.version("sentencepiece"),
        "vocab": vocab,
    }
    return Path(cache) / f"pairs-{bitext.name}-{vocab}-{digest(made_from)[:12]}"


def build_pairs(pairs: Sequence[Pair], vocab: int, directory: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write tokenizer.model and, for each split and side, its pieces into `directory`; return what the manifest says about them.

    <split>.<side>.ids: pieces and EOS of one text after the other, uint16 (uint32 when vocab > 65,535);
    <split>.<side>.offsets, int64 [pairs + 1], where each begins. validation and test also have <split>.references, a JSON list.
    """
    parts: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for pair in distinct(pairs):
        parts[pair.split or split_of(_key("group", pair.group))].append(pair)
    for split, part in parts.items():
        if not part:
            raise UserError(f"no pair falls into the {split} split: more text is needed")
        part.sort(key=lambda pair: _key(pair.group, pair.source, pair.target))
    train = [text for pair in parts["train"] for text in (pair.source, pair.target)]
    progress(f"training a joint tokenizer of {vocab} pieces ...")
    train_tokenizer(train, vocab, directory / "tokenizer.model", CHARACTERS, _coverage(train, vocab))
    tokenizer = Tokenizer(directory / "tokenizer.model")

    manifest: dict[str, Any] = {"vocab": vocab, "dtype": token_dtype(vocab).name}
    for split, part in parts.items():
        progress(f"encoding {len(part):,} {split} pairs ...")
        manifest.setdefault("pairs", {})[split] = len(part)
        for side in SIDES:
            texts = [getattr(pair, side) for pair in part]
            num_pieces = _write(texts, tokenizer, directory / f"{split}.{side}")
            manifest.setdefault(f"{side}_pieces", {})[split] = num_pieces
            text = hashlib.sha256("\0".join(texts).encode()).hexdigest()
            manifest.setdefault(f"{side}_sha256", {})[split] = text
        if split != "train":
            (directory / f"{split}.references").write_text(
                json.dumps([pair.target for pair in part], ensure_ascii=False), encoding="utf-8"
            )
    return manifest


class PairData:
    """Prepared pairs. manifest: what they were made from, counts per split, SHA-256. sha256: one digest of all files.

    Pairs of which a side has more than `length` pieces are left out, wherever a length is asked for.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.manifest = manifest
        self.vocab: int = manifest["vocab"]
        self.sha256: str = manifest["sha256"]
        self.tokenizer = Tokenizer(self.directory / "tokenizer.model")
        self._sides: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._fitting: dict[tuple[str, int], np.ndarray] = {}

    def fitting(self, split: str, length: int) -> np.ndarray:
        """Numbers of the pairs of a split that have at most `length` pieces on either side, in the stored (hash) order."""
        if (split, length) not in self._fitting:
            longest = np.maximum(*(np.diff(self._side(split, side)[1]) for side in SIDES))
            self._fitting[split, length] = np.flatnonzero(longest <= length)
        return self._fitting[split, length]

    def train_batch(self, step: int, batch: int, length: int, seed: int, unique_pairs: int | None = None) -> tuple[Inputs, Tensor]:
        """Inputs and labels (see `padded`) of batch number `step`; every pair is met once per epoch, in an order of (seed, epoch).

        unique_pairs: the first so many of those that fit. Raises UserError where there are fewer, or none.
        """
        rows = self.fitting("train", length)
        if unique_pairs is not None and unique_pairs > len(rows):
            raise UserError(f"data.unique_pairs={unique_pairs:,}: {len(rows):,} train pairs have at most {length} pieces: lower it")
        rows = rows[:unique_pairs]
        if not len(rows):
            raise UserError(f"no train pair has at most model.length={length} pieces on either side: raise it")
        return self._rows("train", rows[indices(step, batch, len(rows), seed)])

    def eval_batches(
        self, split: str, batch: int, length: int, max_rows: int | None = None
    ) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
        """(inputs, labels, numbers of the pairs [B]) over the first max_rows pairs that fit, the longest first."""
        if split not in ("validation", "test"):
            raise UserError(f"split is {split!r}: evaluation has 'validation' and 'test'")
        rows = self.fitting(split, length)[:max_rows]
        if not len(rows):
            raise UserError(f"no {split} pair has at most model.length={length} pieces on either side: raise it")
        sizes = np.add(*(np.diff(self._side(split, side)[1])[rows] for side in SIDES))
        rows = rows[np.argsort(-sizes, kind="stable")]
        return (
            (*self._rows(split, rows[i : i + batch]), torch.from_numpy(rows[i : i + batch].astype(np.int64)))
            for i in range(0, len(rows), batch)
        )

    def references(self, split: str) -> list[str]:
        """The target texts of a split as they were published, one a pair."""
        texts: list[str] = json.loads((self.directory / f"{split}.references").read_text(encoding="utf-8"))
        return texts

    def text(self, pieces: Sequence[int]) -> str:
        """What generated pieces say, up to the first EOS."""
        own = [int(i) for i in pieces if int(i) not in (PAD, BOS)]
        return self.tokenizer.decode(own[: own.index(EOS)] if EOS in own else own)

    def _rows(self, split: str, rows: np.ndarray) -> tuple[Inputs, Tensor]:
        sides = []
        for side in SIDES:
            ids, offsets = self._side(split, side)
            sides.append([ids[offsets[row] : offsets[row + 1]] for row in rows])
        return padded(*sides)

    def _side(self, split: str, side: str) -> tuple[np.ndarray, np.ndarray]:
        if (split, side) not in self._sides:
            stem = self.directory / f"{split}.{side}"
            ids = np.memmap(stem.with_suffix(f"{stem.suffix}.ids"), dtype=self.manifest["dtype"], mode="r")
            self._sides[split, side] = (ids, np.fromfile(stem.with_suffix(f"{stem.suffix}.offsets"), dtype=np.int64))
        return self._sides[split, side]


def padded(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> tuple[Inputs, Tensor]:
    """Rows as wide as the longest: the inputs of an encoder-decoder, and its labels [B, T], all int64.

    input_ids [B, S] with PAD, attention_mask [B, S] (1 for a piece), decoder_input_ids [B, T]: BOS, then the labels but for the
    last one (PAD where there is none); labels: pieces and EOS, then IGNORE.
    """
    input_ids, labels = filled(sources, PAD), filled(targets, IGNORE)
    mask = filled([np.ones(len(source), dtype=np.int64) for source in sources], 0)
    return {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": shifted(labels, BOS, PAD)}, labels


def shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder reads to predict the labels [B, T]: `start`, then the labels but for the last, `pad` where there is none."""
    before = torch.roll(labels, 1, dims=1)
    before[:, 0] = start
    before[before == IGNORE] = pad
    return before


def filled(rows: Sequence[Sequence[int] | np.ndarray], value: int) -> Tensor:
    """Rows as wide as the longest, int64, `value` to the right of each."""
    found = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return torch.from_numpy(found)


def _write(texts: Sequence[str], tokenizer: Tokenizer, stem: Path) -> int:
    dtype, lengths, ids = token_dtype(tokenizer.vocab), [0], []
    for start in range(0, len(texts), ENCODE_AT_ONCE):
        for pieces in tokenizer.encode_batch(texts[start : start + ENCODE_AT_ONCE]):
            ids.append(np.array([*pieces, EOS], dtype=dtype))
            lengths.append(len(pieces) + 1)
    write_array(stem.with_suffix(f"{stem.suffix}.ids"), np.concatenate(ids))
    write_array(stem.with_suffix(f"{stem.suffix}.offsets"), np.cumsum(lengths, dtype=np.int64))
    return sum(lengths)


def _coverage(texts: Sequence[str], vocab: int) -> float:
    """The part of the text that half of the pieces can spell, a character each: the other half is for words.

    Between SentencePiece's bounds, .98 and (its own default) .9995. Japanese has thousands of characters; what is not covered is
    spelled in bytes.
    """
    counts: Counter[str] = Counter()
    left = CHARACTERS
    for text in texts:
        counts.update(text)
        left -= len(text)
        if left <= 0:
            break
    most = counts.most_common(max(1, (vocab - RESERVED) // 2))
    return max(0.98, min(0.9995, sum(count for _, count in most) / counts.total()))


def _key(*parts: str) -> str:
    """A hash of 16 hexadecimal digits, which `split_of` and the stored order go by."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
