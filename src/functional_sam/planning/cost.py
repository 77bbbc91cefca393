"""Parameters, tokens and floating point operations of a run, counted from its config.

B rows, L tokens of a row (patches of an image; of pairs the most that either side may have), D width, N blocks (N each of an
encoder-decoder), F width of the MLP, V outputs.
A product [a, b] x [b, c] is 2abc FLOPs. Counted: every matrix product of the model and of its head, attention with the full L x L
scores, as a fused kernel that skips masked blocks may not do. Not counted: element-wise work, the optimizer.
"""

from dataclasses import dataclass

from functional_sam.config import Config
from functional_sam.models.shape import ConvShape, PairShape, Shape, TextShape
from functional_sam.sharpness.methods import Cost, cost, needs_cotangent, resolve
from functional_sam.tasks import TASKS

MOMENTS = {"adamw": 2, "sgd": 1, "adafactor": 0}  # copies of the parameters that an optimizer keeps; adafactor's are vectors

DECODED = 200.0  # inception crops a second that a worker makes of photographs of 500 x 375: measured on one core


def shape(config: Config) -> Shape | ConvShape | PairShape:
    """Of a config's model."""
    return TASKS[config.kind].shape(config)


@dataclass(frozen=True)
class RunCost:
    """parameters, non_embedding: numbers of them; tokens: trained on (images in vision); flops: of the run, by all its GPUs;
    wide: of these, the ones of float32 products (all of a float32 run; of one in bf16 the head's, by model.head_dtype);
    step: FLOPs of one step; forward: of one row without a gradient; gradients: evaluations of a step; checkpoint: bytes of one on
    disk, of which two are kept."""

    parameters: int
    non_embedding: int
    tokens: int
    gradients: float
    step: float
    forward: float
    flops: float
    wide: float
    checkpoint: int


def of_method(config: Config) -> Cost:
    """What a step of the config's method costs."""
    return cost(config.method.name, config.method.options)


def keeps_cotangent(config: Config, gpus: int = 1, sharded: bool = False) -> bool:
    """Whether pass 1 keeps u instead of the last hidden state: as asked, or where it takes no more memory than the parameters."""
    method, options = resolve(config.method.name, config.method.options)
    if not (needs_cotangent(method, options) and method.has_first_pass(options)) or options["keep"] not in ("auto", "u"):
        return False
    s = shape(config)
    if isinstance(s, PairShape):  # without a readout u is what is kept
        return True
    own = parameter_bytes(config) * s.parameters / (gpus if sharded else 1)
    return options["keep"] == "u" or config.training.batch // gpus * s.targets * s.V * head_bytes(config) <= own


def parameter_bytes(config: Config) -> int:
    """Of a parameter."""
    return 8 if config.training.precision == "float64" else 4


def head_bytes(config: Config) -> int:
    """Of a logit."""
    return 2 if config.training.precision == "bf16" and config.model.head_dtype == "bfloat16" else parameter_bytes(config)


def run_cost(config: Config, checkpointing: bool | None = None, gpus: int = 1, sharded: bool = False) -> RunCost:
    """Of a run. checkpointing: with recomputed blocks, None for as the config says."""
    s, training = shape(config), config.training
    recompute = (config.model.checkpoint_blocks if checkpointing is None else checkpointing) and isinstance(s, Shape)
    method = of_method(config)
    forwards, backwards, heads = method.forwards, method.backwards, method.heads
    if isinstance(s, PairShape):  # without a readout every forward evaluates the head
        heads = forwards + 2 * backwards
    elif keeps_cotangent(config, gpus, sharded):  # the product that would build the logits again
        heads -= 1 / resolve(config.method.name, config.method.options)[1]["every"]
    if isinstance(s, ConvShape):
        blocks, last = sum(one.flops for block in s.blocks() for one in block) * training.batch, s.last
        embed = s.first.flops * training.batch
    else:
        blocks, last = block_flops(s) * training.batch * s.N, s.D
        # No gradient is taken of the images, so backward is one product.
        embed = 2 * s.inputs * s.D * s.L * training.batch if isinstance(s, Shape) else 0
    head = 2 * last * s.V * s.targets * training.batch
    # Backward is two products for each of forward's. Recomputation repeats a block's forward but for its last product, whose
    # result no gradient needs.
    again = blocks - 2 * s.L * s.D * s.F * training.batch * s.N if recompute and isinstance(s, Shape) else 0
    step = blocks * (forwards + 2 * backwards) + again * backwards + embed * (forwards + backwards) + head * heads
    bf16, readout = training.precision == "bf16", not isinstance(s, PairShape)  # transformers' models leave the head to autocast
    wide = 0.0 if bf16 else step
    if bf16 and readout and config.model.head_dtype == "float32":
        wide = head * heads
    return RunCost(
        s.parameters,
        s.non_embedding,
        training.steps * training.batch * TASKS[config.kind].units(config),
        method.gradients,
        step,
        (blocks + embed + head) / training.batch,
        step * training.steps,
        wide * training.steps,
        parameter_bytes(config) * s.parameters * (1 + MOMENTS[config.optimizer.name] + method.carried),
    )


def decoding_hours(config: Config) -> float:
    """GPU-hours of a run whose GPUs only wait for inception crops, which runtime.workers of each make; 0 where nothing is decoded.

    A step decodes its images once, whatever its passes.
    """
    if config.data.augment != "inception":
        return 0.0
    return config.training.steps * config.training.batch / (DECODED * max(1, config.runtime.workers)) / 3600


def block_flops(s: Shape | PairShape) -> int:
    """Forward FLOPs of one block for one row: projections, MLP, scores and their product with the values.

    Of an encoder-decoder those of a block of the encoder and one of the decoder, which has a second attention.
    """
    if isinstance(s, TextShape):
        read, written, inner = s.L, s.T, s.H * s.head
        encoder = 2 * read * (4 * s.D * inner + 3 * s.D * s.F) + 4 * read**2 * inner
        decoder = 2 * written * (6 * s.D * inner + 3 * s.D * s.F) + 4 * read * s.D * inner + 4 * written * (written + read) * inner
        return encoder + decoder
    attention, mlp = 2 * s.L * 4 * s.D**2 + 4 * s.L**2 * s.D, 2 * s.L * 2 * s.D * s.F
    return 3 * attention + 2 * mlp if isinstance(s, PairShape) else attention + mlp
