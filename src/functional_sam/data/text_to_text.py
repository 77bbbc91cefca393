"""Labelled texts for an encoder-decoder that answers in words: "rte premise: ... hypothesis: ..." -> "not_entailment".

Letters: B rows, T pieces of an answer, its EOS included.
"""

from typing import Any

from torch import Tensor

from functional_sam.data import glue
from functional_sam.data.labelled import Change, Inputs, LabelledTexts, classes_of, tokenizer_directory
from functional_sam.data.labels import Row
from functional_sam.data.translation import filled, shifted
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE


class AnsweredTexts(LabelledTexts):
    """The same texts; training rows have the name of their class as their target. answers: pieces of each class's name."""

    @property
    def answers(self) -> list[list[int]]:
        found: list[list[int]] = self.manifest["answers"]
        return found

    def train_batch(
        self, step: int, batch: int, seed: int, share: float = 1.0, unique_texts: int | None = None
    ) -> tuple[Inputs, Tensor]:
        """Inputs and the pieces of the answers [B, T] (see `answered`) of batch number `step`."""
        return self.answered(*super().train_batch(step, batch, seed, share, unique_texts))

    def answered(self, inputs: Inputs, labels: Tensor) -> tuple[Inputs, Tensor]:
        """For the classes `labels` [B]: inputs with decoder_input_ids (PAD, as T5 begins, then the answer) and the answers [B, T].

        Both int64; an answer is followed by IGNORE.
        """
        targets = filled([self.answers[label] for label in labels.tolist()], IGNORE)
        pad = self.manifest["pad"]
        return {**inputs, "decoder_input_ids": shifted(targets, pad, pad)}, targets


def in_words(name: str, row: Row) -> Row:
    """One text with the names of the set and of its fields, as T5 has it."""
    one = glue.SETS.get(name)
    fields = (one.fields or one.columns) if one else ("text",)
    parts = [f"{field}: {text}" for field, text in zip(fields, row[:2], strict=False) if text is not None]
    return " ".join([one.folder if one else name, *parts]), None, row[2]


def answers(name: str, tokenizer: str) -> dict[str, Any]:
    """Of the manifest: the pieces of each class's name, with what the tokenizer puts around them (T5's: EOS), and of how many.

    Raises UserError where two classes are spelled alike.
    """
    from transformers import AutoTokenizer

    classes, own = list(classes_of(name)), AutoTokenizer.from_pretrained(tokenizer_directory(tokenizer), local_files_only=True)
    pieces = [list(map(int, one)) for one in own(classes)["input_ids"]]
    if len({tuple(one) for one in pieces}) < len(pieces):
        raise UserError(f"the tokenizer of {tokenizer} spells two classes of {name} alike ({', '.join(classes)}): take another one")
    return {"answers": pieces, "pieces": len(own)}


IN_WORDS = Change("text-to-text 1", in_words, answers)
