"""What a run is: the schema with every default, and the name that a run has from it."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from functional_sam.data.packages import pinned

SCHEMA = 2  # raised when the same settings come to mean another result: every run then has another name


@dataclass
class ModelConfig:
    """The model of a run; the defaults are Nanodo's decoder, pre-LN and without biases."""

    # Of the task's: decoder (language), vit or convnet (vision), encoder (finetune), marian (translation), t5 (text to text)
    kind: str = "decoder"
    width: int = 512  # D, residual stream
    depth: int = 6  # N, blocks
    heads: int = 8  # H, must divide width
    head_width: int | None = None  # of a t5: numbers of a head (its d_kv), whatever the width; none: width / heads
    mlp: int | None = None  # F, hidden units of the MLP; none: 4 * width
    length: int = 512  # L, tokens of a row
    patch: int = 4  # pixels, side of a patch; of a convnet, pixels from one output of its stem to the next: 1, 2 or 4
    activation: str = "gelu"  # of vision models: gelu or relu
    norm: str = "group"  # of a convnet: group or batch
    stages: list[int] = field(
        default_factory=lambda: [1, 1]
    )  # of a convnet: blocks at each resolution; the width doubles in between
    bottleneck: bool = False  # of a convnet: blocks 1x1, 3x3, 1x1 that leave four times the width, as in ResNet-50
    embedding_scale: float = 1.0  # of a decoder: its initial embeddings, and with them its logits, times this
    dropout: float = 0.0  # fraction of a block's outputs set to zero while training
    head_dtype: str = "float32"  # of the logits' matrix product under bf16; float32 to the letter of Nanodo
    checkpoint_blocks: bool = False  # recompute activations in backward: less memory, one more forward
    # An encoder: all-minilm-l6-v2 (of a package); or, as a t5, a directory as `transformers` saves it, or a fetched name of the hub
    pretrained: str | None = None
    tied: bool = False  # of a t5: the embedding is its head too, as in the first T5; T5.1.1 has a head of its own
    frozen: int | None = None  # of an encoder: its embeddings and first so many layers are not trained; none: all is trained
    pooling: str = "mean"  # what an encoder's head reads: the mean over tokens that are no padding, or the first token


@dataclass
class DataConfig:
    """Where real data comes from."""

    sources: list[str] = field(default_factory=lambda: ["news", "encyclopedia"])  # text, see data/sources.py; or [c4], alone
    vocab: int = 1024  # V, SentencePiece pieces
    held_out: str = "documents"  # rows of validation and test: documents cut to L (Nanodo), or windows: all of each document
    images: str = "fashion-mnist"  # or mnist-5k, or imagenet-1k; never swapped silently
    augment: str | None = None  # of training images: crop-flip (small shifts, mirror) or inception (imagenet-1k: any part, mirror)
    relabel: int | None = None  # classes: images turned, moved, mirrored, inverted alike for any number of them; data/relabel.py
    noise: float = 0.0  # fraction of the training images whose label is drawn anew from all classes, once a data_seed
    unique_images: int | None = None  # train on the first so many images only, over and over; none: all
    hub: str | None = None  # OWNER/NAME[@REVISION] of data of the hub; none: where they are published
    unique_tokens: int | None = None  # train on so many tokens only, over and over; none: all
    unique_pairs: int | None = None  # of a translation task: train on the first so many pairs only, over and over; none: all
    files: int | None = None  # the first so many train files of c4 or imagenet-1k; none: all
    elsewhere: list[str] = field(default_factory=list)  # text of another kind, for measure.robustness: cut by the run's tokenizer
    # A SentencePiece model for c4; none: trained on the start of its first file. Of text-to-text a directory with a tokenizer.json;
    # none: the pretrained model's
    tokenizer: str | None = None
    texts: str | None = None  # texts with a label each, see data/labelled.py
    transfer: list[str] = field(default_factory=list)  # tested on without training: texts with the same labels, or other sources
    share: float = 1.0  # of the training texts: the first so large a part, in the order of their hashes
    unique_texts: int | None = None  # train on the first so many texts only, over and over; none: all


@dataclass
class MethodConfig:
    """A named method and its options; see `functional-sam methods`."""

    name: str = "adamw"
    rho: float | None = None  # radius, in units of the parameters; none: the method's published default
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule; the defaults are Nanodo's: AdamW, weight decay on ALL parameters, cosine after a warm-up."""

    name: str = "adamw"  # adamw, sgd (with momentum) or adafactor
    lr: float = 1.6e-3  # peak
    schedule: str = "cosine"  # cosine or linear, to lr_end, or constant; each after a linear warm-up
    lr_start: float = 0.1  # fraction of lr at step 0
    lr_end: float = 0.1  # fraction of lr that the schedule would reach one step after the last
    warmup_steps: int = 1000
    beta1: float = 0.9  # of adamw
    beta2: float = 0.98
    eps: float = 1e-9
    momentum: float = 0.9  # of sgd
    relative: bool = True  # of adafactor: a step is lr times the root mean square of the tensor that it changes; false: lr itself
    weight_decay: float = 0.1  # decoupled, but for sgd
    decay: str = "all"  # parameters that it acts on: all, or matrices (two or more dimensions: no biases, no norms)
    clip: float | None = None  # norm the gradient is clipped to, after the method; none: off, as in Nanodo


@dataclass
class TrainingConfig:
    """The run."""

    steps: int = 1000
    batch: int = 256  # rows of a step
    micro_batch: int | None = None  # rows of a forward; must divide batch; none: batch
    precision: str = "float32"  # float32, float64, or bf16 (autocast, float32 weights): for hardware that multiplies it natively
    init_seed: int = 0  # of the weights
    data_seed: int = 0  # of the order of the data, and of what is drawn in a step: the same for every method
    eval_every: int | None = None  # steps between evaluations on the validation split; none: at the end only
    eval_rows: int | None = None  # rows of an evaluation on the validation split; none: all
    test_rows: int | None = None  # rows of the evaluation on the test split; none: all
    eval_batch: int = 64  # rows of an evaluation forward
    test: bool = False  # evaluate the test split once, after the last step
    test_best: bool = False  # and at each evaluation that is the best so far on the validation split: the last of them counts
    label_smoothing: float = 0.0  # part of a target that all classes share alike; in training alone, no evaluation has it
    jitter: float = 0.0  # relative size of a random change of the initial weights: a placebo, to see what chance alone does


@dataclass
class MeasureConfig:
    """What is measured on the way: doses, and the decomposition of the sharpness gradient on fixed held-out rows."""

    doses: int = 8  # measurements of |g_method - g| / |g|, log-spaced over the steps
    points: int = 0  # decompositions, log-spaced from step 1 to the last
    rows: int = 16  # rows of the held-out (validation) batch
    targets: list[int] = field(default_factory=list)  # instead of it, at each point: exact numbers of targets; training/targets.py
    more_targets: list[int] = field(default_factory=list)  # and at every second point, the last included
    temperatures: list[float] = field(default_factory=lambda: [1.0])  # what logits are divided by, in decompositions by targets
    micro_batch: int = 8  # rows of a second-order pass, which keeps its graph
    ascents: list[str] = field(default_factory=lambda: ["gradient", "adam"])
    adam_from: int = 10  # step from which the adam ascent is measured: before, P g is the sign of g, rounding noise included
    curvature_targets: int | None = None  # instead of `rows`, for the final curvature: a batch of so many targets
    curvature: bool = False  # spectra and traces of H, H_G, H_F at the final weights, into curvature.json
    robustness: bool = False  # loss after rounding, noise and training on data.elsewhere, of the final weights: robustness.json
    temperature: bool = False  # with curvature: the same with the logits times the scale that fits the validation split best
    geometries: list[str] = field(default_factory=lambda: ["plain", "adam"])  # whose curvature: as it is, and as Adam sees it
    probes: int = 10  # random vectors of a trace
    lanczos: int = 100  # products of a run of Lanczos, at most
    density_probes: int = 0  # random vectors of a spectral density
    density_order: int = 64  # products of each of them


@dataclass
class RuntimeConfig:
    """What cannot change a result, and is left out of the run's hash."""

    device: str = "cpu"  # or cuda: of many processes each takes its own GPU
    parallel: str = "auto"  # ddp or fsdp (FSDP2) for the processes of torchrun or srun, none; auto: ddp where WORLD_SIZE > 1
    threads: int | None = None  # CPU threads of the process; none: all cores
    cache: str = ".cache"  # prepared data
    data: str | None = None  # a directory that holds data.hub in the hub's own layout; none: the hub itself
    workers: int = 0  # processes that decode inception crops ahead of the training; 0: none, the run does it
    runs: str = "runs"
    log_every: int = 10  # steps between lines of metrics.jsonl
    checkpoint_every: int = 200  # steps


@dataclass
class Config:
    """One run."""

    task: str = "language"  # a file of configs/tasks
    kind: str = "language"  # what sort of task it is: one of functional_sam.tasks.TASKS
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of all that can change a result: what differs from the defaults, and the packages
        that hold the data, each with its version. So a new setting leaves the names of old runs alone."""
        content = {"schema": SCHEMA, "packages": pinned(self._names), **_differing(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def _names(self) -> list[str]:
        """Of data and models that a package may hold."""
        data = self.data
        return [*data.sources, *data.elsewhere, data.images, *data.transfer, *filter(None, (data.texts, self.model.pretrained))]

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return f"{self.task}-{self.method.name}-{self.hash}"

    @property
    def micro_batch(self) -> int:
        """Rows of a forward."""
        return self.training.micro_batch or self.training.batch


def _differing(config: Config) -> dict[str, Any]:
    """Section -> key -> value of every setting that is not the default and can change a result."""
    found: dict[str, Any] = {}
    for name, default in _defaults().items():
        value = getattr(config, name)
        if not isinstance(default, dict):
            found[name] = value
        elif differing := {key: getattr(value, key) for key, usual in default.items() if getattr(value, key) != usual}:
            found[name] = differing
    return found


@functools.cache
def _defaults() -> dict[str, Any]:
    """Section -> key -> default, without what cannot change a result."""
    return {name: value for name, value in keys().items() if name != "runtime"}


@functools.cache
def keys() -> dict[str, Any]:
    """Section -> key -> default; only read."""
    return dataclasses.asdict(Config())
