"""The decoder against Nanodo written out plainly, its properties one by one, and the ViT built from the same block.

B batch, L sequence, D width, H heads, K width of a head, V outputs.
"""

import math
from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.models import PUBLISHED, Decoder, LayerNorm, ViT
from functional_sam.models.block import Block, attend

PIECES = 32_101  # of the published tokenizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def decoder(dtype=torch.float64, **options):
    options = {"vocab": 13, "width": 16, "depth": 2, "heads": 4, "length": 8, "generator": seeded(), **options}
    return Decoder(dtype=dtype, **options)


def vit(dtype=torch.float64, **options):
    options = {"image": 8, "patch": 4, "classes": 5, "width": 16, "depth": 2, "heads": 4, "generator": seeded(), **options}
    return ViT(dtype=dtype, **options)


def case(kind, dtype=torch.float64, **options):
    """A model of a kind and an input for it."""
    if kind == "decoder":
        return decoder(dtype, **options), torch.randint(13, (3, 8), generator=seeded(1))
    return vit(dtype, **options), torch.randn(3, 3, 8, 8, dtype=dtype, generator=seeded(1))


both = pytest.mark.parametrize("kind", ["decoder", "vit"])


# --- against the paper and Nanodo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "non_embedding", "total"),
    [
        ("23.9M", 23_895_360, 42_680_448),
        ("42.5M", 42_477_312, 67_524_096),
        ("117.9M", 117_981_440, 159_726_080),
        ("1208M", 1_208_059_904, 1_274_851_328),
    ],
)
def test_published_sizes(name, non_embedding, total):
    size = PUBLISHED[name]
    model = Decoder(vocab=PIECES, length=512, **asdict(size), device="meta")
    assert model.num_parameters(non_embedding=True) == non_embedding
    assert model.num_parameters() == total
    D, N = size.width, size.depth
    assert size.mlp == 4 * D
    assert size.heads * 64 == D
    assert non_embedding == N * (12 * D**2 + 2 * D) + D  # two LayerNorms a block, and the final one
    assert total == non_embedding + (PIECES + 512) * D


def nanodo(model, tokens_BL):
    """Nanodo's forward with its einsums, on the weights of a Decoder."""

    def norm(x, scale):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * scale

    L, D = tokens_BL.shape[1], model.tokens.shape[1]
    x_BLD = model.tokens[tokens_BL] + model.positions[torch.arange(L)]
    for block in model.blocks:
        H, K = block.heads, D // block.heads
        query, key, value = (w.T.reshape(D, H, K) for w in block.qkv.weight.chunk(3))  # Flax kernels are [inputs, outputs]
        y_BLD = norm(x_BLD, block.norm_attention.weight)
        q, k, v = (torch.einsum("bld,dhk->blhk", y_BLD, kernel) for kernel in (query, key, value))
        scores = torch.einsum("bqhk,bshk->bhqs", q / K**0.5, k)
        scores = torch.where(torch.ones(L, L).tril().bool(), scores, torch.finfo(scores.dtype).min)
        mixed = torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v)
        x_BLD = x_BLD + torch.einsum("blhk,hkd->bld", mixed, block.out.weight.T.reshape(H, K, D))
        y = norm(x_BLD, block.norm_mlp.weight) @ block.up.weight.T
        gelu = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x_BLD = x_BLD + gelu @ block.down.weight.T
    return norm(x_BLD, model.norm.weight) @ model.tokens.T


def test_decoder_is_nanodo():
    model, tokens = case("decoder")
    with torch.no_grad():
        for parameter in model.parameters():  # scales too, which start at one
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=seeded(2)))
    torch.testing.assert_close(model(tokens), nanodo(model, tokens), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5], rtol=1e-12, atol=1e-12)  # shorter than length


def test_init_distributions():
    D, wide = 128, 512
    model = decoder(torch.float32, vocab=2000, width=D, depth=1, length=500)
    block = model.blocks[0]
    for weight in (model.tokens, model.positions):
        assert weight.std().item() == pytest.approx(D**-0.5, rel=0.02)
        assert weight.abs().max() > 3 * D**-0.5  # normal, neither truncated at two deviations nor uniform
    q, k, v = block.qkv.weight.chunk(3)
    for weight, fans in ((q, D + D), (k, D + D), (v, D + D), (block.out.weight, D + D), (block.up.weight, D + wide)):
        assert 0.99 * math.sqrt(6 / fans) < weight.abs().max() <= math.sqrt(6 / fans)
    assert block.down.weight.shape == (D, wide)
    assert not torch.equal(q, k)
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    assert len(norms) == 3
    assert all(norm.bias is None and torch.equal(norm.weight, torch.ones(D)) for norm in norms)


def test_loss_at_init():
    """About ln V + 1/2: 10.88 nats at 32,101 pieces.

    The final LayerNorm gives |h|^2 = D and the rows of the head are normal of variance 1/D, so the logits are standard normal:
    log-sum-exp is ln V + 1/2, and the logit of a target that h knows nothing of is 0 on average. Tying raises one logit, that of
    the token just read, which is one part in V of the sum.
    """
    model = decoder(torch.float32, vocab=PIECES, width=64, length=64)
    tokens = torch.randint(PIECES, (8, 65), generator=seeded(1))
    with torch.no_grad():
        total, count = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    assert total / count == pytest.approx(math.log(PIECES) + 0.5, abs=0.1)


def test_vit_loss_at_init():
    """ln C + D / (D + C): xavier gives the rows of the head variance 2 / (D + C), hence the logits a variance of 2D / (D + C)."""
    model = vit(torch.float32, classes=100, width=64)
    images = torch.randn(512, 3, 8, 8, generator=seeded(1))
    with torch.no_grad():
        total, count = cross_entropy(model(images), torch.arange(512) % 100)
    assert total / count == pytest.approx(math.log(100) + 64 / 164, abs=0.1)


# --- causality ------------------------------------------------------------------------------------------------------------


def input_of_blocks(model):
    """The embedded input x_BLD of the next forward, made a leaf, in the list returned."""
    seen = []

    def catch(module, arguments):
        seen.append(arguments[0].detach().requires_grad_())
        return (seen[0],)

    model.blocks[0].register_forward_pre_hook(catch)
    return seen


@pytest.mark.parametrize(("autocast", "L"), [(False, 8), (True, 8), (True, 520)])  # 520: the fused kernel in bfloat16
def test_no_position_sees_a_later_one(autocast, L):
    model = decoder(torch.float32, length=L)
    seen = input_of_blocks(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_BLV = model(torch.randint(13, (2, L), generator=seeded(1)))
    for t in (0, L // 2, L - 1):
        (grad_BLD,) = torch.autograd.grad(logits_BLV[:, t].square().sum(), seen[0], retain_graph=True)
        assert torch.equal(grad_BLD[:, t + 1 :], torch.zeros_like(grad_BLD[:, t + 1 :]))
        assert (grad_BLD[:, : t + 1].abs().amax(-1) > 0).all()


def test_vit_patches_see_each_other():
    model, images = case("vit")
    seen, outputs = input_of_blocks(model), []
    model.blocks[-1].register_forward_hook(lambda module, arguments, output: outputs.append(output))
    model(images)
    (grad_BND,) = torch.autograd.grad(outputs[0][:, 0].square().sum(), seen[0])
    assert (grad_BND.abs().amax(-1) > 0).all()


def test_vit_patches_are_squares_of_the_image():
    model, images = case("vit")
    seen = input_of_blocks(model)
    model(images)
    square = images[:, :, :4, 4:]  # the second patch of the first row
    expected = square.flatten(1) @ model.patches.weight.T + model.positions[1]
    torch.testing.assert_close(seen[0][:, 1], expected)


# --- readout --------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_readout_times_head_is_forward(kind, head_dtype, autocast):
    model, inputs = case(kind, torch.float32, head_dtype=head_dtype)
    head = model.tokens if kind == "decoder" else model.head.weight
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(inputs)
        h, weight = model(inputs, readout=lambda h, W: (h, W))
        rebuilt = model(inputs, readout=lambda h, W: h @ W.T)
    assert model.has_readout
    assert weight is head
    assert h.dtype == logits.dtype == torch.float32
    assert h.shape == (*logits.shape[:-1], 16)
    torch.testing.assert_close(rebuilt.float(), logits)
    narrow = autocast and head_dtype == "bfloat16"
    assert rebuilt.dtype == (torch.bfloat16 if narrow else torch.float32)
    if not narrow:
        torch.testing.assert_close(h @ weight.T, logits)


# --- precision ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_autocast(kind, head_dtype):
    model, inputs = case(kind, torch.float32, head_dtype=head_dtype)
    stream, compute = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: stream.extend([arguments[0].dtype, output.dtype]))
        block.down.register_forward_hook(lambda module, arguments, output: compute.extend([arguments[0].dtype, output.dtype]))
    exact = model(inputs)
    stream.clear(), compute.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    assert set(stream) == {torch.float32}
    assert set(compute) == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).norm() / exact.norm() < 0.02
    logits.square().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@both
@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_float64_stays_float64(kind, head_dtype):
    model, inputs = case(kind, head_dtype=head_dtype)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    model(inputs)
    assert set(seen) == {torch.float64}


def test_parameters_in_bfloat16():
    """What the mixed precision of FSDP2 makes (with cast_forward_inputs=False): narrow parameters, wide stream and logits."""
    model, tokens = case("decoder", torch.float32)
    exact, stream = model(tokens), []
    model.bfloat16().blocks[-1].register_forward_hook(lambda module, arguments, output: stream.append(output.dtype))
    logits = model(tokens)
    assert (logits.dtype, *stream) == (torch.float32, torch.float32)
    assert (logits - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_bfloat16_is_the_fused_one(causal):
    """Short sequences in bfloat16 take a path of their own on a CPU, values and gradients."""
    qkv = [torch.randn(2, 3, 40, 8, generator=seeded(i)).bfloat16().requires_grad_() for i in range(3)]
    wide = [tensor.detach().double().requires_grad_() for tensor in qkv]
    cotangent = torch.randn(2, 3, 40, 8, generator=seeded(3))
    ours, exact = attend(*qkv, causal), F.scaled_dot_product_attention(*wide, is_causal=causal)
    pairs = [(ours, exact), *zip(torch.autograd.grad(ours, qkv, cotangent.bfloat16()),
                                 torch.autograd.grad(exact, wide, cotangent.double()), strict=True)]  # fmt: skip
    for narrow, reference in pairs:
        assert narrow.dtype == torch.bfloat16
        assert (narrow.double() - reference).norm() / reference.norm() < 0.01


# --- checkpointing, initialization, devices -------------------------------------------------------------------------------


@both
def test_checkpointing_changes_nothing(kind):
    results = []
    for checkpoint_blocks in (False, True):
        model, inputs = case(kind, checkpoint_blocks=checkpoint_blocks)
        logits = model(inputs)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for off, on in zip(*results, strict=True):
        assert torch.equal(off, on)


@both
def test_init_is_the_generators(kind):
    state = torch.get_rng_state()
    first, again, other = (case(kind, generator=seeded(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    on_meta = case(kind, device="meta")[0]
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    on_meta.to_empty(device="cpu").init_weights(seeded(5))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert torch.equal(parameter, on_meta.get_parameter(name))
        if "norm" not in name:
            assert not torch.equal(parameter, other.get_parameter(name))
    torch.manual_seed(7)
    one = case(kind, generator=None)[0]
    torch.manual_seed(7)
    for a, b in zip(one.parameters(), case(kind, generator=None)[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_runs_without_memory():
    """On meta, as a default device too, and under FakeTensorMode: how a run of a published size is planned on a laptop."""
    size = asdict(PUBLISHED["1208M"])
    with torch.device("meta"):
        assert Decoder(PIECES, length=512, **size)(torch.zeros(2, 512, dtype=torch.long)).shape == (2, 512, PIECES)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        logits = Decoder(PIECES, length=512, **size)(torch.zeros(2, 512, dtype=torch.long))
        assert (logits.shape, logits.dtype) == ((2, 512, PIECES), torch.float32)


def test_counts_of_the_vit():
    model = vit()
    blocks = 2 * (12 * 16**2 + 2 * 16) + 16
    assert model.num_parameters(non_embedding=True) == blocks
    assert model.num_parameters() == blocks + 16 * (3 * 4**2 + 4 + 5)  # patch values, positions, classes


def test_width_of_the_mlp():
    assert decoder(mlp=None).blocks[0].up.weight.shape == decoder(mlp=0).blocks[0].up.weight.shape == (64, 16)
    assert decoder(mlp=40).blocks[0].up.weight.shape == (40, 16)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: decoder(heads=3), ["heads=3", "width=16"]),
        (lambda: vit(heads=5), ["heads=5", "width=16"]),
        (lambda: vit(patch=3), ["patch=3", "image=8"]),
        (lambda: decoder(head_dtype="float16"), ["float16", "bfloat16"]),
        (lambda: decoder()(torch.zeros(1, 9, dtype=torch.long)), ["9 tokens", "length=8"]),
        (lambda: vit()(torch.zeros(1, 3, 4, 8)), ["(3, 4, 8)", "(3, 8, 8)"]),
    ],
)
def test_user_errors_name_the_values(build, words):
    with pytest.raises(UserError) as error:
        build()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("kind", ["decoder", "vit"])
def test_dropout(kind):
    """At 0.0 nothing is drawn; in eval mode there is none; recomputed blocks draw the same masks again."""

    def build(**options):
        generator = torch.Generator().manual_seed(0)
        if kind == "decoder":
            return Decoder(17, 16, 2, 2, 8, generator=generator, **options)
        return ViT(8, 4, 5, 16, 2, 2, channels=1, generator=generator, **options)

    inputs = torch.arange(16).view(2, 8) if kind == "decoder" else torch.randn(2, 1, 8, 8)
    state = torch.get_rng_state()
    plain = build()(inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(build(dropout=0.3).eval()(inputs), plain)
    gradients = {}
    for recomputed in (False, True):
        model = build(dropout=0.3, checkpoint_blocks=recomputed)
        torch.manual_seed(1)
        model(inputs).square().sum().backward()
        gradients[recomputed] = [p.grad for p in model.parameters()]
        assert not torch.equal(model(inputs), model(inputs))
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True], strict=True))


def test_dropout_zeroes_its_fraction_of_a_branch_and_keeps_the_mean():
    unit = Block(64, 1, 64, True, dropout=0.25)
    x = torch.ones(50, 40, 64)
    dropped = unit.dropped(x)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
