"""The plan of a run against what runs need: parameters, FLOPs and bytes counted on real steps, and on simulated processes."""

import dataclasses
import functools

import pytest
import torch
from memory_simulation import Storages, batch_of, model_of, real, simulated
from torch.utils.flop_counter import FlopCounterMode

from functional_sam.cli import main
from functional_sam.commands.scale import show_on, warn_on
from functional_sam.config import compose
from functional_sam.errors import UserError
from functional_sam.jobs.profile import load_profile
from functional_sam.models import PUBLISHED, ConvNet
from functional_sam.planning import GPUS, Hardware, Layout, gpu, memory, need, pause, rows, run_cost, table
from functional_sam.planning.cost import shape
from functional_sam.sharpness import METHODS, SharpnessAware, cost

BF16 = ("training.precision=bf16",)
SMALL = (*BF16, "data.vocab=4000", "model.length=64", "model.width=64", "model.depth=3", "model.heads=2", "training.batch=8")
LARGE = (*BF16, "data.vocab=32101", "model.length=512", "model.width=2048", "model.depth=24", "model.heads=32")
VIT = (*BF16, "kind=vision", "model.kind=vit", "model.width=64", "model.depth=3", "model.heads=2", "training.batch=16")


def small(method="adamw", *overrides, base=SMALL):
    return compose("language", method, overrides=[*base, *overrides])


# ---------------------------------------------------------------------- parameters and FLOPs


@pytest.mark.parametrize("base", [SMALL, VIT], ids=["decoder", "vit"])
def test_parameters_are_the_models(base):
    config = small(base=base)
    model, spent = model_of(config), run_cost(config)
    assert (spent.parameters, spent.non_embedding) == (model.num_parameters(), model.num_parameters(non_embedding=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """The names, and Nanodo's settings; no run reads its files of C4, about 150 million tokens each, twice."""
    fixed = compose(f"language-{name}", "adamw", "paper")
    assert run_cost(fixed).non_embedding == pytest.approx(float(name[:-1]) * 1e6, rel=1e-3)
    assert (fixed.training.batch, fixed.model.length, fixed.optimizer.lr, fixed.optimizer.warmup_steps) == (256, 512, 1.6e-3, 1000)
    assert run_cost(fixed).tokens == fixed.training.steps * 256 * 512 < 150e6 * fixed.data.files


def autocast(model, inputs, readout=None):
    with torch.autocast("cpu", torch.bfloat16):  # attention is then plain products, which the counter knows
        return model(inputs, readout=readout)


def counted(config):
    """FLOPs of a step by torch's own counter, which does not know the product in place."""
    known = {torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **options: 2 * a[0] * a[1] * b[1]}
    model = model_of(config)
    optimizer = torch.optim.AdamW(model.parameters())
    sharpness = SharpnessAware(model, optimizer, config.method.name, config.method.rho, forward=autocast, **config.method.options)
    batches = [batch_of(config, config.training.batch)]
    for _ in range(2):  # the second step has moments
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            sharpness.backward(batches)
            optimizer.step()
    return counter.get_total_flops()


FEW = [
    "adamw",
    "sam",
    "functional-sam",
    "precond-functional-sam",
    "logit-sam",
    "momentum-sam",
    "momentum-functional-sam",
    "asam",
    "gsam",
]


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("base", [SMALL, VIT], ids=["decoder", "vit"])
def test_flops_are_those_counted(method, base):
    config = small(method, "training.steps=7", base=base)
    assert run_cost(config).step == pytest.approx(counted(config), rel=1e-9)
    assert run_cost(config).flops == 7 * run_cost(config).step


def test_flops_of_an_ascent_in_several_steps_and_of_none():
    for config in (small("functional-sam", "method.options.ascent_steps=3"), small("random-sam"), small("vasso")):
        assert run_cost(config).step == pytest.approx(counted(config), rel=1e-9)


def test_flops_of_recomputation():
    config = small("sam", "model.checkpoint_blocks=true")
    assert run_cost(config).step == pytest.approx(counted(config), rel=1e-9)
    assert run_cost(config, checkpointing=False).step < run_cost(config).step


def test_gradient_evaluations_are_those_of_the_table_of_methods():
    for name in [name for name in METHODS if name != "plain"]:
        assert run_cost(small(name)).gradients == cost(name).gradients
    assert run_cost(small("looksam")).gradients == pytest.approx(1 + 1 / 10)
    assert run_cost(small("sam", "method.options.every=5")).gradients == pytest.approx(1.2)


@pytest.mark.parametrize("more", [(), ("optimizer.name=sgd",), ("optimizer.name=adafactor",), ("training.precision=float64",)])
def test_a_checkpoint_is_as_large_as_planned(more, tmp_path):
    from functional_sam.training import checkpoint

    config = small("adamw", "measure.ascents=[gradient]", *more)
    model = model_of(config)
    if config.training.precision == "float64":
        model = model.double()
    kind = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adafactor": torch.optim.Adafactor}
    optimizer = kind[config.optimizer.name](model.parameters())
    SharpnessAware(model, optimizer, "adamw").backward([batch_of(config, 2)])
    optimizer.step()
    checkpoint.save(tmp_path, 1, {"step": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    # Adafactor keeps vectors, which are 3 % here.
    assert next(tmp_path.glob("*.pt")).stat().st_size == pytest.approx(run_cost(config).checkpoint, rel=0.04)


# ---------------------------------------------------------------------- memory


CASES = [
    ("adamw", ()),
    ("sam", ("training.micro_batch=2",)),
    ("functional-sam", ()),
    ("functional-sam", ("training.micro_batch=2",)),
    ("functional-sam", ("model.head_dtype=bfloat16",)),
    ("precond-functional-sam", ("model.checkpoint_blocks=true",)),
    ("logit-sam", ()),
    ("gsam", ()),
    ("friendly-sam", ()),
    ("random-sam", ("training.precision=float32",)),
    ("functional-sam", ("method.options.ascent_steps=2", "training.micro_batch=4")),
    ("sam", ("method.options.ascent_part=0.5", "training.micro_batch=4")),
    ("momentum-functional-sam", ("training.precision=float32",)),
    ("sam", ("training.precision=float64",)),
    ("functional-sam", ("model.dropout=0.1", "training.precision=float32")),
    ("adamw", ("model.dropout=0.1",)),
    ("functional-sam", ("training.batch=4", "data.vocab=500")),  # u is kept, and not h
    ("functional-sam", ("method.options.keep=u",)),
    ("functional-sam", ("training.batch=80", "model.checkpoint_blocks=true")),  # more than one chunk of logits
    ("adamw", ("model.length=576", "training.batch=2")),  # fused attention
]


@pytest.mark.parametrize(("method", "overrides"), CASES, ids=[f"{m} {' '.join(o)}" for m, o in CASES])
def test_peak_of_real_steps(method, overrides):
    """Every byte of storage on this CPU, within 2 %."""
    config = small(method, *overrides)
    planned = memory(config, Layout(checkpointing=config.model.checkpoint_blocks, cpu=True))
    assert planned.total == pytest.approx(real(config), rel=0.02)


SIMULATED = [("adamw", 8, 4, False), ("sam", 64, 16, True), ("functional-sam", 512, 1, False), ("functional-sam", 1, 4, True)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "gpus", "each", "recomputed"), SIMULATED)
def test_peak_of_the_largest_size(method, gpus, each, recomputed):
    """1,275 million parameters under FSDP2 on 1 to 512 processes, all simulated: within 4 %."""
    config = small(method, f"training.batch={gpus * each}", f"model.checkpoint_blocks={recomputed}".lower(), base=LARGE)
    planned = memory(config, Layout(gpus, gpus > 1, recomputed, cpu=True))
    assert planned.total == pytest.approx(simulated(config, gpus, gpus > 1), rel=0.04)


def test_simulation_and_reality_agree():
    """The same storages, whether they exist or not."""
    config = small("functional-sam", "training.micro_batch=2")
    assert simulated(config, 1, False) == pytest.approx(real(config), rel=1e-3)


def test_peak_of_simulated_shards_of_a_small_model():
    config = small("functional-sam", "training.batch=32", "training.micro_batch=8")
    planned = memory(config, Layout(4, True, cpu=True))
    assert planned.total == pytest.approx(simulated(config, 4, True), rel=0.05)


def test_more_processes_need_no_more_memory():
    config = compose("language-1208M", "functional-sam", "paper")
    totals = [memory(config, Layout(2**i, True, True)).total for i in range(1, 9)]
    assert totals == sorted(totals, reverse=True)
    replicas = [memory(config, Layout(2**i, False, True)).total for i in range(1, 9)]
    assert all(a < b for a, b in zip(totals, replicas, strict=True))


# ---------------------------------------------------------------------- what fits


def test_the_smallest_that_fits():
    """At one byte less than it needs, the next larger layout."""
    config = compose("language-117.9M", "functional-sam", "paper")
    most = memory(config, Layout(1)).total
    roomy, tight = (Hardware("x", most + extra, 1e12, 0.5, 1.0) for extra in (0, -1))
    assert need(config, roomy).layout == Layout(1)
    assert need(config, tight).layout == Layout(1, checkpointing=True)
    none = need(config, Hardware("x", 1e6, 1e12))
    assert none.layout is None
    found = need(config, roomy)
    assert found.hours == pytest.approx(run_cost(config).flops / 0.5e12 / 3600)


def test_float32_products_take_their_own_time():
    """The head of a bf16 run is outside of autocast, at a sixteenth of the peak: most of the time of the smallest size."""
    a100 = GPUS["a100-80"]
    wide = compose("language-23.9M", "adamw", "paper")
    spent = run_cost(wide)
    head = 3 * 2 * 576 * 32101 * 512 * 256 * 50000
    assert spent.wide == head
    expected = (spent.flops - head) / (312e12 * 0.4) + head / (19.5e12 * 0.8)
    assert need(wide, a100).hours == pytest.approx(expected / 3600)
    narrow = compose("language-23.9M", "adamw", "paper", overrides=["model.head_dtype=bfloat16"])
    assert run_cost(narrow).wide == 0
    assert need(wide, a100).hours > 3.5 * need(narrow, a100).hours
    assert run_cost(small("sam", "training.precision=float32")).wide == run_cost(small("sam", "training.precision=float32")).flops
    assert run_cost(compose("translation-iwslt14", "sam", "paper")).wide == 0


def test_which_products_are_wide_is_what_a_step_does():
    """The dtypes of the products of a real step under autocast: those with the vocabulary among their sides are of float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.of_head, self.others = set(), set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
                tensors = [one for one in args if isinstance(one, torch.Tensor)]
                kind = self.of_head if any(4000 in one.shape for one in tensors) else self.others
                kind |= {one.dtype for one in tensors}
            return function(*args, **(kwargs or {}))

    for head, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        config = small("functional-sam", f"model.head_dtype={head}")
        model = model_of(config)
        sharpness = SharpnessAware(model, torch.optim.AdamW(model.parameters()), "functional-sam", forward=autocast)
        with Products() as products:
            sharpness.backward([batch_of(config, 2)])
        assert products.of_head == {dtype}
        assert products.others == {torch.bfloat16}


def test_rows_count_runs_that_need_the_same():
    configs = [compose("language-23.9M", "sam", "paper", overrides=[f"method.rho={rho}"]) for rho in (0.1, 0.2)]
    configs.append(compose("language-23.9M", "adamw", "paper"))
    assert [count for _, count in rows(configs, GPUS["a100-80"])] == [2, 1]


def test_rows_tell_optimizers_apart():
    """SGD keeps one copy of the parameters where AdamW keeps two."""
    given = "measure.ascents=[gradient]"
    configs = [compose("vision", "adamw", overrides=[given, f"optimizer.name={name}"]) for name in ("adamw", "sgd")]
    (adamw, one), (sgd, other) = rows(configs, GPUS["a100-80"])
    assert (one, other, sgd.memory.moments) == (1, 1, adamw.memory.moments / 2)
    assert "adamw, sgd" in str(list(table(configs, GPUS["a100-80"]).columns[0].cells))


def test_table_and_command(capsys):
    assert main(["estimate", "language-1208M", "--gpu", "h100-80", "--method", "sam"]) == 0
    out = capsys.readouterr().out
    assert "1,274.9 M" in out
    assert "989 TFLOP/s" in out
    caption = table([small("angle-sam")], GPUS["a100-80"]).caption
    assert "angle-sam" in caption


def test_an_estimate_sums_by_size_and_takes_overrides(capsys):
    """The sizes of table-2 add up to it, and one of its cells alone is one of the sums; longer runs take as much more."""

    def hours(*words):
        assert main(["estimate", *words]) == 0
        lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
        found = [line for line in lines if line.startswith("all")]
        return {line.split("│")[0].strip(): float(line.split("│")[-1].replace(",", "")) for line in found}

    whole = hours("table-2")
    assert len(whole) == 5
    assert sum(value for name, value in whole.items() if name != "all") == pytest.approx(whole["all"], abs=0.3)
    assert hours("table-2", "cells=fixed-23.9M") == {"all": whole["all of language-23.9M"]}
    assert hours("table-1", "table-2", "cells=fixed-23.9M") == hours("table-2", "cells=fixed-23.9M")  # the same runs
    once, twice = (hours("language-23.9M", "--method", "sam", f"training.steps={steps}")["all"] for steps in (50000, 100000))
    assert twice == pytest.approx(2 * once, abs=0.15)
    assert main(["estimate", "cells=fixed-23.9M"]) == 2
    assert "for instance estimate table-2 cells=fixed-23.9M" in capsys.readouterr().err


def test_plan_on_a_cluster(capsys, home):
    """`plan` appends the table for the profile's GPUs, and names the runs that want more than it gives."""
    assert main(["plan", "figure-1", "--cluster", "gpu-a100"]) == 0
    assert "312 TFLOP/s at 40%" in capsys.readouterr().out
    profile = home / "small.yaml"
    profile.write_text("time: 60\ngpus_per_node: 1\ngpu: rtx4090-24\n")
    show_on([compose("language-1208M", "sam", "paper")], str(profile))
    assert "wants 2 GPUs" in capsys.readouterr().out.replace("\n", " ")
    profile.write_text("time: 60\ngpus_per_node: 1\n")
    assert main(["plan", "figure-1", "--cluster", str(profile)]) == 2
    assert "gpus_per_node and gpu" in capsys.readouterr().err


def test_runs_that_do_not_fit_as_they_are_laid_out(capsys, home):
    """Two GPUs suffice where the model is sharded, and the run has replicas: the planner's `fits on` is not what it would do."""
    profile = home / "two.yaml"
    profile.write_text("time: 60\ngpus_per_node: 2\ngpu: rtx4090-24\nsignal_delay: 2000\n")
    config = compose("language-1208M", "sam", "paper")
    assert need(config, gpu("rtx4090-24")).layout == Layout(2, sharded=True, checkpointing=True)

    def warned(config):
        warn_on([config], load_profile(str(profile)), "two")
        return capsys.readouterr().out

    assert "(ddp), of 23.2: with runtime.parallel=fsdp it fits" in warned(config)
    assert warned(compose("language-1208M", "sam", "paper", overrides=["runtime.parallel=fsdp"])) == ""
    large = compose("language-117.9M", "sam", "paper", overrides=["training.micro_batch=128"])
    assert "with model.checkpoint_blocks=true it fits" in warned(large)
    profile.write_text("time: 60\ngpus_per_node: 4\ntasks_per_node: 1\ngpu: a100-80\n")
    assert "3 of 4 idle" in warned(compose("language-23.9M", "sam", "paper"))
    profile.write_text("time: 60\ngpus_per_node: 2\n")  # of GPUs of no known kind nothing is computed
    assert warned(config) == ""


def test_the_time_that_a_run_needs_to_save(capsys, home):
    """A step, an evaluation in float32 and a checkpoint; SLURM ends what is not done with them, and does not requeue it."""
    config = small("adamw", "training.eval_rows=8", "training.steps=10")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        autocast(model_of(config), batch_of(config, 1)[0])
    assert run_cost(config).forward == pytest.approx(counter.get_total_flops())
    hardware = Hardware("x", 1e9, 1e9, 1.0, single=1e6)
    spent = run_cost(config)
    expected = hardware.hours(spent.flops, spent.wide) * 3600 / 10 + 8 * spent.forward / 0.8e6
    assert pause(config, hardware, 2) == pytest.approx(expected / 2 + spent.checkpoint / 0.5e9)
    profile = home / "one.yaml"
    profile.write_text("time: 60\ngpus_per_node: 1\ngpu: a100-80\nsignal_delay: 180\n")
    warn_on([compose("language-1208M", "sam", "paper")], load_profile(str(profile)), "one")
    assert "signal_delay=180 of one: a step, an evaluation and a save of language-1208M sam" in capsys.readouterr().out
    warn_on([compose("language-23.9M", "sam", "paper")], load_profile(str(profile)), "one")
    assert capsys.readouterr().out == ""


def test_refusals(capsys):
    with pytest.raises(UserError, match="second-order graph"):
        memory(small("penalty-sam"), Layout())
    with pytest.raises(UserError, match=r"training.batch=8 cannot be divided among 3"):
        memory(small(), Layout(3))
    with pytest.raises(UserError, match="did you mean 'a100-80'"):
        gpu("a100-8")
    with pytest.raises(UserError, match=r"utilization=1\.5"):
        dataclasses.replace(GPUS["a100-80"], utilization=1.5)
    assert main(["estimate", "table-2", "--method", "sam"]) == 2
    assert "--method sam is for tasks, and table-2 is an exhibit, which has its own methods" in capsys.readouterr().err
    assert main(["estimate", "language-9M"]) == 2
    assert "neither an exhibit" in capsys.readouterr().err


def test_images():
    config = compose("vision", "adamw", overrides=["data.images=imagenet-1k", "model.patch=16"])
    assert (shape(config).L, shape(config).V) == (196, 1000)


# ---------------------------------------------------------------------- convolutional networks


RESNET = ("kind=vision", "model.kind=convnet", "data.images=imagenet-1k", "model.patch=4", "model.width=16", "training.batch=4")


@pytest.mark.parametrize("method", ["adamw", "sam", "logit-sam"])
@pytest.mark.parametrize(
    "more",
    [("model.stages=[2,2]",), ("model.stages=[1,2]", "model.bottleneck=true", "model.norm=batch", "model.activation=relu")],
    ids=["gelu-group", "bottleneck-relu-batch"],
)
def test_flops_and_peak_of_a_convnet(more, method):
    """Of a real step by torch's own counter and by the storages; the account of memory is an upper one."""
    config = compose("vision", method, overrides=[*RESNET, *more])
    m = config.model
    model = ConvNet(224, 4, 1000, m.width, m.stages, m.bottleneck, m.activation, m.norm)
    optimizer = torch.optim.AdamW(model.parameters())
    sharpness = SharpnessAware(model, optimizer, method, config.method.rho)
    images, labels = torch.randn(4, 3, 224, 224), torch.randint(1000, (4,))

    def step():
        sharpness.backward([(images, labels)])
        optimizer.step()
        optimizer.zero_grad()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    assert run_cost(config).step == pytest.approx(counter.get_total_flops(), rel=2e-3)
    tracker = Storages()
    tracker.see([*model.parameters(), *(value for state in optimizer.state.values() for value in state.values()), images])
    with tracker:
        tracker.peak = tracker.now
        step()
    taken = tracker.peak - images.untyped_storage().nbytes()
    assert 1.05 < memory(config, Layout(cpu=True)).total / taken < 1.25


def test_imagenet_is_planned():
    """ResNet-50's 25.56 M parameters (its head has no bias here) and 4.1 G multiplications an image; ViT-S/16's 22 M."""
    resnet, small = (run_cost(compose(f"vision-{name}", "adamw", "paper")) for name in ("resnet-50", "vit-s-16"))
    assert resnet.parameters == 25_557_032 - 1000
    assert resnet.step / 6 / 4096 == pytest.approx(4.09e9, rel=0.03)
    assert small.parameters == pytest.approx(22e6, rel=0.02)
    assert need(compose("vision-resnet-50", "sam", "paper"), gpu("a100-80")).hours > 0


def test_images_that_are_decoded_more_slowly_than_trained_on():
    """ViT-S/32's GPUs would wait: a step decodes once, whatever its passes, and each GPU has workers of its own."""
    adamw, sam = (compose("vision-vit-s-32", method, "paper") for method in ("adamw", "sam"))
    waits = 93_000 * 4096 / (200 * 8) / 3600
    assert need(adamw, gpu("a100-80")).hours == need(sam, gpu("a100-80")).hours == pytest.approx(waits)
    many = compose("vision-vit-s-32", "adamw", "paper", overrides=["runtime.workers=1000"])
    spent = run_cost(many)
    assert need(many, gpu("a100-80")).hours == gpu("a100-80").hours(spent.flops, spent.wide) < waits
    assert "200 images a second" in table([adamw], gpu("a100-80")).caption
    assert "decoded" not in table([compose("language-23.9M", "sam", "paper")], gpu("a100-80")).caption
