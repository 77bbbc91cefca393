"""Values that no run can have."""

import re

from functional_sam.config.files import nearest
from functional_sam.config.schema import Config
from functional_sam.errors import UserError

MOST_THREADS = 1024  # with many more PyTorch ends the process


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
    for key, values in (
        ("targets", [*measure.targets, *measure.more_targets]),
        *((key, getattr(measure, key)) for key in ("temperatures", "ascents", "geometries")),
    ):
        twice = [value for value in values if values.count(value) > 1]  # an exhibit would count it as two seeds
        require(not twice, f"measure.{key}: {twice[0] if twice else ''} is there twice")
    require(
        not measure.more_targets or bool(measure.targets),
        "measure.more_targets are measured beside measure.targets: give those too",
    )
    measures = bool(measure.points or measure.curvature)
    for ascent in measure.ascents:
        if ascent not in ("gradient", "adam"):
            raise nearest("value of measure.ascents:", ascent, ["gradient", "adam"])
    require(
        bool(measure.ascents) or not measures, "measure.ascents=[]: measure.points and measure.curvature need one, as [gradient]"
    )
    require(bool(measure.temperatures) or not measure.targets, "measure.temperatures=[]: measure.targets needs one, as [1.0]")
    require(bool(measure.geometries) or not measure.curvature, "measure.geometries=[]: measure.curvature needs one, as [plain]")
    for temperature in measure.temperatures:
        require(0 < temperature < float("inf"), f"measure.temperatures: {temperature} is not above 0 and finite")
    counts("measure", 2, "probes", "density_order")
    counts("measure", 4, "lanczos")
    require(
        not measures or "adam" not in measure.ascents or optimizer.name == "adamw",
        f"measure.ascents={measure.ascents}: adam is the second moment of adamw, which optimizer.name={optimizer.name} has not; "
        "measure.ascents=[gradient] does without",
    )
    for geometry in measure.geometries:
        if geometry not in ("plain", "adam"):
            raise nearest("value of measure.geometries:", geometry, ["plain", "adam"])
    require(not measure.temperature or measure.curvature, "measure.temperature=True: it goes with measure.curvature=true")
    require(
        bool(re.fullmatch(r"cpu|cuda(:\d+)?", config.runtime.device)),
        f"runtime.device={config.runtime.device}: cpu, cuda or cuda:0",
    )
    one_of("runtime", "parallel", "auto", "none", "ddp", "fsdp")
    counts("runtime", 0, "workers")
    counts("runtime", 1, "threads", "checkpoint_every", "log_every")
    threads = config.runtime.threads
    require(threads is None or threads <= MOST_THREADS, f"runtime.threads={threads}: at most {MOST_THREADS}")
    return config
