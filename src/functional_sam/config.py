"""What a run is: the schema with every default. YAML files under configs/ hold differences only.

compose() = defaults <- tasks/TASK.yaml <- scales/SCALE.yaml (its section for the task) <- methods/METHOD.yaml <-
exhibit <- overrides.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from functional_sam.errors import UserError


@dataclass
class ModelConfig:
    """A pre-LN transformer without biases; the defaults are Nanodo's."""

    kind: str = "decoder"  # decoder (text) or vit (images)
    width: int = 512  # D, residual stream
    depth: int = 6  # N, blocks
    heads: int = 8  # H, must divide width
    mlp: int = 0  # F, hidden units of the MLP; 0 = 4 * width
    length: int = 512  # L, tokens of a row (decoder)
    patch: int = 4  # pixels, side of a patch (vit)
    head_dtype: str = "float32"  # of the logits' matrix product under bf16; float32 to the letter of Nanodo
    checkpoint_blocks: bool = False  # recompute activations in backward: less memory, one more forward


@dataclass
class DataConfig:
    """Where real data comes from."""

    sources: list[str] = field(default_factory=lambda: ["news", "encyclopedia"])  # text, see data/sources.py; or [c4], alone
    vocab: int = 1024  # V, SentencePiece pieces
    images: str = "fashion-mnist"  # or mnist-5k, or imagenet-1k; never swapped silently
    unique_tokens: int = 0  # train on so many tokens only, over and over; 0 = all
    files: int = 0  # the first so many train files of c4 or imagenet-1k; 0 = all
    tokenizer: str = ""  # a SentencePiece model for c4; "" = trained on the start of its first file


@dataclass
class MethodConfig:
    """A named method and its options; see `functional-sam methods`."""

    name: str = "adamw"
    rho: float | None = None  # radius, in units of the parameters; None = the method's published default
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """AdamW as in Nanodo: decoupled weight decay on ALL parameters, linear warm-up, cosine decay."""

    lr: float = 1.6e-3  # peak
    lr_start: float = 0.1  # fraction of lr at step 0
    lr_end: float = 0.1  # fraction of lr at the last step
    warmup_steps: int = 1000
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.1
    clip: float = 0.0  # norm the gradient is clipped to, after the method; 0 = off, as in Nanodo


@dataclass
class TrainingConfig:
    """The run."""

    steps: int = 1000
    batch: int = 256  # rows of a step
    micro_batch: int = 0  # rows of a forward; must divide batch; 0 = batch
    precision: str = "bf16"  # bf16 (autocast, float32 master weights), float32 or float64
    init_seed: int = 0  # of the weights
    data_seed: int = 0  # of the order of the data: the same for every method
    eval_every: int = 0  # steps between evaluations on the validation split; 0 = at the end only
    eval_rows: int = 0  # documents or images of an evaluation; 0 = all
    eval_batch: int = 64  # rows of an evaluation forward
    test: bool = False  # evaluate the test split once, after the last step


@dataclass
class MeasureConfig:
    """Decomposition of the sharpness gradient during training, on fixed held-out rows."""

    points: int = 0  # measurements, log-spaced from step 1 to the last; 0 = none
    rows: int = 16  # rows of the held-out (validation) batch
    micro_batch: int = 8  # rows of a second-order pass, which keeps its graph
    ascents: list[str] = field(default_factory=lambda: ["gradient", "adam"])
    curvature: bool = False  # spectra and traces of H, H_G, H_F at the final weights, into curvature.json
    probes: int = 10  # random vectors of a trace
    lanczos: int = 100  # products of a run of Lanczos, at most
    density_probes: int = 0  # random vectors of a spectral density; 0 = no densities
    density_order: int = 64  # products of each of them


@dataclass
class RuntimeConfig:
    """What cannot change a result, and is left out of the run's hash."""

    device: str = "cpu"  # or cuda: of many processes each takes its own GPU
    parallel: str = "auto"  # ddp or fsdp (FSDP2) for the processes of torchrun or srun, none; auto: ddp where WORLD_SIZE > 1
    threads: int = 0  # CPU threads of the process; 0 = all cores
    cache: str = ".cache"  # prepared data
    data: str = (
        ""  # where c4 or imagenet-1k is: a directory in the hub's layout, or OWNER/NAME[@REVISION] there; "" = the hub's own
    )
    runs: str = "runs"
    log_every: int = 10  # steps between lines of metrics.jsonl
    checkpoint_every: int = 200  # steps


# Fields younger than released results: left out of the hash while at their default, so that old runs keep their names.
LATER: tuple[tuple[str, str], ...] = (
    ("data", "files"),
    ("data", "tokenizer"),
    ("measure", "curvature"),
    ("measure", "probes"),
    ("measure", "lanczos"),
    ("measure", "density_probes"),
    ("measure", "density_order"),
)


@dataclass
class Config:
    """One run."""

    task: str = "language"  # a file of configs/tasks
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of everything that can change a result."""
        content, default = dataclasses.asdict(self), dataclasses.asdict(Config())
        del content["runtime"]
        for section, key in LATER:
            if content[section][key] == default[section][key]:
                del content[section][key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return f"{self.task}-{self.method.name}-{self.hash}"


def configs_directory() -> Path:
    """configs/ of the working directory, or of the checkout this package is installed from."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / "configs" / "tasks").is_dir():
            return root / "configs"
    raise UserError(f"no configs/ in {Path.cwd()}: run this from the repository's root")


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
    content: Any = OmegaConf.to_container(OmegaConf.load(path)) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, found a {type(content).__name__}")
    return dict(content)


def compose(
    task: str, method: str = "adamw", scale: str | None = None, extra: Sequence[dict[str, Any]] = (), overrides: Sequence[str] = ()
) -> Config:
    """One complete, checked config. Raises UserError for unknown names or keys, wrong types, impossible values."""
    base = _schema()
    layers = [(f"configs/tasks/{task}.yaml", read_yaml("tasks", task))]
    if scale is not None:
        by_task = read_yaml("scales", scale)
        if task not in by_task:
            raise nearest(f"task of scale {scale!r}:", task, by_task)
        layers.append((f"configs/scales/{scale}.yaml, {task}", by_task[task] or {}))
    layers.append((f"configs/methods/{method}.yaml", read_yaml("methods", method)))
    layers += [("exhibit", dict(layer)) for layer in extra]
    layers.append(("command", {"task": task, "method": {"name": method}}))
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: expected key=value, for instance training.steps=100")
        content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        layers.append((f"override {override!r}", content))
    together: dict[str, Any] = {}
    for where, layer in layers:
        _check_keys(base, layer, where, "")
        together = _over(together, layer)
    try:
        merged = OmegaConf.merge(base, together)  # one merge: each costs milliseconds, and a study has hundreds of configs
    except OmegaConfBaseException:
        for where, layer in layers:  # layer by layer, for a message that names the one at fault
            base = _merge(base, layer, where)
        raise
    return validated(_to_object(merged, "the merged config"))


@functools.cache
def _schema() -> Any:
    """The defaults; never changed, since a merge copies it."""
    return OmegaConf.structured(Config)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, as OmegaConf does it: what is above wins, lists whole."""
    result = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _over(result[key], value) if nested else value
    return result


def load(path: Path) -> Config:
    """A config from a run directory's config.yaml."""
    try:
        content = OmegaConf.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return validated(_to_object(_merge(OmegaConf.structured(Config), content, str(path)), str(path)))


def to_yaml(config: Config) -> str:
    """The complete config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _merge(base: Any, layer: Any, where: str) -> Any:
    _check_keys(base, layer, where, "")
    try:
        return OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key or 'value'}: {str(error).splitlines()[0]}") from error


def _check_keys(base: Any, layer: Any, where: str, prefix: str) -> None:
    """An unknown key is refused here and not by OmegaConf, so that the message can name the nearest known one."""
    if not isinstance(layer, dict | DictConfig):
        return
    for key in map(str, layer):
        full = f"{prefix}{key}"
        if key not in base:
            known = {f"{prefix}{name}" for name in base}
            near = difflib.get_close_matches(full, known, n=1, cutoff=0.4)
            raise UserError(
                f"{where}: unknown key {full!r}" + (f"; did you mean {near[0]!r}?" if near else f" (known: {sorted(known)})")
            )
        if isinstance(base, DictConfig) and isinstance(base[key], DictConfig) and full != "method.options":
            _check_keys(base[key], layer[key], where, f"{full}.")


def _to_object(base: Any, where: str) -> Config:
    try:
        result = OmegaConf.to_object(base)
    except (OmegaConfBaseException, ConfigKeyError) as error:
        raise UserError(f"{where}: {error}") from error
    assert isinstance(result, Config)
    return result


def validated(config: Config) -> Config:
    """The config itself, or a UserError that names the first impossible value."""
    model, data, method, optimizer, training, measure = (
        config.model,
        config.data,
        config.method,
        config.optimizer,
        config.training,
        config.measure,
    )
    if training.micro_batch == 0:
        training.micro_batch = training.batch

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    require(model.kind in ("decoder", "vit"), f"model.kind={model.kind!r}: decoder or vit")
    for key in ("width", "depth", "heads", "length", "patch"):
        require(getattr(model, key) >= 1, f"model.{key}={getattr(model, key)}: at least 1")
    require(model.mlp >= 0, f"model.mlp={model.mlp}: hidden units, or 0 for 4 * width")
    require(model.width % model.heads == 0, f"model.heads={model.heads} does not divide model.width={model.width}")
    require(model.head_dtype in ("float32", "bfloat16"), f"model.head_dtype={model.head_dtype!r}: float32 or bfloat16")
    require(data.vocab >= 16, f"data.vocab={data.vocab}: at least 16 pieces")
    require(data.files >= 0, f"data.files={data.files}: a number of files, or 0 for all")
    require(data.unique_tokens >= 0, f"data.unique_tokens={data.unique_tokens}: a number of tokens, or 0 for all")
    require(method.rho is None or 0 <= method.rho < float("inf"), f"method.rho={method.rho}: finite and >= 0")
    require(optimizer.lr >= 0, f"optimizer.lr={optimizer.lr}: >= 0")
    require(0 <= optimizer.beta1 < 1 and 0 <= optimizer.beta2 < 1, "optimizer.beta1 and beta2 lie in [0, 1)")
    require(optimizer.warmup_steps >= 0, f"optimizer.warmup_steps={optimizer.warmup_steps}: >= 0")
    require(optimizer.clip >= 0, f"optimizer.clip={optimizer.clip}: a norm, or 0 for none")
    require(training.steps >= 1, f"training.steps={training.steps}: at least 1")
    require(training.batch >= 1, f"training.batch={training.batch}: at least 1")
    require(
        training.micro_batch >= 1 and training.batch % training.micro_batch == 0,
        f"training.micro_batch={training.micro_batch} does not divide training.batch={training.batch}",
    )
    require(
        training.precision in ("bf16", "float32", "float64"), f"training.precision={training.precision!r}: bf16, float32 or float64"
    )
    require(measure.points >= 0 and measure.rows >= 1, f"measure.points={measure.points}, measure.rows={measure.rows}")
    require(
        measure.probes >= 2 and measure.lanczos >= 4, f"measure.probes={measure.probes} (2 or more), lanczos={measure.lanczos} (4)"
    )
    require(
        measure.density_probes >= 0 and measure.density_order >= 2,
        f"measure.density_probes={measure.density_probes} (0 or more), density_order={measure.density_order} (2)",
    )
    require(measure.micro_batch >= 1, f"measure.micro_batch={measure.micro_batch}: at least 1")
    require(
        config.runtime.parallel in ("auto", "none", "ddp", "fsdp"),
        f"runtime.parallel={config.runtime.parallel!r}: auto, none, ddp or fsdp",
    )
    require(config.runtime.checkpoint_every >= 1, f"runtime.checkpoint_every={config.runtime.checkpoint_every}: at least 1")
    require(config.runtime.log_every >= 1, f"runtime.log_every={config.runtime.log_every}: at least 1")
    return config
