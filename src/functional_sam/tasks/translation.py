"""Translation from scratch: an encoder-decoder of `transformers`, made from a config, never loaded from the hub."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data.bitext import bitext_of
from functional_sam.data.cache import Progress
from functional_sam.data.shards import Watch
from functional_sam.data.tokenizer import BOS, EOS, PAD
from functional_sam.data.translation import PairData, pairs_directory, prepare_pairs
from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.models.shape import PairShape
from functional_sam.tasks.batches import Batch, placed
from functional_sam.tasks.encoder_decoder import EncoderDecoder, drawn
from functional_sam.tasks.ranks import gathered, shared, totals
from functional_sam.tasks.task import Metric

BEAMS = 4


class Translation(EncoderDecoder):
    """Rows are pairs drawn at random, padded to the longest of the step. The test split is translated too, by beam search.

    The model is Marian's: post-LN, sinusoidal positions, one embedding for both sides and the head, biases. Its attention is SDPA.
    """

    metric = Metric("loss", "loss (nats per token)", lower_is_better=True)
    unit = "pairs"
    data: PairData

    def __init__(self, config: Config, progress: Progress | None = None):
        super().__init__(config, progress)
        self.provenance["metrics"] = {name: str(score.get_signature()) for name, score in _scores().items()}
        self.provenance["beams"] = BEAMS
        self.provenance["fitting"] = {"train": len(self.data.fitting("train", config.model.length))}  # pairs that are trained on

    @classmethod
    def check(cls, config: Config) -> None:
        data, model = config.data, config.model
        bitext = bitext_of(data.sources)
        if model.kind != "marian":
            raise UserError(f"model.kind={model.kind!r}: a task of kind translation has marian, an encoder-decoder")
        if model.width % 2:
            raise UserError(f"model.width={model.width}: sinusoidal positions need an even one")
        cls.check_model(config)
        if data.noise or data.augment or data.unique_images or data.unique_tokens or data.held_out != "documents":
            raise UserError(
                "data.noise, augment, unique_images, unique_tokens and held_out are not for pairs; data.unique_pairs is"
            )
        if data.tokenizer:
            raise UserError("data.tokenizer is for c4: a translation task trains a joint vocabulary of its own")
        if not bitext.on_hub and (data.files or data.hub):
            raise UserError(f"data.files and data.hub are for a bitext of the hub, not for {bitext.name}")

    @classmethod
    def prepare(cls, config: Config, progress: Progress | None = None, processes: int = 0, watch: Watch | None = None) -> PairData:
        data = config.data
        return prepare_pairs(data.sources, data.vocab, Path(config.runtime.cache), _location(config), data.files, progress)

    @classmethod
    def data_directory(cls, config: Config) -> Path:
        data = config.data
        return pairs_directory(data.sources, data.vocab, Path(config.runtime.cache), _location(config), data.files)

    @classmethod
    def data_name(cls, config: Config) -> str:
        return bitext_of(config.data.sources).title

    @classmethod
    def model_name(cls, config: Config) -> str:
        return "Marian encoder-decoder"

    @classmethod
    def shape(cls, config: Config) -> PairShape:
        m = config.model
        return PairShape(m.width, m.depth, m.mlp or 4 * m.width, m.heads, m.length, config.data.vocab)

    def model(self) -> torch.nn.Module:
        from transformers import MarianMTModel  # slow to import, and only this task needs it

        return drawn(lambda: MarianMTModel(marian_config(self.config)), self.config.training.init_seed)

    def rows(self, step: int) -> Batch:
        training, data = self.config.training, self.config.data
        return self.data.train_batch(step, training.batch, self.config.model.length, training.data_seed, data.unique_pairs)

    def held_out(self, split: str, size: int, rows: int | None) -> Iterable[tuple[Any, ...]]:
        return self.data.eval_batches(split, size, self.config.model.length, rows)

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Mean nats per target token (EOS is one; not smoothed); of the test split also BLEU and chrF of what beam search finds."""

        def sums(inputs: Any, labels: Tensor, pairs: Tensor) -> tuple[float, ...]:
            loss, count = cross_entropy(self.forward(model, inputs), labels)
            return float(loss), int(count), len(pairs)

        nats, tokens, pairs = totals(model, self.evaluated(split), sums)
        found = {"loss": nats / tokens, "tokens": int(tokens), "pairs": int(pairs)}
        return found | self.scored(model, split) if split == "test" else found

    def scored(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """BLEU and chrF (sacrebleu; the signatures are in the provenance) of all translations against the published texts."""
        translations, references = self.translations(model, split), self.data.references(split)
        pairs = sorted(translations)
        texts, published = [translations[pair] for pair in pairs], [references[pair] for pair in pairs]
        return {name: float(score.corpus_score(texts, [published]).score) for name, score in _scores().items()}

    def translations(self, model: torch.nn.Module, split: str) -> dict[int, str]:
        """Number of a pair -> its source translated by beam search; of all processes, in each."""
        parameter = next(model.parameters())
        found: dict[int, str] = {}
        for batch, counts in shared(self.evaluated(split)):
            inputs, _, pairs = placed(batch, parameter.device, parameter.dtype)
            generated: Tensor = model.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                num_beams=BEAMS,
                do_sample=False,
                max_new_tokens=self.config.model.length,
            )
            if counts:
                found |= {int(pair): self.data.text(pieces) for pair, pieces in zip(pairs, generated.tolist(), strict=True)}
        return dict(gathered(list(found.items())))


def marian_config(config: Config) -> Any:
    """The sizes of a config as `transformers` takes them.

    Weights are normal with standard deviation 1/sqrt(D), embeddings too, which are multiplied by sqrt(D) where they are read.
    """
    from transformers import MarianConfig

    m = config.model
    return MarianConfig(
        vocab_size=config.data.vocab,
        d_model=m.width,
        encoder_layers=m.depth,
        decoder_layers=m.depth,
        encoder_attention_heads=m.heads,
        decoder_attention_heads=m.heads,
        encoder_ffn_dim=m.mlp or 4 * m.width,
        decoder_ffn_dim=m.mlp or 4 * m.width,
        max_position_embeddings=m.length,
        activation_function=m.activation,
        dropout=m.dropout,
        init_std=m.width**-0.5,
        scale_embedding=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=None,
    )


@functools.cache
def _scores() -> dict[str, Any]:
    """What translations are judged by; each knows its signature after it has seen a reference."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    found: dict[str, Any] = {"bleu": BLEU(), "chrf": CHRF()}
    for score in found.values():
        score.corpus_score(["a"], [["a"]])
    return found


def _location(config: Config) -> str | None:
    """Of the pairs, where it is not the bitext's own."""
    return config.runtime.data or config.data.hub
