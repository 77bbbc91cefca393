"""Text as streams of tokens: documents packed into windows for training, one document a row for evaluation (as Nanodo does).

Letters: B rows of a batch, L tokens of a window, V pieces of the vocabulary.
"""

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_sam.data.cache import Progress, cached, digest, silent, write_array
from functional_sam.data.order import indices
from functional_sam.data.packages import HOLDS
from functional_sam.data.sources import Document, check_sources, read_sources
from functional_sam.data.tokenizer import BOS, EOS, PAD, Tokenizer, train_tokenizer
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE

FORMAT = 1  # raise it when the same sources and vocab give other files
SPLITS = ("train", "validation", "test")
ENCODE_AT_ONCE = 1000
MAX_ELSEWHERE = 1_000_000
COUNTS = ("documents", "tokens", "bytes", "bytes_per_token", "text_sha256")  # what the manifest says of each split


def prepare_text(
    sources: Sequence[str],
    vocab: int,
    cache_dir: Path,
    progress: Progress | None = None,
    max_train_tokens: int | None = None,
    verify: bool = False,
) -> "TextData":
    """Read `sources` (keys of SOURCES), train a tokenizer of `vocab` pieces on the train split, encode; once per cache_dir.

    max_train_tokens: the train stream ends with the last whole document that fits. verify: check the SHA-256 of a cached copy.
    What is cached loads without the source packages. Raises UserError for an unknown source, a missing package or one of
    another version, a vocab that does not fit the text, a damaged cache, a full disk.
    """
    directory, made_from = text_directory(sources, vocab, cache_dir, max_train_tokens)
    say = progress or silent
    names = list(made_from["sources"])

    def build(directory: Path) -> dict[str, Any]:
        say(f"reading {', '.join(names)} ...")
        return made_from | build_text(read_sources(names), vocab, directory, say, max_train_tokens)

    return TextData(directory, cached(directory, build, say, verify or None))


def text_directory(
    sources: Sequence[str], vocab: int, cache_dir: Path, max_train_tokens: int | None = None
) -> tuple[Path, dict[str, Any]]:
    """Where prepare_text keeps its result, and what that is made from. Raises UserError for an unknown source."""
    check_sources(sources)
    names = sorted(set(sources))
    made_from = {
        "format": FORMAT,
        "sources": {name: {"package": HOLDS[name].name, "version": HOLDS[name].version} for name in names},
        "sentencepiece": importlib.metadata.version("sentencepiece"),
        "vocab": vocab,
        "max_train_tokens": max_train_tokens,
    }
    return Path(cache_dir) / f"text-{'-'.join(names)}-{vocab}-{digest(made_from)[:12]}", made_from


def build_text(
    documents: Iterable[Document],
    vocab: int,
    directory: Path,
    progress: Progress = silent,
    max_train_tokens: int | None = None,
    tokenizer_model: Path | None = None,
) -> dict[str, Any]:
    """Write tokenizer.model and, for each split, its stream into `directory`; return what the manifest says about them.

    <split>.ids: BOS, pieces, EOS of one document after the other, uint16 (uint32 when vocab > 65,535). Validation and test
    also have <split>.offsets, int64 [documents + 1], where each document starts, and <split>.ends, uint32 beside ids: the UTF-8
    bytes of the document up to and including each token. Bytes per token counts BOS and EOS as tokens.
    tokenizer_model: take this one (of `vocab` pieces) instead of training one.
    """
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        parts[split_of(document.id)].append(document)
    for part in parts.values():
        part.sort(key=lambda document: _hash("order", document.id))
    if not parts["train"]:
        raise UserError("no document falls into the train split: more text is needed")

    if tokenizer_model:
        shutil.copyfile(tokenizer_model, directory / "tokenizer.model")
    else:
        progress(f"training a tokenizer of {vocab} pieces ...")
        train_tokenizer((document.text for document in parts["train"]), vocab, directory / "tokenizer.model")
    tokenizer = Tokenizer(directory / "tokenizer.model")

    counts: dict[str, Any] = {key: {} for key in COUNTS}
    for split, part in parts.items():
        progress(f"encoding {len(part):,} {split} documents ...")
        limit = max_train_tokens if split == "train" else None
        for key, value in write_split(part, split, tokenizer, directory, limit).items():
            counts[key][split] = value
    return {"vocab": vocab, "dtype": token_dtype(vocab).name, **counts}


def write_split(
    part: Sequence[Document], split: str, tokenizer: Tokenizer, directory: Path, limit: int | None = None
) -> dict[str, Any]:
    """Write the files of one split as build_text describes them, up to `limit` tokens; return COUNTS of it."""
    text = hashlib.sha256()
    streams, ends = [], []
    num_tokens = 0
    for document, ids, end in encode(part, tokenizer):
        if limit is not None and num_tokens + len(ids) > limit:
            break
        num_tokens += len(ids)
        text.update(document.text.encode() + b"\0")
        streams.append(ids)
        ends.append(end)
    if split == "train" and not streams:
        raise UserError(f"max_train_tokens={limit} is less than the first document: raise it")
    num_bytes = int(sum(end[-1] for end in ends))
    write_array(directory / f"{split}.ids", _joined(streams, token_dtype(tokenizer.vocab)))
    if split != "train":
        write_array(directory / f"{split}.offsets", np.cumsum([0, *map(len, streams)], dtype=np.int64))
        write_array(directory / f"{split}.ends", _joined(ends, np.dtype(np.uint32)))
    per_token = round(num_bytes / num_tokens, 4) if num_tokens else None
    return dict(zip(COUNTS, (len(streams), num_tokens, num_bytes, per_token, text.hexdigest()), strict=True))


def split_of(document_id: str) -> str:
    """The split of a document, from its id alone: about 90 % train, 5 % validation, 5 % test."""
    fraction = _hash("split", document_id) / 2**64
    return "train" if fraction < 0.9 else "validation" if fraction < 0.95 else "test"


class TextData:
    """Prepared text: windows of the train stream, and validation and test documents.

    manifest: what it was made from, counts per split, SHA-256 of text and files. sha256: one digest of tokenizer and streams.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.manifest = manifest
        self.vocab: int = manifest["vocab"]
        self.sha256: str = manifest["sha256"]
        self.tokenizer = Tokenizer(self.directory / "tokenizer.model")
        self._train = self._open_train()

    def _open_train(self) -> Any:
        return np.memmap(self.directory / "train.ids", dtype=self.manifest["dtype"], mode="r")

    def elsewhere(self, sources: Sequence[str], progress: Progress | None = None) -> "TextData":
        """Other text, cut by this tokenizer; once, beside this directory. At most MAX_ELSEWHERE tokens of it train."""
        check_sources(sources)
        names, say = sorted(set(sources)), progress or silent
        made_from = {
            "format": FORMAT,
            "sources": {name: {"package": HOLDS[name].name, "version": HOLDS[name].version} for name in names},
            "tokenizer": self.manifest["files"]["tokenizer.model"]["sha256"],
            "max_train_tokens": MAX_ELSEWHERE,
        }
        directory = self.directory.parent / f"text-{'-'.join(names)}-cut-by-another-{digest(made_from)[:12]}"

        def build(directory: Path) -> dict[str, Any]:
            say(f"reading {', '.join(names)} ...")
            model = self.directory / "tokenizer.model"
            return made_from | build_text(read_sources(names), self.vocab, directory, say, MAX_ELSEWHERE, model)

        return TextData(directory, cached(directory, build, say))

    def train_windows(self, length: int, unique_tokens: int | None = None) -> int:
        """The number of whole windows of `length` tokens in the train stream, or in its first `unique_tokens` tokens.

        Raises UserError when there is none, or when more tokens are asked for than there are.
        """
        available = len(self._train)
        if length < 2:
            raise UserError(f"length is {length}: a window needs 2 tokens, one to read and one to predict")
        if unique_tokens is not None and unique_tokens > available:
            raise UserError(f"unique_tokens is {unique_tokens:,}, the train split has {available:,}: lower it or add sources")
        windows = (available if unique_tokens is None else unique_tokens) // length
        if windows == 0:
            raise UserError(f"no window of length {length:,} fits into {unique_tokens or available:,} train tokens: lower it")
        return windows

    def train_batch(self, step: int, batch: int, length: int, seed: int, unique_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch number `step`, int64 [B, L] each.

        Every window is met once per epoch, in an order drawn from (seed, epoch), C4's in that of the stream; the batch depends on
        the arguments alone. unique_tokens: use only the windows in the first so many tokens (studies of repeated data). The target
        at t is the token at t + 1 of the same window; the last target is IGNORE.
        """
        windows = self._order(step, batch, self.train_windows(length, unique_tokens), seed)
        inputs = torch.from_numpy(self._train[windows[:, None] * length + np.arange(length)].astype(np.int64))
        targets = torch.full_like(inputs, IGNORE)
        targets[:, :-1] = inputs[:, 1:]
        return inputs, targets

    def _order(self, step: int, batch: int, windows: int, seed: int) -> np.ndarray:
        """Which of so many windows batch number `step` holds, int64 [B]."""
        return indices(step, batch, windows, seed)

    def eval_batches(
        self, split: str, batch: int, length: int, max_rows: int | None = None, windows: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(inputs [B, T], targets [B, T], num_bytes [B]), int64, one document a row, cut to `length` tokens, T <= length.

        windows: a longer document goes on in further rows, each beginning with the last token of the one before, so that every
        token after a document's first is a target once. max_rows: the first so many, documents in the stored (hash) order. Rows
        are sorted by length, longest first, and a batch is as wide as its longest row; PAD fills inputs, IGNORE the targets beyond
        the document. num_bytes: UTF-8 bytes that the row's targets cover (EOS 0), so bits per byte = summed nats / (log(2) *
        summed bytes) is exact on cut documents.
        """
        if split not in ("validation", "test"):
            raise UserError(f"split is {split!r}: evaluation has 'validation' and 'test'")
        if length < 2:
            raise UserError(f"length is {length}: a row needs 2 tokens, one to read and one to predict")
        offsets = np.fromfile(self.directory / f"{split}.offsets", dtype=np.int64)
        if len(offsets) == 1 or max_rows == 0:
            raise UserError(f"the {split} split of {self.directory} has no documents to evaluate: add sources")
        starts, sizes = offsets[:-1], np.diff(offsets)
        if windows:
            counts = np.maximum(1, -(-(sizes - 1) // (length - 1)))  # rows of each document
            number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a row in its document
            passed = number * (length - 1)
            starts, sizes = np.repeat(starts, counts) + passed, np.repeat(sizes, counts) - passed
        starts, lengths = starts[:max_rows], np.minimum(sizes[:max_rows], length)
        rows = np.argsort(-lengths, kind="stable")
        return self._eval_rows(split, starts, lengths, [rows[i : i + batch] for i in range(0, len(rows), batch)])

    def _eval_rows(
        self, split: str, starts: np.ndarray, lengths: np.ndarray, batches: list[np.ndarray]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        ids = np.fromfile(self.directory / f"{split}.ids", dtype=self.manifest["dtype"]).astype(np.int64)
        ends = np.fromfile(self.directory / f"{split}.ends", dtype=np.uint32).astype(np.int64)
        for rows in batches:
            inputs = np.full((len(rows), lengths[rows].max()), PAD, dtype=np.int64)
            targets = np.full_like(inputs, IGNORE)
            for i, row in enumerate(rows):
                tokens = ids[starts[row] : starts[row] + lengths[row]]
                inputs[i, : len(tokens)] = tokens
                targets[i, : len(tokens) - 1] = tokens[1:]
            first = starts[rows]
            num_bytes = ends[first + lengths[rows] - 1] - ends[first]
            yield torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(num_bytes)


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Each document with its tokens BOS, pieces, EOS and, beside each token, the bytes covered so far."""
    for start in range(0, len(documents), ENCODE_AT_ONCE):
        some = documents[start : start + ENCODE_AT_ONCE]
        for document, pieces in zip(some, tokenizer.encode_batch([document.text for document in some]), strict=True):
            ids = np.array([BOS, *pieces, EOS], dtype=np.int64)
            ends = np.cumsum(tokenizer.piece_bytes[ids])
            size = len(document.text.encode())
            if ends[-1] != size:
                raise UserError(f"document {document.id}: pieces cover {ends[-1]} of {size} bytes; normalize the text first")
            yield document, ids, ends


def _joined(arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *(array.astype(dtype) for array in arrays)])


def token_dtype(vocab: int) -> np.dtype:
    """Of ids on disk: 2 bytes where they fit."""
    return np.dtype(np.uint16 if vocab <= 65_535 else np.uint32)


def _hash(purpose: str, document_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{document_id}".encode()).digest()[:8], "big")
