"""Two gloo processes equal one process on the same global batch, under DDP and FSDP2, for every method; one spawn per wrapper."""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, warmed_up
from processes import gloo
from test_sharpness_dose import Normalized
from test_sharpness_oracle import combine, norm, oracle, state_of, theta_of
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from functional_sam import METHODS, SharpnessAware
from functional_sam.errors import UserError

pytestmark = pytest.mark.slow
WORLD = 2
PENALTY = {"derivative": "difference", "step": 1e-3}
COMBINATIONS = [
    *[(name, PENALTY if METHODS[name].path == "penalty" else {}) for name in METHODS],
    ("angle-sam", {**PENALTY, "phi": 30.0}),
    ("sam", {"ascent": "adaptive", "path": "functional"}),
    ("sam", {"ascent": "adam", "path": "logit", "normalize_by": "energy"}),
    ("momentum-functional-sam", {"preconditioned": True}),
    ("momentum-sam", {"path": "logit"}),
    ("looksam", {"every": 2, "path": "functional"}),
    ("wsam", {"decoupled": False, "ascent": "momentum"}),
    ("functional-sam", {"every": 2, "rho_schedule": "warmup", "warmup_steps": 2}),
]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def clean(name):
    return name.removeprefix("module.")


def global_batch(seed):
    """8 rows with uneven numbers of valid targets; rank r has rows r::2, in micro-batches of 1 and 3 rows."""
    inputs, targets = make_batch(8, seed=seed)
    targets[0, 1:] = targets[3, :2] = targets[6] = -100
    return inputs, targets


def share(batch, rank):
    inputs, targets = (x[rank::WORLD] for x in batch)
    return [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


def fsdp(model, **options):
    fully_shard(model.up, **options)
    fully_shard(model, **options)
    return model


@functools.cache
def warm_start(kind):
    """Weights and the moments that go with them."""
    model = make_model(kind)
    return model, warmed_up(model)


def equals_one_process(wrap, rank, kind, method, options, tolerance=1e-10):
    """Three steps of both, the same gradients, losses and weights; local weights bit-identical across backward."""
    runs = []
    for parallel in (False, True):
        model, (warm_model, warm) = make_model(kind), warm_start(kind)
        model.load_state_dict(warm_model.state_dict())
        model = wrap(model) if parallel else model
        optimizer = adamw(model)
        if not parallel:
            optimizer.load_state_dict(copy.deepcopy(warm.state_dict()))
        else:
            moments = dict(zip((clean(n) for n, _ in warm_model.named_parameters()), warm_model.parameters(), strict=True))
            for name, p in model.named_parameters():
                state = warm.state[moments[clean(name)]]
                optimizer.state[p] = {"step": state["step"].clone()}
                for key in ("exp_avg", "exp_avg_sq"):
                    like = torch.zeros_like(p).detach()
                    optimizer.state[p][key] = like.copy_(distributed(state[key], like))
        sharpness = SharpnessAware(model, optimizer, method, rho=0.3, **options)
        record = []
        for step in range(3):
            batch = global_batch(step)
            before = [local(p).clone() for p in model.parameters()]
            loss = sharpness.backward(share(batch, rank) if parallel else [batch], measure_dose=step == 1)
            for p, value in zip(model.parameters(), before, strict=True):
                assert torch.equal(local(p), value), (method, options)
            grads = {clean(n): local(p.grad).clone() for n, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            weights = {clean(n): local(p).clone() for n, p in model.named_parameters()}
            record.append((loss, sharpness.dose, grads, weights))
        runs.append(record)
    shards = {clean(n): p for n, p in model.named_parameters()}  # every rank compares its own
    for (loss, dose, grads, weights), (loss_, dose_, grads_, weights_) in zip(*runs, strict=True):
        text = f"{method} {options} {kind.__name__}"
        assert dose_ == (dose if dose is None else pytest.approx(dose, rel=100 * tolerance, abs=100 * tolerance)), text
        torch.testing.assert_close(loss_, loss, rtol=tolerance, atol=tolerance, msg=lambda t, text=text: f"{text}: {t}")
        for name in grads:
            for a, b, loose in [(grads_, grads, 1.0), (weights_, weights, 100.0)]:
                torch.testing.assert_close(
                    a[name],
                    local(distributed(b[name], shards[name])),
                    rtol=loose * tolerance,
                    atol=loose * tolerance,
                    msg=lambda t, text=text, name=name: f"{text} {name}: {t}",
                )


def local(p):
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


def distributed(tensor, like):
    """A tensor that all ranks have, sharded as `like` is; nothing is sent."""
    if not hasattr(like, "device_mesh"):
        return tensor
    return torch.distributed.tensor.distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def asking_for_the_dose_changes_nothing(wrap, rank, kind, methods=("sam", "functional-sam", "wsam", "looksam", "tram")):
    """Local weights, buffers and random state are those of the run that never asked, bit for bit, from the first step on."""
    for method in methods:
        runs = []
        for asks in (False, True):
            model = wrap(make_model(kind, dtype=torch.float32, dropout=0.3))
            optimizer = adamw(model)
            sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
            torch.manual_seed(rank)
            for step in range(3):
                sharpness.backward(share(global_batch(step), rank), measure_dose=asks)
                assert (sharpness.dose is not None) == asks
                optimizer.step()
                optimizer.zero_grad()
            runs.append([*map(local, model.parameters()), *(b.clone() for b in model.buffers()), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), (method, kind)


# ---------------------------------------------------------------------- DDP


def ddp_worker(rank):
    for kind in (TinyModel, TinyReadout):
        for view in (False, True):
            # Who keeps g through pass 2 with either; the others once are enough.
            everything = view == (kind is TinyReadout)
            for method, options in COMBINATIONS:
                if not everything and METHODS[method].mix is None and METHODS[method].path != "penalty":
                    continue
                # A difference divides rounding by its step.
                tolerance = 1e-8 if METHODS[method].path == "penalty" else 1e-10
                equals_one_process(
                    lambda m, view=view: ddp(m, gradient_as_bucket_view=view), rank, kind, method, options, tolerance
                )
            m_is_rank_or_microbatch(rank, kind, view)
        reductions(rank, kind)
        ranks_that_differ(rank, kind)
        asking_for_the_dose_changes_nothing(ddp, rank, kind)
    asking_for_the_dose_changes_nothing(ddp, rank, Normalized)
    wrapped_otherwise(rank)
    fsdp1 = FullyShardedDataParallel(make_model(dtype=torch.float32), device_id=torch.device("cpu"))
    for given in (fsdp1, fsdp1.module, torch.nn.Sequential(fsdp1)):
        with pytest.raises(UserError, match="fully_shard"):
            SharpnessAware(given, adamw(given), "sam")
    for options, method, words in [({"static_graph": True}, "sam", "static_graph"), ({}, "penalty-sam", "difference")]:
        model = ddp(make_model(), **options)
        with pytest.raises(UserError, match=words):
            SharpnessAware(model, adamw(model), method)


def m_is_rank_or_microbatch(rank, kind, view):
    """Each rank (micro-batch) goes where its own gradient points; the mean over all valid targets is what comes out."""
    plain = make_model(kind)
    plain_optimizer = warmed_up(plain)
    batch = global_batch(4)
    total = int((batch[1] != -100).sum())
    m, P = state_of(plain, plain_optimizer)
    model = ddp(make_model(kind), gradient_as_bucket_view=view)
    optimizer = adamw(model)
    model.module.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(plain_optimizer.state_dict())
    for mode in ("rank", "micro-batch"):
        for ascent, path in [("gradient", "sam"), ("adam", "functional"), ("adaptive", "logit"), ("momentum", "functional")]:
            expected = {n: torch.zeros_like(p) for n, p in theta_of(plain).items()}
            for r in range(WORLD):
                parts = share(batch, r) if mode == "micro-batch" else [tuple(x[r::WORLD] for x in batch)]
                for part in parts:
                    count = int((part[1] != -100).sum())
                    _, its = oracle(plain, theta_of(plain), part, ascent, path, 0.2, m, P)
                    expected = combine(1.0, expected, count / total, its)
            SharpnessAware(model, optimizer, "sam", rho=0.2, ascent=ascent, path=path, scope=mode).backward(share(batch, rank))
            result = {clean(n): g for n, g in gradients(model).items()}
            for name in expected:
                torch.testing.assert_close(result[name], expected[name], rtol=1e-10, atol=1e-10)


class Inside(torch.nn.Module):
    """A module of the caller's around a DDP."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens):
        return self.inner(tokens)


def wrapped_otherwise(rank):
    """DDP outside and inside of torch.compile, in a module of the caller's, and looking for unused parameters."""
    methods = ["functional-sam", "logit-sam", "gnp", "momentum-functional-sam"]
    every = list(itertools.product(methods, (TinyModel, TinyReadout)))
    for wrap, cases in (
        (lambda m: ddp(m, find_unused_parameters=True), every),
        (lambda m: Inside(ddp(m)), every),
        # To compile takes longer than all else.
        (lambda m: ddp(torch.compile(m, backend="aot_eager")), [("functional-sam", TinyReadout), ("gnp", TinyModel)]),
        (lambda m: torch.compile(ddp(m), backend="aot_eager"), [("logit-sam", TinyReadout), ("functional-sam", TinyModel)]),
    ):
        for method, kind in cases:
            results = []
            for parallel in (False, True):
                model = make_model(kind)
                given = wrap(model) if parallel else model
                optimizer = adamw(model)
                sharpness = SharpnessAware(given, optimizer, method, rho=0.3)
                for step in range(3):
                    sharpness.backward(share(global_batch(step), rank) if parallel else [global_batch(step)])
                    optimizer.step()
                    optimizer.zero_grad()
                results.append(theta_of(model))
            for name in results[0]:
                torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-9, atol=1e-9)


def reductions(rank, kind):
    """Gradient all-reduces: two with scope="step", one, in pass 2, where the ascent is the rank's own or needs no gradient."""
    model = ddp(make_model(kind))
    optimizer = warmed_up_parallel(model, rank)
    counts = {"calls": 0}

    def hook(state, bucket):
        counts["calls"] += 1
        future = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    for method, options, expected in [
        ("adamw", {}, 1),
        ("sam", {}, 2),
        ("functional-sam", {"scope": "rank"}, 1),
        ("sam", {"scope": "rank"}, 1),
        ("logit-sam", {"scope": "rank"}, 1),
        ("sam", {"scope": "micro-batch"}, 1),
        ("momentum-functional-sam", {}, 1),
    ]:
        sharpness = SharpnessAware(model, optimizer, method, **options)
        counts["calls"] = 0
        sharpness.backward(share(global_batch(1), rank))
        assert counts["calls"] == expected, (method, options, counts)


def warmed_up_parallel(model, rank):
    optimizer = adamw(model)
    SharpnessAware(model, optimizer, "adamw").backward(share(global_batch(0), rank))
    optimizer.step()
    return optimizer


def ranks_that_differ(rank, kind):
    """A rank without a valid target (its g and eps are 0), and one whose gradient is not finite: the other is not left waiting."""
    plain = make_model(kind)
    batch = global_batch(4)
    batch[1][1::WORLD] = -100
    for method in ("sam", "functional-sam", "logit-sam"):
        for mode in ("rank", "micro-batch", "step"):
            model = ddp(make_model(kind))
            SharpnessAware(model, adamw(model), method, rho=0.2, scope=mode).backward([tuple(x[rank::WORLD] for x in batch)])
            part = tuple(x[0::WORLD] for x in batch)
            _, expected = oracle(plain, theta_of(plain), part, "gradient", METHODS[method].path, 0.2)
            result = {clean(n): g for n, g in gradients(model).items()}
            for name in expected:
                torch.testing.assert_close(result[name], expected[name], rtol=1e-10, atol=1e-10)

            def forward(model, inputs, readout=None):
                spoil = float("nan") if rank == 0 else 1.0
                return model(inputs) * spoil if readout is None else model(inputs, lambda h, weight: readout(h * spoil, weight))

            bad = SharpnessAware(model, adamw(model), method, rho=0.2, scope=mode, forward=forward, keep="auto")
            with pytest.raises(FloatingPointError, match="step 1"):
                bad.backward([tuple(x[rank::WORLD] for x in global_batch(4))])
            for p, value in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(p, value)


# ---------------------------------------------------------------------- FSDP2


def fsdp_worker(rank):
    for kind in (TinyModel, TinyReadout):
        for method, options in COMBINATIONS:
            tolerance = 1e-8 if METHODS[method].path == "penalty" else 1e-10
            equals_one_process(fsdp, rank, kind, method, options, tolerance)
        asking_for_the_dose_changes_nothing(fsdp, rank, kind)
        mixed_precision(rank, kind)
        resume(rank, kind)
        an_exception_in_pass_two(rank, kind)
    model = fsdp(make_model())
    for options, words in [({"scope": "rank"}, "whole parameters"), ({"path": "penalty"}, "difference")]:
        with pytest.raises(UserError, match=words):
            SharpnessAware(model, adamw(model), "sam", **options)


def mixed_precision(rank, kind):
    """bf16 compute on float32 shards: near the float32 gradient (3 % of its norm), weights bit-identical across backward."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for method, rho in [(n, 0.3) for n in METHODS if METHODS[n].path != "penalty"] + [("penalty-sam", 0.02)]:
        size = {"vocab": 31, "width": 16, "dtype": torch.float32}
        options = {"derivative": "difference", "step": 0.3} if METHODS[method].path == "penalty" else {}
        plain, sharded = make_model(kind, **size), fsdp(make_model(kind, **size), mp_policy=policy)
        results = []
        for model in (plain, sharded):
            optimizer = adamw(model)
            sharpness = SharpnessAware(model, optimizer, method, rho=rho, **options)
            for step in range(2):
                before = [local(p).clone() for p in model.parameters()]
                loss = sharpness.backward(share(global_batch(step), rank) if model is sharded else [global_batch(step)])
                assert all(torch.equal(local(p), b) for p, b in zip(model.parameters(), before, strict=True))
                if step == 0:
                    results.append((float(loss), {n: whole(p.grad).clone() for n, p in model.named_parameters()}))
                optimizer.step()
        assert abs(results[1][0] - results[0][0]) < 0.02
        assert all(g.dtype == torch.float32 for g in results[1][1].values())
        error = norm(combine(1.0, results[1][1], -1.0, results[0][1])) / norm(results[0][1])
        assert error < 0.03, (method, kind, error)


def resume(rank, kind):
    """Sharded state of the method, loaded into a new model."""
    for method in ("wsam", "looksam", "tram"):
        results = []
        for interrupted in (False, True):
            model = fsdp(make_model(kind))
            optimizer = adamw(model)
            sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
            for step in range(4):
                if interrupted and step == 2:
                    state = sharpness.state_dict()
                    sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
                    sharpness.load_state_dict(state)
                sharpness.backward(share(global_batch(step), rank))
                optimizer.step()
            results.append([local(p).clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), method


def an_exception_in_pass_two(rank, kind):
    """Shards restored. (What FSDP2 itself thinks of an interrupted forward is another matter.)"""
    for method in ("sam", "functional-sam", "logit-sam"):
        model = fsdp(make_model(kind))
        calls = []

        def forward(model, inputs, calls=calls, **readout):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("the caller's")
            return model(inputs, **readout)

        before = [local(p).clone() for p in model.parameters()]
        sharpness = SharpnessAware(model, adamw(model), method, rho=0.3, forward=forward)
        parts = [tuple(x[rank::WORLD] for x in global_batch(1))]
        with pytest.raises(RuntimeError, match="the caller's"):
            sharpness.backward(parts)
        assert all(torch.equal(local(p), b) for p, b in zip(model.parameters(), before, strict=True))
        with contextlib.suppress(FloatingPointError):
            sharpness.backward(parts)
        plain = make_model(kind)
        _, expected = oracle(plain, theta_of(plain), global_batch(1), "gradient", METHODS[method].path, 0.3)
        for name, p in model.named_parameters():
            torch.testing.assert_close(whole(p.grad), expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("worker", [ddp_worker, fsdp_worker])
def test_two_processes_equal_one(server, worker):
    gloo(WORLD, worker)
