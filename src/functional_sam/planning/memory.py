"""Memory of one GPU at the peak of a training step, from the config: an account of every tensor this code keeps.

T tokens of a forward, D width, F width of the MLP, H heads, L tokens of a row, V outputs, N blocks, P parameters, W processes,
w bytes of a parameter (4; 8 in float64), a bytes of an activation in a branch (2 under bf16 autocast, else w). Per token, the
graph of a block holds: the input of both norms and their normalized value 4 w D, mean and rstd of both 4 w, the inputs of qkv and
up 2 a D, q, k, v and the output of attention 4 a D, log-sum-exp w H, the MLP before and after GELU 2 a F. Not fused, attention
holds its weights a H L instead of w H. Under autocast the graph also holds the weights in bf16, whole even where FSDP2 shards.
Checked against the storages of real steps and of simulated FSDP2 on 8 to 512 processes in tests/test_planning.py.
"""

from dataclasses import dataclass, fields

from functional_sam.config import Config
from functional_sam.errors import UserError
from functional_sam.head import CHUNK_BYTES, SWEEP_BYTES
from functional_sam.models.shape import ConvShape, PairShape, Shape, TextShape
from functional_sam.planning.cost import MOMENTS, head_bytes, keeps_cotangent, of_method, parameter_bytes, shape
from functional_sam.sharpness.methods import METHODS, needs_cotangent, resolve


@dataclass(frozen=True)
class Layout:
    """How a run is laid out. sharded: FSDP2, a unit a block, else replicas (DDP). cpu: as the code runs there, for checks."""

    gpus: int = 1
    sharded: bool = False
    checkpointing: bool = False
    cpu: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak.

    copies: of parameters or gradients that the method keeps (theta while it is perturbed). kept: h (and, sharded, the head)
    or u from pass 1 for pass 2. activations: what the graph holds. work: the head's chunk of logits, parameters gathered by FSDP2,
    gradients on their way.
    """

    weights: float
    gradients: float
    moments: float
    copies: float
    kept: float
    activations: float
    work: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def rows(config: Config, gpus: int) -> tuple[int, int]:
    """(rows of a forward, forwards of a step) on each GPU. Raises UserError when the batch cannot be divided among them."""
    training = config.training
    if gpus < 1 or training.batch % gpus:
        raise UserError(f"training.batch={training.batch} cannot be divided among {gpus} GPUs: take a divisor of it")
    each = training.batch // gpus
    size = min(config.micro_batch, each)
    return size, -(-each // size)


def accounted(config: Config) -> bool:
    """Whether memory() knows the config's method: all but the exact penalty path."""
    return not of_method(config).second_order


def memory(config: Config, layout: Layout) -> Memory:
    """At the peak of a step of the config's method, after the first (moments exist).

    The penalty path with derivative="exact" keeps a second-order graph and is refused: use the account for "difference".
    """
    s, (size, forwards) = shape(config), rows(config, layout.gpus)
    (_, options), spent = resolve(config.method.name, config.method.options), of_method(config)
    if not accounted(config):
        raise UserError(f'{config.method.name} with derivative="exact" keeps a second-order graph, which is not accounted for')
    if isinstance(s, ConvShape):
        return _convolutional(config, s, layout, size, forwards)
    w = parameter_bytes(config)
    a = 2 if config.training.precision == "bf16" else w
    tokens, targets = size * s.L, size * s.targets
    shards = layout.gpus if layout.sharded else 1
    own = w * s.parameters / shards  # one copy of the parameters, on this GPU

    if isinstance(s, TextShape):
        return _of_text(config, layout, s, size, forwards)
    if isinstance(s, PairShape):
        return _of_pairs(config, layout, s, size, forwards)

    # What outlives a pass.
    part = s.D * (2 * s.N + 1) / s.parameters if options["subset"] == "norm" else 1
    copies = own * (spent.theta * part + spent.g + spent.carried)
    if keeps_cotangent(config, layout.gpus, layout.sharded):
        kept = float(forwards * targets * s.V * head_bytes(config))
    else:
        kept = float(forwards * targets * s.D * w * spent.h)
        kept += w * s.V * s.D if spent.head or (spent.h and layout.sharded) else 0
    # DDP's buckets stay; elsewhere gradients are freed between steps and passes, and there before the second forward of a pass.
    there = forwards > 1 or (layout.gpus > 1 and not layout.sharded)

    # The graph.
    masks = 2 * s.D * (a if layout.cpu else 1) if config.model.dropout else 0
    block = (_saved(s, a, w, not (layout.cpu and a == 2 and s.L <= 512)) + masks) * tokens
    cast = 2 * (s.block - 2 * s.D) if a == 2 else 0  # the matrices of a block in bf16
    each = tokens * w * s.D if layout.checkpointing else block + cast
    ends = tokens * w * s.D * 2 if not s.inputs else tokens * (w * s.D + a * s.inputs) + 2 * targets * w * s.D  # final norm
    head_weight = w * s.V * s.D  # its gradient, made in forward
    unit = w * s.block if layout.sharded else 0.0  # gathered for as long as a block is at work, the next one ahead of it
    root = w * s.root if layout.sharded else 0.0  # gathered from the forward to the end of the backward

    head_forward = _head(config, s, targets, w, layout.cpu) + head_weight
    at_head = s.N * each + (s.N * cast if layout.checkpointing else 0) + ends
    inside = block + cast if layout.checkpointing else 0.0  # computed again
    backward = tokens * (2 * w * s.D + a * s.D + 2 * a * s.F) + a * s.D * s.F
    gradients_of_blocks = w * s.N * s.block / shards
    points = []
    for activations, grown, work in (
        (at_head, 0.0, head_forward + root + unit),  # FSDP2 holds the buffer of its last gathering until the next
        (s.N * each + inside, 0.0, backward + head_weight + root + 2 * unit),
        ((s.N - 1) * each, 0.0, head_weight + root + 4 * unit),  # its gradients, copied to be reduced, and the next one gathered
        (each + inside, gradients_of_blocks, backward + head_weight + root + 2 * unit),
        (0.0, gradients_of_blocks, 2 * head_weight + root + tokens * w * s.D),
    ):
        points.append(Memory(own, own if there else grown, MOMENTS[config.optimizer.name] * own, copies, kept, activations, work))
    return max(points, key=lambda point: point.total)


def _convolutional(config: Config, s: ConvShape, layout: Layout, size: int, forwards: int) -> Memory:
    """Of a ConvNet, which recomputes nothing.

    Of each convolution's output the graph holds what the norm reads and what the next convolution reads; one copy more for GELU,
    which saves its input and not its result, and one for GroupNorm, whose scale stays outside. All of it at the start of
    backward, with every gradient: 5 to 25 % above what real steps take.
    """
    spent, (_, options) = of_method(config), resolve(config.method.name, config.method.options)
    w = parameter_bytes(config)
    a = 2 if config.training.precision == "bf16" else w
    every = [s.first, *(one for block in s.blocks() for one in block)]
    own = w * s.parameters / (layout.gpus if layout.sharded else 1)
    norms = 2 * sum(one.outputs for one in every) / s.parameters
    copies = own * (spent.theta * (norms if options["subset"] == "norm" else 1) + spent.g + spent.carried)
    if keeps_cotangent(config, layout.gpus, layout.sharded):
        kept = float(forwards * size * s.V * head_bytes(config))
    else:
        kept = float(forwards * size * s.last * w * spent.h + (w * s.V * s.last if spent.head else 0))
    saved = (2 + (config.model.activation != "relu") + (config.model.norm == "group")) * sum(one.values for one in every)
    cast = 2 * sum(one.weights for one in every) if a == 2 else 0
    gathered = w * s.parameters if layout.sharded else 0
    work = 2 * a * size * max(one.values for one in every) + w * s.V * s.last + gathered
    return Memory(own, own, MOMENTS[config.optimizer.name] * own, copies, kept, a * size * saved + cast, work)


def _of_pairs(config: Config, layout: Layout, s: PairShape, size: int, forwards: int) -> Memory:
    """Of an encoder-decoder without a readout: replicas only, nothing recomputed, every row as long as the plan takes it to be.

    Per piece, the graph of a block of the encoder holds the inputs of its products, q, k, v, the output of attention and the MLP's
    hidden units, (6 D + F) a, and the inputs of two norms, 2 w D; of the decoder, with a second attention, (11 D + F) a and 3 w D;
    both a mask for each of their branches. Where the loss is taken there are the logits, their log-softmax and two gradients.
    """
    (_, options), spent = resolve(config.method.name, config.method.options), of_method(config)
    w = parameter_bytes(config)
    a = 2 if config.training.precision == "bf16" else w
    pieces, own, logits = size * s.L, w * s.parameters, size * s.targets * s.V * w
    mask = (w if layout.cpu else 1) * s.D if config.model.dropout else 0
    block = (17 * s.D + 2 * s.F) * a + 5 * w * s.D + 3 * w * s.H + 10 * w + 5 * mask
    cast = 2 * (s.parameters if a == 2 else 0)  # the matrices in bf16
    graph = pieces * (s.N * block + 2 * w * s.D + 2 * mask) + cast
    part = s.N * 5 * 2 * s.D / s.parameters if options["subset"] == "norm" else 1
    copies = own * (spent.theta * part + spent.g + spent.carried)
    kept = float((forwards - 1) * logits) if needs_cotangent(METHODS[config.method.name], options) else 0.0
    there = forwards > 1 or layout.gpus > 1
    positions = 2 * s.L * s.D * w  # of both sides, which are not trained
    points = []
    for activations, grown, work in ((graph, 0.0, 4.0 * logits + (size * s.targets * s.V * a if a == 2 else 0)), (0.0, own, 0.0)):
        moments = MOMENTS[config.optimizer.name] * own
        points.append(Memory(own + positions, own if there else grown, moments, copies, kept, activations, work))
    return max(points, key=lambda point: point.total)


def _of_text(config: Config, layout: Layout, s: TextShape, size: int, forwards: int) -> Memory:
    """Of a T5 without a readout: replicas only, nothing recomputed, every row as long as the plan takes it to be.

    I = H * head. Per piece, the graph of a branch holds its input and the normalized one 2 w D, the norm's scale w, its output a D
    and a mask D. Attention: q, k, v and the output 4 a I, and a row of scores (softmax, mask, what is left) for each head, since a
    bias that is trained keeps it from being fused. MLP: what is not linear in GELU's tanh form, and the gate, 7 a F, and a mask F.
    """
    (_, options), spent = resolve(config.method.name, config.method.options), of_method(config)
    w = parameter_bytes(config)
    a = 2 if config.training.precision == "bf16" else w
    inner, own, logits = s.H * s.head, w * s.parameters, size * s.targets * s.V * w
    mask = (w if layout.cpu else 1) if config.model.dropout else 0
    dropped = mask + a if mask else 0  # what a dropout adds: its mask, and its output beside its input
    branch = (2 * w + a + mask) * s.D + w
    scores = (a + dropped) * s.H
    mlp = branch + 6 * a * s.F + (dropped or a) * s.F
    read = s.N * (branch + 4 * a * inner + scores * s.L + mlp) + 2 * w * s.D + 2 * mask * s.D
    written = s.N * (2 * branch + 6 * a * inner + scores * (s.T + s.L) + mlp) + 2 * w * s.D + 2 * mask * s.D
    cast = 2 * (s.parameters if a == 2 else 0)
    graph = size * (s.L * (read + 2 * s.N * a * inner) + s.T * written) + cast
    part = s.D * (5 * s.N + 2) / s.parameters if options["subset"] == "norm" else 1
    copies = own * (spent.theta * part + spent.g + spent.carried)
    kept = float((forwards - 1) * logits) if needs_cotangent(METHODS[config.method.name], options) else 0.0
    there = forwards > 1 or layout.gpus > 1
    points = []
    for activations, grown, work in ((graph, 0.0, 4.0 * logits + (size * s.targets * s.V * a if a == 2 else 0)), (0.0, own, 0.0)):
        moments = MOMENTS[config.optimizer.name] * own
        points.append(Memory(own, own if there else grown, moments, copies, kept, activations, work))
    return max(points, key=lambda point: point.total)


def _saved(s: Shape, a: int, w: int, fused: bool) -> int:
    """Bytes that a block's graph holds for a token."""
    attention = w * s.H if fused else a * s.H * s.L
    return 4 * w * s.D + 4 * w + 6 * a * s.D + attention + 2 * a * s.F


def _head(config: Config, s: Shape, targets: int, w: int, cpu: bool) -> float:
    """Bytes at work in the forward of the head: h and its gradient, h in the head's dtype, and chunks of logits.

    Two chunks where there is more than one: the second is made before the first is let go.
    """
    narrow = config.training.precision == "bf16" and config.model.head_dtype == "bfloat16"
    dtype = 2 if narrow else w
    chunk = min(targets, max(64, CHUNK_BYTES // (4 * s.V)))
    chunks = chunk + min(chunk, targets - chunk)
    wide = min(chunk, max(1, SWEEP_BYTES // (4 * s.V))) if cpu else chunk
    logits = max(chunks * s.V * dtype, chunk * (s.V + s.D) * dtype, chunk * s.V * dtype + (wide * s.V * 4 if narrow else 0))
    if METHODS[config.method.name].mix == "tram":  # the divergence has two more, of the earlier logits and of their softmax
        logits += 2 * chunk * s.V * 4
    return targets * s.D * (2 * w + dtype) + logits + (2 * 2 * s.V * s.D if narrow else 0)
