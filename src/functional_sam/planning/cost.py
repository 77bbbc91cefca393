"""Parameters, tokens and floating point operations of a run, counted from its config.

B rows, L tokens of a row (patches of an image), D width, N blocks, F width of the MLP, V outputs.
A product [a, b] x [b, c] is 2abc FLOPs. Counted: every matrix product of the model and of its head, attention with the full L x L
scores, as a fused kernel that skips masked blocks may not do. Not counted: element-wise work, the optimizer.
"""

from dataclasses import dataclass

from functional_sam.config import Config
from functional_sam.models.shape import Shape
from functional_sam.sharpness.methods import ASCENT_OPTIONS, GENERAL_OPTIONS, METHODS, MIX_OPTIONS, PATH_OPTIONS, Method
from functional_sam.tasks import TASKS


def shape(config: Config) -> Shape:
    """Of a config's model."""
    return TASKS[config.kind].shape(config)


@dataclass(frozen=True)
class Cost:
    """parameters, non_embedding: numbers of them; tokens: trained on (images for a ViT); flops: of the run, by all its GPUs;
    step: FLOPs of one step; passes: gradient evaluations of a step; checkpoint: bytes of one on disk, of which two are kept."""

    parameters: int
    non_embedding: int
    tokens: int
    passes: float
    step: float
    flops: float
    checkpoint: int


def cost(config: Config, checkpointing: bool | None = None) -> Cost:
    """Of a run. checkpointing: with recomputed blocks, None for as the config says."""
    s, training = shape(config), config.training
    recompute = config.model.checkpoint_blocks if checkpointing is None else checkpointing
    forwards, backwards, heads = passes(config)
    blocks = block_flops(s) * training.batch * s.N
    embed = 2 * s.inputs * s.D * s.L * training.batch  # no gradient is taken of the images, so backward is one product
    head = 2 * s.D * s.V * s.targets * training.batch
    # Backward is two products for each of forward's. Recomputation repeats a block's forward but for its last product, whose
    # result no gradient needs.
    again = blocks - 2 * s.L * s.D * s.F * training.batch * s.N if recompute else 0
    step = blocks * (forwards + 2 * backwards) + again * backwards + embed * (forwards + backwards) + head * heads
    return Cost(
        s.parameters,
        s.non_embedding,
        training.steps * training.batch * TASKS[config.kind].units(config),
        (forwards + 2 * backwards) / 3,
        step,
        step * training.steps,
        4 * s.parameters * (3 + carried(config)),
    )


def settings(config: Config) -> tuple[Method, dict[str, object]]:
    """The method and its options, the config's over the method's over the general ones."""
    method = METHODS[config.method.name]
    defaults = {**GENERAL_OPTIONS, **ASCENT_OPTIONS[method.ascent], **PATH_OPTIONS[method.path], **MIX_OPTIONS[method.mix]}
    return method, {**defaults, **method.options, **config.method.options}


def passes(config: Config) -> tuple[float, float, float]:
    """(forwards, backwards, products of the head) of a step, means over its interval. A head's gradient is 3 products.

    The penalty path is counted as difference quotients of gradients would be (derivative="exact" measured about the same).
    """
    method, options = settings(config)
    if method.path == "plain":
        return 1.0, 1.0, 3.0
    first = (0.0, 0.0, 0.0) if method.ascent == "momentum" else (1.0, 1.0, 3.0)
    second = {
        "sam": (1.0, 1.0, 3.0),
        "functional": (1.0, 1.0, 3.0) if method.ascent != "momentum" else (2.0, 1.0, 3.0),
        "logit": (2.0, 1.0, 3.0),
        "penalty": (3.0, 3.0, 9.0),
    }[method.path]
    if method.mix == "tram":
        first = (2.0, 1.0, 5.0)
    every = float(str(options["k"])) if method.mix == "looksam" else float(str(options["interval"]))
    plain = (1.0, 1.0, 3.0)
    full = tuple(a + b for a, b in zip(first, second, strict=True))
    forwards, backwards, heads = ((a + (every - 1) * b) / every for a, b in zip(full, plain, strict=True))
    return forwards, backwards, heads


def carried(config: Config) -> int:
    """Copies of the parameters that a method's own state puts into a checkpoint."""
    return {"looksam": 1, "tram": 1}.get(METHODS[config.method.name].mix or "", 0)


def block_flops(s: Shape) -> int:
    """Forward FLOPs of one block for one row: projections, MLP, scores and their product with the values."""
    return 2 * s.L * (4 * s.D**2 + 2 * s.D * s.F) + 4 * s.L**2 * s.D
