"""C4 in the layout of the hub (en/c4-train.00000-of-01024.json.gz), tokenized once: a shard of tokens for each of its files.

    text-c4-VOCAB-<hash>/                what the data and the tokenizer are made of
      tokenizer/                         trained on the start of the first train file, or a copy of the given one
      c4-train.00000-of-01024/           train.ids: BOS, pieces, EOS of one document after the other, as in text.py
      first-16/                          validation and test documents, tokenizer, and shards.json: what the first 16 files hold

The train stream is the shards one after the other, so it equals one pass over the files by one process. Documents are normalized
as all text here (sources.normalize). C4 publishes no test split: documents of its first validation file are halved by hash.
"""

import functools
import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from functional_sam.data.cache import Progress, cached, digest, silent
from functional_sam.data.hub import File, layout, rows
from functional_sam.data.shards import Joined, Report, Shard, Watch, listed, prepare_shards, write_list
from functional_sam.data.sources import Document, normalize
from functional_sam.data.text import COUNTS, ENCODE_AT_ONCE, TextData, encode, token_dtype, write_split
from functional_sam.data.tokenizer import BOS, EOS, PAD, Tokenizer, train_tokenizer
from functional_sam.errors import UserError
from functional_sam.files import sha256

FORMAT = 1  # raise it when the same files and tokenizer give other shards
HUB = "allenai/c4"
SAMPLE_CHARACTERS = 40_000_000  # the tokenizer is trained on so many, about 18,000 documents
COMPRESSION = 0.4  # bytes of C4's gz files to a byte of text; only the progress bar is told


@dataclass(frozen=True)
class C4:
    """What a run asks for. files: the first so many train files, none for all; tokenizer: a model file, none to train one."""

    vocab: int
    location: str = HUB
    files: int | None = None
    tokenizer: str | None = None

    def directory(self, cache: Path) -> Path:
        """Where prepare_c4 keeps the set; the shards are beside it."""
        location = str(Path(self.location).resolve()) if Path(self.location).is_dir() else self.location
        made_from = {
            "format": FORMAT,
            "location": location,
            "sentencepiece": importlib.metadata.version("sentencepiece"),
            "vocab": self.vocab,
            "tokenizer": _given(self.tokenizer) if self.tokenizer else {"sample_characters": SAMPLE_CHARACTERS},
        }
        return Path(cache) / f"text-c4-{self.vocab}-{digest(made_from)[:12]}" / (f"first-{self.files}" if self.files else "all")


def prepare_c4(
    wanted: C4, cache: Path, progress: Progress | None = None, processes: int = 0, watch: Watch | None = None
) -> "C4Data":
    """Tokenize what is missing, with so many processes (0: one a core); once per cache, shards shared between sets of files.

    Needs no source once it is done. Raises UserError when files are missing or cannot be read, a given tokenizer does not fit,
    the cache is damaged, the disk is full, or the files are no longer those that were tokenized.
    """
    say = progress or silent
    directory = wanted.directory(cache)
    root = directory.parent

    def build(temporary: Path) -> dict[str, Any]:
        files = layout(wanted.location, "en", "train", ".json.gz", wanted.files, HUB)
        held_out = layout(wanted.location, "en", "validation", ".json.gz", 1, HUB)[0]
        tokenizer = _tokenizer(wanted, root, files[0], say)
        shards = [
            Shard(root / file.name.removesuffix(".json.gz"), file.size, functools.partial(_tokenize, file, tokenizer.path))
            for file in files
        ]
        size = sum(file.size for file in files) / 1e9
        say(f"{wanted.location}: {len(files)} files, {size:.2f} GB (`functional-sam data` tokenizes ahead of a run)")
        manifests = prepare_shards(shards, processes, say, watch)
        for file, manifest in zip(files, manifests, strict=True):
            made_of = manifest["source"]
            if made_of != {"name": file.name, "bytes": file.size}:
                raise UserError(f"{file.url} has {file.size} bytes, the one that was tokenized {made_of['bytes']}: delete {root}")
        say(f"encoding the documents held out in {held_out.name} ...")
        counts = _held_out(held_out, tokenizer, temporary)
        counts["train"] = _together(manifests)
        write_list(temporary, shards, manifests)
        shutil.copyfile(tokenizer.path, temporary / "tokenizer.model")
        return {
            "format": FORMAT,
            "sources": {"c4": {"location": wanted.location, "files": len(files)}},
            "vocab": wanted.vocab,
            "dtype": token_dtype(wanted.vocab).name,
            "tokenizer_sha256": sha256(tokenizer.path),
            **{key: {split: counts[split][key] for split in counts} for key in COUNTS},
        }

    return C4Data(directory, cached(directory, build, say))


class C4Data(TextData):
    """TextData whose train stream is read from shards, in order: C4's documents come shuffled, windows need not be.

    sha256: one digest of the tokenizer, the held-out documents and all shards.
    """

    def _open_train(self) -> Joined:
        return Joined([shard / "train.ids" for shard in listed(self.directory)], self.manifest["dtype"])

    def _order(self, step: int, batch: int, windows: int, seed: int) -> np.ndarray:
        """Windows step * B ... step * B + B - 1 of the stream, so that step s reads the B * L tokens from offset s * B * L on.

        A seed other than 0 starts at another window; past the end the stream goes on at its start.
        """
        first = int.from_bytes(hashlib.sha256(f"order:{seed}".encode()).digest()[:8], "big") if seed else 0
        return ((first + step * batch) % windows + np.arange(batch)) % windows


def documents(file: File) -> Iterator[Document]:
    """The documents of one file in its order; empty ones are left out."""
    from datasets import Features, Value

    features = Features({name: Value("string") for name in ("text", "timestamp", "url")})
    for row in rows(file, "json", features=features, columns=["text"]):
        text = normalize(row["text"] or "")
        if text:
            yield Document(hashlib.sha256(text.encode()).hexdigest()[:16], text, "c4")


def _tokenizer(wanted: C4, root: Path, first: File, say: Progress) -> Tokenizer:
    """In a directory of its own: training takes minutes and need not be done again after a kill."""

    def build(temporary: Path) -> dict[str, Any]:
        if wanted.tokenizer:
            shutil.copyfile(wanted.tokenizer, temporary / "tokenizer.model")
            return {"given": wanted.tokenizer}
        say(f"training a tokenizer of {wanted.vocab:,} pieces on up to {SAMPLE_CHARACTERS:,} characters of {first.name} ...")
        texts = (document.text for document in documents(first))
        train_tokenizer(texts, wanted.vocab, temporary / "tokenizer.model", SAMPLE_CHARACTERS)
        return {"sample": first.name, "characters": SAMPLE_CHARACTERS}

    cached(root / "tokenizer", build, say)
    tokenizer = Tokenizer(root / "tokenizer" / "tokenizer.model")
    if tokenizer.vocab != wanted.vocab:
        raise UserError(f"{wanted.tokenizer} has {tokenizer.vocab} pieces: set data.vocab={tokenizer.vocab}")
    return tokenizer


def _given(tokenizer: str) -> dict[str, str]:
    path = Path(tokenizer)
    if not path.is_file():
        raise UserError(f"data.tokenizer={tokenizer}: no such file; give a SentencePiece model, or nothing to train one")
    _check_pieces(path)
    return {"sha256": sha256(path)}


@functools.lru_cache
def _check_pieces(path: Path) -> None:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"data.tokenizer={path} is not a SentencePiece model: {error}") from error
    if (processor.pad_id(), processor.eos_id(), processor.bos_id()) != (PAD, EOS, BOS):
        raise UserError(
            f"data.tokenizer={path} has pad, eos, bos at {processor.pad_id()}, {processor.eos_id()}, {processor.bos_id()}: "
            f"they must be {PAD}, {EOS}, {BOS}"
        )


def _tokenize(file: File, model: Path, directory: Path, report: Report) -> dict[str, Any]:
    """Write train.ids of one file; what its manifest says."""
    tokenizer = Tokenizer(model)
    dtype = token_dtype(tokenizer.vocab)
    text = hashlib.sha256()
    num_documents = num_tokens = num_bytes = 0
    with (directory / "train.ids").open("wb") as out:
        for some in _by(ENCODE_AT_ONCE, documents(file)):
            made = covered = 0
            for document, ids, ends in encode(some, tokenizer):
                out.write(ids.astype(dtype).tobytes())
                text.update(document.text.encode() + b"\0")
                made += len(ids)
                covered += int(ends[-1])
            num_documents, num_tokens, num_bytes = num_documents + len(some), num_tokens + made, num_bytes + covered
            report(covered * COMPRESSION, made)
    return {
        "source": {"name": file.name, "bytes": file.size},
        "tokenizer_sha256": sha256(model),
        "documents": num_documents,
        "tokens": num_tokens,
        "bytes": num_bytes,
        "text_sha256": text.hexdigest(),
    }


def _by(count: int, stream: Iterator[Document]) -> Iterator[list[Document]]:
    some: list[Document] = []
    for document in stream:
        some.append(document)
        if len(some) == count:
            yield some
            some = []
    if some:
        yield some


def _held_out(file: File, tokenizer: Tokenizer, directory: Path) -> dict[str, dict[str, Any]]:
    """Validation and test: the two halves of one file, each in the file's order (which C4 has shuffled)."""
    halves: dict[str, list[Document]] = {"validation": [], "test": []}
    for document in documents(file):
        halves["validation" if int(document.id, 16) % 2 == 0 else "test"].append(document)
    return {split: write_split(half, split, tokenizer, directory) for split, half in halves.items()}


def _together(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    tokens, num_bytes = (sum(manifest[key] for manifest in manifests) for key in ("tokens", "bytes"))
    if not tokens:
        raise UserError("the train files hold no document")
    return {
        "documents": sum(manifest["documents"] for manifest in manifests),
        "tokens": tokens,
        "bytes": num_bytes,
        "bytes_per_token": round(num_bytes / tokens, 4),
        "text_sha256": digest([manifest["text_sha256"] for manifest in manifests]),
    }
