"""What a run is: the schema with every default. YAML files under configs/ hold differences only.

compose() = defaults <- tasks/TASK.yaml <- scales/SCALE.yaml (its section for the task) <- method <- exhibit <- overrides.
"""

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from functional_sam.data.packages import pinned
from functional_sam.errors import UserError

T = TypeVar("T")
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
    hub: str | None = None  # OWNER/NAME[@REVISION] of c4 or imagenet-1k on the hub; none: the one they are published as
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
    return {name: value for name, value in _keys().items() if name != "runtime"}


def configs_directory() -> Path:
    """configs/ of the working directory, or of the checkout this package is installed from."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / "configs" / "tasks").is_dir():
            return root / "configs"
    raise UserError(f"no configs/ in {Path.cwd()}: run this from the root of a clone (or of the unpacked sdist), which has them")


def nearest(kind: str, value: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}{hint} (known: {', '.join(known)})")


def read_yaml(folder: str, name: str) -> dict[str, Any]:
    """configs/FOLDER/NAME.yaml; an unknown NAME is a UserError with the nearest known one."""
    path = configs_directory() / folder / f"{name}.yaml"
    if not path.is_file():
        raise nearest(folder.rstrip("s"), name, (file.stem for file in path.parent.glob("*.yaml")))
    return copy.deepcopy(_parsed(path, path.stat().st_mtime_ns, path.stat().st_size))


@functools.lru_cache(maxsize=64)
def _parsed(path: Path, changed: int, size: int) -> dict[str, Any]:
    """What a YAML file holds, read once: to parse one takes milliseconds, and a study composes hundreds of configs."""
    return _mapping(path)


def _mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds; UserError where it is no YAML, or no mapping."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, found a {type(content).__name__}")
    return content


def compose(
    task: str, method: str = "adamw", scale: str | None = None, extra: Sequence[dict[str, Any]] = (), overrides: Sequence[str] = ()
) -> Config:
    """One complete, checked config. Raises UserError for unknown names or keys, wrong types, impossible values."""
    from functional_sam.sharpness.methods import METHODS, resolve  # these import torch, which a reader of records can do without
    from functional_sam.tasks import check

    if method not in METHODS:
        raise nearest("method", method, METHODS)
    layers = [(f"configs/tasks/{task}.yaml", read_yaml("tasks", task))]
    if scale is not None:
        by_task = read_yaml("scales", scale)
        if task not in by_task:
            raise nearest(f"task of scale {scale!r}:", task, by_task)
        layers.append((f"configs/scales/{scale}.yaml, {task}", by_task[task] or {}))
    layers += [("exhibit", dict(layer)) for layer in extra]
    layers.append(("command", {"task": task, "method": {"name": method}}))
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: expected key=value, for instance training.steps=100")
        content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        layers.append((f"override {override!r}", content))
    together: dict[str, Any] = {}
    for where, layer in layers:
        _check_keys(layer, where)
        together = _over(together, layer)
    config = validated(_merged(together, layers))
    check(config)
    resolve(config.method.name, config.method.options)
    return config


def instance(kind: type[T], *layers: dict[str, Any]) -> T:
    """A dataclass of a schema, over whose defaults the layers are laid, checked by OmegaConf, whose errors it raises.

    A merge costs milliseconds, and a study has hundreds of configs that have most in common: each content is merged once.
    """
    key = f"{kind.__qualname__}{layers!r}"
    if key not in _INSTANCES:
        _INSTANCES[key] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), *layers))
    found: T = copy.deepcopy(_INSTANCES[key])
    return found


_INSTANCES: dict[str, Any] = {}


def _merged(content: dict[str, Any], layers: Sequence[tuple[str, dict[str, Any]]]) -> Config:
    """The config that differs from the defaults by `content`, section by section.

    Raises UserError for a value of another type than its setting, by the one of the (name, layer) that has it.
    """
    default = Config()
    sections = {name: own for name, own in content.items() if isinstance(own, dict)}
    try:
        if "${" in repr(content):  # an interpolation may name another section
            return instance(Config, content)
        merged = instance(Config, {name: own for name, own in content.items() if name not in sections})
        return dataclasses.replace(merged, **{name: instance(type(getattr(default, name)), own) for name, own in sections.items()})
    except OmegaConfBaseException as error:
        base = OmegaConf.structured(Config)
        for where, layer in layers:
            base = _merge(base, layer, where)
        raise UserError(f"the merged config: {error}") from error


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, as OmegaConf does it: what is above wins, lists whole."""
    result = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _over(result[key], value) if nested else value
    return result


def load(path: Path) -> Config:
    """A config from a run directory's config.yaml."""
    content = _mapping(path)
    _check_keys(content, str(path))
    return validated(_merged(content, [(str(path), content)]))


def to_yaml(config: Config) -> str:
    """The complete config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _merge(base: Any, layer: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key or 'value'}: {str(error).splitlines()[0]}") from error


def _check_keys(layer: Any, where: str, known: dict[str, Any] | None = None, prefix: str = "") -> None:
    """An unknown key is refused here and not by OmegaConf, so that the message can name the nearest known one."""
    if not isinstance(layer, dict):
        return
    known = _keys() if known is None else known
    for key in map(str, layer):
        full = f"{prefix}{key}"
        if key not in known:
            names = {f"{prefix}{name}" for name in known}
            near = difflib.get_close_matches(full, names, n=1, cutoff=0.4)
            raise UserError(
                f"{where}: unknown key {full!r}" + (f"; did you mean {near[0]!r}?" if near else f" (known: {sorted(names)})")
            )
        if isinstance(known[key], dict) and full != "method.options":
            _check_keys(layer[key], where, known[key], f"{full}.")


@functools.cache
def _keys() -> dict[str, Any]:
    """Section -> key -> default; only read."""
    return dataclasses.asdict(Config())


def validated(config: Config) -> Config:
    """The config itself, unchanged, or a UserError that names the first impossible value. What a task needs, it checks itself."""
    model, data, method = config.model, config.data, config.method
    optimizer, training, measure = config.optimizer, config.training, config.measure

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    def counts(section: str, least: int, *keys: str) -> None:
        """Numbers that are at least so large; where they may be left out, none stands for that."""
        for key in keys:
            value = getattr(getattr(config, section), key)
            require(value is None or value >= least, f"{section}.{key}={value}: at least {least}")

    def one_of(section: str, key: str, *choices: str | None) -> None:
        value = getattr(getattr(config, section), key)
        if value not in choices:
            raise nearest(f"value of {section}.{key}:", str(value), [choice for choice in choices if choice])

    counts("model", 1, "width", "depth", "heads", "head_width", "mlp", "length", "patch")
    require(
        bool(model.stages) and min(model.stages) > 0, f"model.stages={model.stages}: a number of blocks, at least 1, for each stage"
    )
    divides = model.head_width is not None or model.width % model.heads == 0
    require(divides, f"model.heads={model.heads} does not divide model.width={model.width}")
    require(0 < model.embedding_scale < float("inf"), f"model.embedding_scale={model.embedding_scale}: above 0 and finite")
    require(0 <= model.dropout < 1, f"model.dropout={model.dropout}: a fraction, at least 0 and below 1")
    one_of("model", "head_dtype", "float32", "bfloat16")
    one_of("model", "activation", "gelu", "relu")
    one_of("model", "norm", "group", "batch")
    one_of("model", "pooling", "mean", "first")
    counts("model", 0, "frozen")
    require(0 < data.share <= 1, f"data.share={data.share}: a fraction of the training texts, above 0 and at most 1")
    require(data.vocab >= 16, f"data.vocab={data.vocab}: at least 16 pieces")
    one_of("data", "held_out", "documents", "windows")
    one_of("data", "augment", None, "crop-flip", "inception")
    counts("data", 1, "files", "unique_tokens", "unique_images", "unique_pairs", "unique_texts")
    require(0 <= data.noise <= 1, f"data.noise={data.noise}: a fraction of the labels, from 0 to 1")
    require(method.rho is None or 0 <= method.rho < float("inf"), f"method.rho={method.rho}: finite and >= 0")
    one_of("optimizer", "name", "adamw", "sgd", "adafactor")
    require(optimizer.relative or optimizer.name == "adafactor", "optimizer.relative=False is for optimizer.name=adafactor")
    one_of("optimizer", "schedule", "cosine", "linear", "constant")
    one_of("optimizer", "decay", "all", "matrices")
    for key in ("lr", "warmup_steps", "weight_decay", "lr_start", "lr_end", "eps"):
        value = getattr(optimizer, key)
        require(0 <= value < float("inf"), f"optimizer.{key}={value}: finite and >= 0")
    for key in ("beta1", "beta2", "momentum"):
        require(0 <= getattr(optimizer, key) < 1, f"optimizer.{key}={getattr(optimizer, key)}: at least 0 and below 1")
    require(optimizer.clip is None or optimizer.clip > 0, f"optimizer.clip={optimizer.clip}: a norm above 0, or null for none")
    counts("training", 1, "steps", "batch", "micro_batch", "eval_every", "eval_rows", "test_rows", "eval_batch")
    for key in ("init_seed", "data_seed"):
        value = getattr(training, key)
        require(0 <= value < 2**32, f"training.{key}={value}: a seed, from 0 to {2**32 - 1}")
    require(
        training.batch % config.micro_batch == 0,
        f"training.micro_batch={training.micro_batch} does not divide training.batch={training.batch}",
    )
    for key in ("jitter", "label_smoothing"):
        value = getattr(training, key)
        require(0 <= value < 1, f"training.{key}={value}: a fraction, at least 0 and below 1")
    one_of("training", "precision", "float32", "float64", "bf16")
    counts("measure", 0, "doses", "points", "density_probes")
    counts("measure", 1, "rows", "micro_batch", "adam_from")
    counts("measure", 2, "curvature_targets")
    for key in ("targets", "more_targets"):
        for number in getattr(measure, key):
            require(number >= 2 and number % 2 == 0, f"measure.{key}: {number} is no even number of targets, to be halved")
    require(
        not measure.more_targets or bool(measure.targets),
        "measure.more_targets are measured beside measure.targets: give those too",
    )
    for temperature in measure.temperatures:
        require(0 < temperature < float("inf"), f"measure.temperatures: {temperature} is not above 0 and finite")
    counts("measure", 2, "probes", "density_order")
    counts("measure", 4, "lanczos")
    measured = (measure.points or measure.curvature) and "adam" in measure.ascents
    require(
        not measured or optimizer.name == "adamw",
        f"measure.ascents={measure.ascents}: adam is the second moment of adamw, which optimizer.name={optimizer.name} has not; "
        "measure.ascents=[gradient] does without",
    )
    for geometry in measure.geometries:
        if geometry not in ("plain", "adam"):
            raise nearest("value of measure.geometries:", geometry, ["plain", "adam"])
    require(not measure.temperature or measure.curvature, "measure.temperature=True: it goes with measure.curvature=true")
    one_of("runtime", "parallel", "auto", "none", "ddp", "fsdp")
    counts("runtime", 0, "workers")
    counts("runtime", 1, "threads", "checkpoint_every", "log_every")
    return config
