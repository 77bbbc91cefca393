"""A SentencePiece unigram tokenizer that loses nothing: decode(encode(text)) == text, each piece covers known bytes."""

import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from functional_sam.errors import UserError

PAD, EOS, BOS, UNK = 0, 1, 2, 3
TRAINING_CHARACTERS = 4_000_000  # 4 times as many give 1 % fewer tokens and take 3 times as long


def train_tokenizer(
    texts: Iterable[str], vocab: int, path: Path, characters: int = TRAINING_CHARACTERS, coverage: float = 0.9995
) -> None:
    """Train a unigram model of `vocab` pieces on the first so many `characters` of `texts` and write it to `path`.

    coverage: part of the text whose characters, the most frequent ones, must be pieces; SentencePiece's own default.

    The same texts in the same order give the same bytes. Characters outside the vocabulary are spelled in bytes (256 of the
    pieces), so UNK never occurs and bits per byte hide nothing.
    Raises UserError when `vocab` is too large or too small for the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_first(texts, characters),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=BOS,
            unk_id=UNK,
            byte_fallback=True,
            character_coverage=coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],  # else a line's end is glued to words
            max_sentence_length=1 << 30,  # a "sentence" is a document; the default drops what is longer than 4,192 bytes
            shuffle_input_sentence=False,
            num_threads=1,  # sums of floats depend on the number of threads, and with them the pieces
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().rpartition("] ")[2]  # what comes before is a line of their source
        raise UserError(f"cannot train a tokenizer of {vocab} pieces: {reason} Change the vocab or use more text") from error
    with path.open("wb") as file:
        file.write(model.getvalue())


class Tokenizer:
    """A trained model file, loaded at first use. Pickles as its path (a SentencePiece processor does not pickle)."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        return Tokenizer, (self.path,)

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_file=str(self.path))

    @property
    def vocab(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    @functools.cached_property
    def piece_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each piece covers, int64 [V]: PAD, EOS and BOS 0, a byte piece 1, else the length of its text.

        A table instead of SentencePiece's surface offsets: it is exact because nothing is normalized away (text.py checks
        the sum for every document), it splits a character that is spelled in several byte pieces, and needs no protobuf.
        """
        processor = self._processor
        lengths = np.zeros(self.vocab, dtype=np.int64)
        for i in range(self.vocab):
            if processor.is_byte(i):
                lengths[i] = 1
            elif not processor.is_control(i) and not processor.is_unknown(i):
                lengths[i] = len(processor.id_to_piece(i).replace("\u2581", " ").encode())
        return lengths


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return
