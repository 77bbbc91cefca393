"""Values that no run can have. What a task needs beyond that, it checks itself."""

import re
from collections.abc import Sequence

from functional_sam.config.files import nearest
from functional_sam.config.schema import Config
from functional_sam.errors import UserError

MOST_THREADS = 1024  # with many more PyTorch ends the process


def validated(config: Config) -> Config:
    """The config itself, unchanged, or a UserError that names the first impossible value."""
    for section in (_model, _data, _optimizer, _training, _measured, _measurements, _runtime):
        section(config)
    return config


def _model(config: Config) -> None:
    model = config.model
    _counts(config, "model", 1, "width", "depth", "heads", "head_width", "mlp", "length", "patch")
    blocks = bool(model.stages) and min(model.stages) > 0
    _require(blocks, f"model.stages={model.stages}: a number of blocks, at least 1, for each stage")
    divides = model.head_width is not None or model.width % model.heads == 0
    _require(divides, f"model.heads={model.heads} does not divide model.width={model.width}")
    _require(0 < model.embedding_scale < float("inf"), f"model.embedding_scale={model.embedding_scale}: above 0 and finite")
    _require(0 <= model.dropout < 1, f"model.dropout={model.dropout}: a fraction, at least 0 and below 1")
    _one_of(config, "model", "head_dtype", "float32", "bfloat16")
    _one_of(config, "model", "activation", "gelu", "relu")
    _one_of(config, "model", "norm", "group", "batch")
    _one_of(config, "model", "pooling", "mean", "first")
    _counts(config, "model", 0, "frozen")


def _data(config: Config) -> None:
    data = config.data
    _require(0 < data.share <= 1, f"data.share={data.share}: a fraction of the training texts, above 0 and at most 1")
    _require(data.vocab >= 16, f"data.vocab={data.vocab}: at least 16 pieces")
    _one_of(config, "data", "held_out", "documents", "windows")
    _one_of(config, "data", "augment", None, "crop-flip", "inception")
    _counts(config, "data", 1, "files", "unique_tokens", "unique_images", "unique_pairs", "unique_texts")
    _require(0 <= data.noise <= 1, f"data.noise={data.noise}: a fraction of the labels, from 0 to 1")


def _optimizer(config: Config) -> None:
    """And the radius of the method."""
    rho, optimizer = config.method.rho, config.optimizer
    _require(rho is None or 0 <= rho < float("inf"), f"method.rho={rho}: finite and >= 0")
    _one_of(config, "optimizer", "name", "adamw", "sgd", "adafactor")
    _require(optimizer.relative or optimizer.name == "adafactor", "optimizer.relative=False is for optimizer.name=adafactor")
    _one_of(config, "optimizer", "schedule", "cosine", "linear", "constant")
    _one_of(config, "optimizer", "decay", "all", "matrices")
    for key in ("lr", "warmup_steps", "weight_decay", "lr_start", "lr_end", "eps"):
        value = getattr(optimizer, key)
        _require(0 <= value < float("inf"), f"optimizer.{key}={value}: finite and >= 0")
    for key in ("beta1", "beta2", "momentum"):
        value = getattr(optimizer, key)
        _require(0 <= value < 1, f"optimizer.{key}={value}: at least 0 and below 1")
    _require(optimizer.clip is None or optimizer.clip > 0, f"optimizer.clip={optimizer.clip}: a norm above 0, or null for none")


def _training(config: Config) -> None:
    training = config.training
    _counts(config, "training", 1, "steps", "batch", "micro_batch", "eval_every", "eval_rows", "test_rows", "eval_batch")
    for key in ("init_seed", "data_seed"):
        value = getattr(training, key)
        _require(0 <= value < 2**32, f"training.{key}={value}: a seed, from 0 to {2**32 - 1}")
    divides = training.batch % config.micro_batch == 0
    _require(divides, f"training.micro_batch={training.micro_batch} does not divide training.batch={training.batch}")
    for key in ("jitter", "label_smoothing"):
        value = getattr(training, key)
        _require(0 <= value < 1, f"training.{key}={value}: a fraction, at least 0 and below 1")
    _one_of(config, "training", "precision", "float32", "float64", "bf16")


def _measured(config: Config) -> None:
    """How often, on how much, and which ascents, geometries and temperatures."""
    measure = config.measure
    _counts(config, "measure", 0, "doses", "points", "density_probes")
    _counts(config, "measure", 1, "rows", "micro_batch", "adam_from")
    _counts(config, "measure", 2, "curvature_targets", "probes", "density_order")
    _counts(config, "measure", 4, "lanczos")
    for key in ("targets", "more_targets"):
        for number in getattr(measure, key):
            even = number >= 2 and number % 2 == 0
            _require(even, f"measure.{key}: {number} is no even number of targets, to be halved")
    _once("targets", [*measure.targets, *measure.more_targets])
    _once("temperatures", measure.temperatures)
    for temperature in measure.temperatures:
        _require(0 < temperature < float("inf"), f"measure.temperatures: {temperature} is not above 0 and finite")
    for key in ("ascents", "geometries"):
        known = ["plain" if key == "geometries" else "gradient", "adam"]
        _once(key, getattr(measure, key))
        for name in getattr(measure, key):
            if name not in known:
                raise nearest(f"value of measure.{key}:", name, known)


def _measurements(config: Config) -> None:
    """What a measurement needs beside it."""
    measure, optimizer = config.measure, config.optimizer.name
    beside = not measure.more_targets or bool(measure.targets)
    _require(beside, "measure.more_targets are measured beside measure.targets: give those too")
    along = bool(measure.points or measure.curvature)
    _require(bool(measure.ascents) or not along, "measure.ascents=[]: measure.points and measure.curvature need one, as [gradient]")
    _require(bool(measure.temperatures) or not measure.targets, "measure.temperatures=[]: measure.targets needs one, as [1.0]")
    _require(bool(measure.geometries) or not measure.curvature, "measure.geometries=[]: measure.curvature needs one, as [plain]")
    _require(
        not along or "adam" not in measure.ascents or optimizer == "adamw",
        f"measure.ascents={measure.ascents}: adam is the second moment of adamw, which optimizer.name={optimizer} has not; "
        "measure.ascents=[gradient] does without",
    )
    _require(not measure.temperature or measure.curvature, "measure.temperature=True: it goes with measure.curvature=true")


def _runtime(config: Config) -> None:
    device, threads = config.runtime.device, config.runtime.threads
    _require(bool(re.fullmatch(r"cpu|cuda(:\d+)?", device)), f"runtime.device={device}: cpu, cuda or cuda:0")
    _one_of(config, "runtime", "parallel", "auto", "none", "ddp", "fsdp")
    _counts(config, "runtime", 0, "workers")
    _counts(config, "runtime", 1, "threads", "checkpoint_every", "log_every")
    _require(threads is None or threads <= MOST_THREADS, f"runtime.threads={threads}: at most {MOST_THREADS}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _counts(config: Config, section: str, least: int, *keys: str) -> None:
    """Numbers that are at least so large; where they may be left out, none stands for that."""
    for key in keys:
        value = getattr(getattr(config, section), key)
        _require(value is None or value >= least, f"{section}.{key}={value}: at least {least}")


def _one_of(config: Config, section: str, key: str, *choices: str | None) -> None:
    value = getattr(getattr(config, section), key)
    if value not in choices:
        raise nearest(f"value of {section}.{key}:", str(value), [choice for choice in choices if choice])


def _once(key: str, values: Sequence[object]) -> None:
    """An exhibit would count what is there twice as two seeds."""
    twice = next((value for value in values if values.count(value) > 1), None)
    _require(twice is None, f"measure.{key}: {twice} is there twice")
