"""Fine-tuning a pretrained encoder on labelled texts: classes (accuracy) or grades (Spearman's rank correlation)."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data.cache import Progress
from functional_sam.data.candidates import judged
from functional_sam.data.labelled import (
    LabelledTexts,
    any_right,
    classes_of,
    has_candidates,
    labelled_directory,
    prepare_labelled,
    pretrained_directory,
)
from functional_sam.data.shards import Watch
from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.models.encoder import Encoder
from functional_sam.models.shape import EncoderShape, TextShape
from functional_sam.tasks.agreement import agreement
from functional_sam.tasks.batches import Batch
from functional_sam.tasks.ranks import listed, totals
from functional_sam.tasks.task import Metric, Task

# What a transformers config calls the sizes that a config of ours repeats, so that plans need no files of the model.
SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
}


OFFSET = ("roberta", "xlm-roberta", "camembert")  # whose first position comes after that of padding

F1A = Metric("f1a", "F1 over all answers", lower_is_better=False)


class FineTune(Task):
    """Classes. A row of a batch is a text; batches are dicts of input_ids, attention_mask and, of BERT's pairs, token_type_ids.

    Of COPA and ReCoRD, whose questions have candidate answers, a row is a candidate with the class "is right", and the accuracy is
    of questions: of those whose most probable candidate is right (ReCoRD's EM; its F1 is recorded too).
    """

    metric = Metric("accuracy", "accuracy", lower_is_better=False)
    unit = "texts"
    classes = True
    any_right = False  # of a question with candidates any number may be right
    data: LabelledTexts

    @classmethod
    def check(cls, config: Config) -> None:
        model = config.model
        if model.kind != "encoder" or model.pretrained is None:
            raise UserError(f"model.kind={model.kind!r}, model.pretrained={model.pretrained}: fine-tuning has a pretrained encoder")
        cls.check_texts(config)
        if config.data.tokenizer:
            raise UserError("data.tokenizer is not for an encoder, which has its own beside its weights")
        if model.checkpoint_blocks or config.data.noise or config.data.augment:
            raise UserError("model.checkpoint_blocks, data.noise and data.augment are not for fine-tuning")

    @classmethod
    def check_texts(cls, config: Config) -> None:
        """Raise UserError for texts that are unknown, or do not fit the kind of task or each other."""
        data = config.data
        if data.texts is None:
            raise UserError("data.texts is needed: the labelled texts to fine-tune on")
        if data.hub and not any("/" in name for name in (data.texts, *data.transfer)):
            raise UserError(f"data.hub={data.hub}: {data.texts} comes with a package, not from the hub")
        if data.share < 1 and data.unique_texts:
            raise UserError(f"data.share={data.share:g}, data.unique_texts={data.unique_texts} both say how many: give one of them")
        for name in (data.texts, *data.transfer):
            if bool(classes_of(name)) != cls.classes or (name != data.texts and classes_of(name) != classes_of(data.texts)):
                what = "classes" if cls.classes else "grades"
                raise UserError(f"{name} does not fit: kind {config.kind} has {what}, and those of data.transfer are the same")
            if any_right(name) != cls.any_right:
                raise UserError(
                    f"{name} does not fit kind {config.kind}: any number of MultiRC's answers are right, "
                    "which kind answers judges, and no other set's"
                )
        if data.transfer and any(has_candidates(name) for name in (data.texts, *data.transfer)):
            raise UserError(f"data.transfer={data.transfer}: not for sets with candidate answers, nor to them")

    @classmethod
    def prepare(
        cls, config: Config, progress: Progress | None = None, processes: int = 0, watch: Watch | None = None
    ) -> LabelledTexts:
        assert config.data.texts is not None
        prepared = cls.prepared(config.data.texts, config, progress)
        prepared.train_texts(config.data.share, config.data.unique_texts)
        return prepared

    @classmethod
    def data_directory(cls, config: Config) -> Path:
        assert config.data.texts is not None
        return labelled_directory(*wanted(config.data.texts, config))

    @classmethod
    def prepared(cls, name: str, config: Config, progress: Progress | None = None) -> LabelledTexts:
        """A set of texts as the model of the config reads them."""
        require_positions(pretrained_directory(str(config.model.pretrained)), config)
        return prepare_labelled(*wanted(name, config), progress)

    @classmethod
    def data_name(cls, config: Config) -> str:
        share = f"{config.data.share:.0%} of " if config.data.share < 1 else ""
        return f"{share}{config.data.texts}"

    @classmethod
    def model_name(cls, config: Config) -> str:
        frozen = config.model.frozen
        part = "" if frozen is None else ", embeddings frozen" if not frozen else f", embeddings and {frozen} layers frozen"
        return f"{config.model.pretrained}{part}"

    @classmethod
    def shape(cls, config: Config) -> EncoderShape | TextShape:
        m, classes = config.model, classes_of(str(config.data.texts))
        F = m.mlp or 4 * m.width
        return EncoderShape(m.width, m.depth, F, m.heads, m.length, len(classes) or 1, 0, 1, config.data.vocab, 512)

    def __init__(self, config: Config, progress: Progress | None = None):
        super().__init__(config, progress)
        self.transfer = {name: self.prepared(name, config, progress) for name in config.data.transfer}
        self.provenance["transfer"] = {name: texts.sha256 for name, texts in self.transfer.items()}

    def model(self) -> torch.nn.Module:
        """Raises UserError where the files of the pretrained model have other sizes than the config says."""
        m = self.config.model
        directory = pretrained_directory(str(m.pretrained))
        require_sizes(directory, self.config, SIZES)
        return Encoder(
            directory,
            self.shape(self.config).V,
            m.pooling,
            m.dropout,
            m.frozen,
            torch.Generator().manual_seed(self.config.training.init_seed),
        )

    def forward(self, model: torch.nn.Module, inputs: Any, readout: Callable[..., Any] | None = None) -> Any:
        return model(**inputs)

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Those that are trained alone."""
        groups = super().groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return groups

    def rows(self, step: int) -> Batch:
        training, data = self.config.training, self.config.data
        return self.data.train_batch(step, training.batch, training.data_seed, data.share, data.unique_texts)

    def held_out(self, split: str, size: int, rows: int | None) -> Iterable[tuple[Any, ...]]:
        return self.data.eval_batches(split, size, rows)

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Mean loss a text and the metric; with the test split also the metric on each set of data.transfer, untrained on."""
        found = self._judged(model, self.evaluated(split))
        if split == "test":
            training = self.config.training
            for name, texts in self.transfer.items():
                other = self._judged(model, texts.eval_batches(split, training.eval_batch, training.test_rows))
                found[f"{self.metric.name}_{name}"] = other[self.metric.name]
        return found

    def scores(self, model: torch.nn.Module, inputs: Any) -> Tensor:
        """[B, classes] whose softmax are the probabilities of the classes."""
        logits: Tensor = self.forward(model, inputs)
        return logits

    def _judged(self, model: torch.nn.Module, batches: Iterable[tuple[Any, ...]]) -> dict[str, float]:
        """The mean loss, the accuracy and, beside it, Matthews' correlation and F1, by which some of GLUE's sets are reported."""
        if self.data.candidates:
            return self._judged_by_question(model, batches)

        def sums(inputs: Any, labels: Tensor) -> tuple[float, ...]:
            logits = self.scores(model, inputs)
            table = torch.bincount(labels * logits.shape[-1] + logits.argmax(-1), minlength=logits.shape[-1] ** 2)
            return float(cross_entropy(logits, labels)[0]), *table.tolist()

        nats, *table = totals(model, batches, sums)
        texts = sum(table)
        return {"loss": nats / texts, **agreement(table), "texts": int(texts)}

    def _judged_by_question(self, model: torch.nn.Module, batches: Iterable[tuple[Any, ...]]) -> dict[str, float]:
        """Of candidates: the mean loss of one, and what is reported of their questions (data.candidates.judged)."""

        def columns(inputs: Any, labels: Tensor, questions: Tensor, worths: Tensor) -> tuple[Tensor, ...]:
            log_p = self.scores(model, inputs).float().log_softmax(-1)
            return log_p[:, 1] - log_p[:, 0], labels, worths, questions, -log_p.gather(1, labels[:, None])[:, 0]

        scores, labels, worths, questions, nats = zip(*listed(model, batches, columns), strict=True)
        own = judged(scores, [label == 1 for label in labels], worths, questions)
        return {"loss": sum(nats) / len(nats), **own, "texts": len(nats), "questions": len(set(questions))}


class Answers(FineTune):
    """Candidates of which any number are right, each a yes or no of its own: MultiRC, judged by F1 over all of them (F1a)."""

    metric = F1A
    any_right = True


class Acceptability(FineTune):
    """Two classes judged by Matthews' correlation, by which GLUE's CoLA is published."""

    metric = Metric("matthews", "Matthews' correlation", lower_is_better=False)


class Grade(FineTune):
    """Grades: one output, squared error, Spearman's rank correlation between outputs and grades."""

    metric = Metric("spearman", "Spearman's rank correlation", lower_is_better=False)
    classes = False

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        smoothing = config.training.label_smoothing
        if smoothing:
            raise UserError(f"training.label_smoothing={smoothing}: a grade has no classes to share it, leave it out")
        if config.measure.temperature:
            raise UserError("measure.temperature=True: a grade has no classes whose logits could be scaled, leave it out")

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return squared_error

    def _judged(self, model: torch.nn.Module, batches: Iterable[tuple[Any, ...]]) -> dict[str, float]:
        from scipy import stats  # slow to import, for those who evaluate grades

        pairs = listed(model, batches, lambda inputs, grades: (self.forward(model, inputs)[:, 0], grades))
        error = sum((output - grade) ** 2 for output, grade in pairs) / len(pairs)
        # Outputs or grades that are all the same order nothing: a correlation of zero.
        same = any(len(set(values)) < 2 for values in zip(*pairs, strict=True))
        rank = 0.0 if same else float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
        return {"loss": error, "spearman": rank, "texts": len(pairs)}


def squared_error(outputs: Tensor, grades: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of outputs [B, 1], summed over the grades [B], and their number."""
    return (outputs[:, 0] - grades).square().sum(), torch.tensor(len(grades))


def require_sizes(directory: Path, config: Config, names: Mapping[str, str]) -> None:
    """Raise UserError where a pretrained model has other sizes than the config says. names: ours -> those of its config.json."""
    m = config.model
    theirs = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    ours = {"width": m.width, "depth": m.depth, "heads": m.heads, "mlp": m.mlp or 4 * m.width, "vocab": config.data.vocab}
    ours["head_width"] = m.head_width or m.width // m.heads
    for key, name in names.items():
        if theirs.get(name) != ours[key]:
            section = "data" if key == "vocab" else "model"
            raise UserError(f"{m.pretrained} has {name}={theirs.get(name)}: set {section}.{key} to it")


def require_positions(directory: Path, config: Config) -> None:
    """Raise UserError where a row may have more tokens than an encoder has positions; RoBERTa does not use its first ones."""
    theirs = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    left_out = theirs.get("pad_token_id", 1) + 1 if theirs.get("model_type") in OFFSET else 0
    most = theirs.get("max_position_embeddings", config.model.length + left_out) - left_out
    if config.model.length > most:
        raise UserError(f"model.length={config.model.length}: at most {most}, the positions of {config.model.pretrained}")


def wanted(name: str, config: Config) -> tuple[str, str, int, Path, str]:
    """What prepare_labelled is asked for."""
    location = "" if "/" not in name else config.runtime.data or config.data.hub or ""
    tokenizer = config.data.tokenizer or config.model.pretrained
    return name, str(tokenizer), config.model.length, Path(config.runtime.cache), location
