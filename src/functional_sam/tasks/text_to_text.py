"""Fine-tuning text to text: T5 reads the fields of a text by name, and answers with the name of its class (Raffel 2020)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data.cache import Progress
from functional_sam.data.labelled import labelled_directory, prepare_labelled, pretrained_directory
from functional_sam.data.text_to_text import IN_WORDS, AnsweredTexts
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE
from functional_sam.models.shape import TextShape
from functional_sam.models.t5 import pretrained_t5, t5
from functional_sam.tasks.batches import Batches
from functional_sam.tasks.encoder_decoder import EncoderDecoder, drawn
from functional_sam.tasks.finetune import F1A, FineTune, require_sizes, wanted

# What a T5's config calls its sizes.
SIZES = {
    "width": "d_model",
    "depth": "num_layers",
    "heads": "num_heads",
    "head_width": "d_kv",
    "mlp": "d_ff",
    "vocab": "vocab_size",
}
ANSWER = 8  # pieces of the longest answer that plans count with; not_entailment has 6 in T5's vocabulary


class TextToText(EncoderDecoder, FineTune):
    """A text is judged by the likelihood of each class's name, all pieces and EOS, nothing generated: the likeliest is the answer.

    Training is cross-entropy per piece of the right name; the loss of an evaluation is nats per text, of its class among the
    classes. Candidate answers are judged as FineTune does, by log p(yes) - log p(no).
    """

    data: AnsweredTexts

    @classmethod
    def check(cls, config: Config) -> None:
        data, model = config.data, config.model
        if model.kind != "t5":
            raise UserError(f"model.kind={model.kind!r}: a task of kind {config.kind} has a t5")
        if model.pretrained is None and data.tokenizer is None:
            raise UserError(
                "model.pretrained or data.tokenizer is needed: a directory with the tokenizer.json by which texts are cut"
            )
        if config.measure.temperature:  # the held-out texts have classes, and the model the pieces of their names
            raise UserError("measure.temperature=True: a t5 answers in words, its logits have no one scale to fit; leave it out")
        cls.check_model(config)
        cls.check_texts(config)
        if model.frozen is not None or model.pooling != "mean":
            raise UserError("model.frozen and model.pooling are for encoders, not for t5")
        if data.noise or data.augment or data.unique_tokens or data.unique_pairs or data.unique_images:
            raise UserError("data.noise, augment, unique_tokens, unique_pairs and unique_images are not for labelled texts")

    @classmethod
    def data_directory(cls, config: Config) -> Path:
        return labelled_directory(*wanted(str(config.data.texts), config), change=IN_WORDS)

    @classmethod
    def prepared(cls, name: str, config: Config, progress: Progress | None = None) -> AnsweredTexts:
        found = prepare_labelled(*wanted(name, config), progress, IN_WORDS)
        pieces = found.manifest["pieces"]
        if pieces > config.data.vocab:
            raise UserError(
                f"data.vocab={config.data.vocab}, but the tokenizer has {pieces} pieces: the model needs as many at least"
            )
        return AnsweredTexts(found.directory, found.manifest)

    @classmethod
    def model_name(cls, config: Config) -> str:
        return str(config.model.pretrained or "T5.1.1 from scratch")

    @classmethod
    def shape(cls, config: Config) -> TextShape:
        m = config.model
        head = m.head_width or m.width // m.heads
        return TextShape(m.width, m.depth, m.mlp or 4 * m.width, m.heads, m.length, config.data.vocab, head, ANSWER, m.tied)

    def model(self) -> torch.nn.Module:
        """Raises UserError where the files of the pretrained model have other sizes than the config says."""
        m = self.config.model
        if m.pretrained is not None:
            directory = pretrained_directory(m.pretrained)
            require_sizes(directory, self.config, SIZES)
            return pretrained_t5(directory, m.tied, m.dropout).train()
        s = self.shape(self.config)
        values = (s.D, s.N, s.H, s.head, s.F, s.V)
        return drawn(lambda: t5(dict(zip(SIZES.values(), values, strict=True)), m.tied, m.dropout), self.config.training.init_seed)

    def measured(self) -> Batches:
        measure = self.config.measure
        held_out = self.held_out("validation", measure.micro_batch, measure.rows)
        return [self.data.answered(inputs, labels) for inputs, labels, *_ in held_out]

    def scores(self, model: torch.nn.Module, inputs: Any) -> Tensor:
        """[B, classes]: log-likelihood of each class's name. The encoder reads a text once."""
        found: list[Tensor] = []
        mask, encoded = inputs["attention_mask"], None
        for label in range(len(self.data.answers)):
            given, targets = self.data.answered({}, torch.full((len(mask),), label))
            decoder, targets = given["decoder_input_ids"].to(mask.device), targets.to(mask.device)
            read = {"input_ids": inputs["input_ids"]} if encoded is None else {"encoder_outputs": (encoded,)}
            output = model(**read, attention_mask=mask, decoder_input_ids=decoder, use_cache=False)
            encoded = output.encoder_last_hidden_state
            log_p = output.logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            found.append(log_p.masked_fill(targets == IGNORE, 0.0).sum(-1))
        return torch.stack(found, dim=1)


class TextToTextAnswers(TextToText):
    """Candidates of which any number are right (MultiRC), judged by F1 over all of them."""

    metric = F1A
    any_right = True
