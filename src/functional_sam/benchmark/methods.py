"""Time and memory of every method, as ratios to AdamW measured in the same run; float32, and bf16 where it is native.

Two baselines stand in every table, each as 1.00 of its own column: our AdamW, and the loop that a tutorial writes (plain AdamW).

Time: all contenders live in one process, each with its own model, and take turns step by step; medians and quartiles over many
rounds. Memory: one fresh process a contender, the peak of its resident set over what was there before the model was built.
Beside ours, in the same rounds: a public library's SAM, GSAM, WSAM and LookSAM, and a plain PyTorch GPT.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from functional_sam.benchmark.memory import in_a_process, peak_bytes
from functional_sam.files import write_text
from functional_sam.models import Decoder, ViT
from functional_sam.sharpness import MethodName, SharpnessAware


@dataclass(frozen=True)
class Case:
    """A model and a batch: random tokens or images, for speed does not depend on them."""

    kind: str
    width: int
    depth: int
    heads: int
    rows: int
    length: int = 0
    vocab: int = 10
    precision: str = "float32"  # or bf16: autocast, the head's products too
    methods: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        if self.kind == "vit":
            return ViT(28, 4, self.vocab, self.width, self.depth, self.heads, channels=1, generator=generator)
        if self.kind == "plain":
            return PlainGPT(self)
        head = "bfloat16" if self.precision == "bf16" else "float32"
        return Decoder(self.vocab, self.width, self.depth, self.heads, self.length, head_dtype=head, generator=generator)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Of its precision."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def batch(self) -> tuple[Tensor, Tensor]:
        if self.kind == "vit":
            return torch.randn(self.rows, 1, 28, 28), torch.randint(self.vocab, (self.rows,))
        tokens = torch.randint(self.vocab, (self.rows, self.length + 1))
        return tokens[:, :-1], tokens[:, 1:]


PAGE = Path(__file__).resolve().parents[1] / "sharpness" / "README.md"
TWO_PASS = ("sam", "functional-sam", "precond-sam", "precond-functional-sam")
OTHERS = (
    "logit-sam",
    "asam",
    "sam-on",
    "fisher-sam",
    "gsam",
    "wsam",
    "gnp",
    "momentum-sam",
    "momentum-functional-sam",
    "looksam k=5",
    "tram",
)
PUBLIC = ("public SAM", "public GSAM", "public WSAM", "public LookSAM k=5")
BASES = ("adamw", "plain AdamW")
EVERY = (*BASES, *TWO_PASS, "functional-sam keep u", "functional-sam naive", *OTHERS, *PUBLIC)
CASES = {
    "decoder-32k": Case("decoder", 256, 4, 4, 8, 128, 32000, methods=(*EVERY, "plain GPT")),
    "decoder-quick": Case("decoder", 64, 4, 1, 16, 128, 1024, methods=(*EVERY, "penalty-sam", "angle-sam", "plain GPT")),
    "vit-quick": Case("vit", 64, 4, 1, 64, methods=(*EVERY, "penalty-sam", "angle-sam")),
}
NATIVE_ONLY = {  # measured where a bf16 product is no slower than a float32 one
    "decoder-32k-bf16": Case("decoder", 256, 4, 4, 8, 128, 32000, "bf16", (*BASES, *TWO_PASS, "functional-sam keep u")),
}
MEMORY_CASE = Case(
    "decoder",
    576,
    6,
    9,
    8,
    512,
    32000,
    "float32",
    ("adamw", "plain AdamW", "sam", "functional-sam", "functional-sam keep u", "functional-sam naive"),
)
ROUNDS = {"decoder-32k": 7, "decoder-quick": 20, "vit-quick": 20, "decoder-32k-bf16": 7}


class PlainGPT(nn.Module):
    """A decoder as a tutorial writes it: nn.TransformerEncoderLayer, pre-LN, GELU, tied head, logits whole."""

    def __init__(self, case: Case):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(case.vocab, case.width), nn.Embedding(case.length, case.width)
        layer = nn.TransformerEncoderLayer(
            case.width, case.heads, 4 * case.width, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
        )
        self.blocks = nn.TransformerEncoder(layer, case.depth, nn.LayerNorm(case.width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.blocks(self.tokens(tokens) + self.positions.weight[:length], mask=mask, is_causal=True)
        logits: Tensor = x @ self.tokens.weight.T
        return logits


def _loss(case: Case, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with case.autocast():
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


@dataclass
class Contender:
    """One method on one case: `step()` is a whole training step, the optimizer's included."""

    name: str
    step: Callable[[], None]
    block: int = 1  # steps of one turn (methods whose steps differ)
    seconds: list[float] = field(default_factory=list)

    def turn(self) -> None:
        began = time.perf_counter()
        for _ in range(self.block):
            self.step()
        self.seconds.append((time.perf_counter() - began) / self.block)


def contender(case: Case, name: str, batch: tuple[Tensor, Tensor]) -> Contender:
    """Build one method, ours or another's, on its own copy of the model."""
    inputs, targets = batch
    if name == "plain GPT":
        case = Case(**{**case.__dict__, "kind": "plain"})
    model = case.model()

    def adamw(parameters: Any, **_: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1, fused=True)

    if name in ("plain AdamW", "plain GPT"):
        optimizer = adamw(model.parameters())

        def plain() -> None:
            torch.autograd.backward(_loss(case, model, inputs, targets))
            optimizer.step()
            optimizer.zero_grad()

        return Contender(name, plain)
    if name.startswith("public "):
        return _public(name, case, model, inputs, targets)

    method, _, option = name.partition(" ")
    settings: dict[str, dict[str, Any]] = {"keep u": {"keep": "u"}, "naive": {"keep": "cotangent"}, "k=5": {"every": 5}}
    options = settings.get(option, {})
    optimizer = adamw(model.parameters())

    def forward(model: nn.Module, inputs: Tensor, readout: Callable[..., Any] | None = None) -> Any:
        with case.autocast():
            return model(inputs, readout=readout)

    sharpness = SharpnessAware(model, optimizer, cast(MethodName, method), 0.01, forward=forward, **options)

    def ours() -> None:
        sharpness.backward([(inputs, targets)])
        optimizer.step()
        optimizer.zero_grad()

    return Contender(name, ours, options.get("every", 1))


def _public(name: str, case: Case, model: nn.Module, inputs: Tensor, targets: Tensor) -> Contender:
    """The same method in the package pytorch-optimizer, used as its documentation shows."""
    import pytorch_optimizer as public

    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.1, "fused": True}
    optimizer: Any
    if "GSAM" in name:
        base = torch.optim.AdamW(model.parameters(), **settings)
        schedule = type("Constant", (), {"step": lambda self: 0.01})()
        optimizer = public.GSAM(model.parameters(), base, model, schedule, alpha=0.99)

        def gsam() -> None:
            def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
                return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())

            with case.autocast():
                optimizer.set_closure(loss_fn, inputs, targets)
                optimizer.step()
            optimizer.zero_grad()

        return Contender(name, gsam)
    if "WSAM" in name:
        optimizer = public.WSAM(model, model.parameters(), torch.optim.AdamW, rho=0.01, gamma=0.9, **settings)
    elif "LookSAM" in name:
        optimizer = public.LookSAM(model.parameters(), torch.optim.AdamW, rho=0.01, k=5, **settings)
    else:
        optimizer = public.SAM(model.parameters(), torch.optim.AdamW, rho=0.01, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(case, model, inputs, targets)
        torch.autograd.backward(loss)
        return loss

    def step() -> None:
        if "WSAM" not in name:  # its step calls the closure for the first gradient too
            closure()
        optimizer.step(closure)
        optimizer.zero_grad()

    return Contender(name, step, 5 if "k=5" in name else 1)


# ---------------------------------------------------------------------- time


def measure_time(name: str, console: Console, rounds: int | None = None) -> pd.DataFrame:
    """Seconds per step of every contender of a case, taking turns; one row each.

    ratio (with quartiles): over our AdamW's in the same round; plain_ratio: over the plain loop's.
    """
    case = {**CASES, **NATIVE_ONLY}[name]
    batch = case.batch()
    contenders = [contender(case, method, batch) for method in case.methods]
    for one in contenders:  # moments, buffers, caches
        one.turn()
        one.seconds.clear()
    rounds = rounds or ROUNDS[name]
    for done in range(rounds):
        for one in contenders:
            one.turn()
        if done in (0, rounds // 2):
            console.print(f"{name}: round {done + 1} of {rounds}", style="dim", highlight=False)
    ours, plain = (next(one for one in contenders if one.name == base) for base in ("adamw", "plain AdamW"))
    rows = []
    for one in contenders:
        ratios = [seconds / own for seconds, own in zip(one.seconds, ours.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        rows.append(
            {
                "case": name,
                "method": one.name,
                "ms_per_step": 1e3 * statistics.median(one.seconds),
                "ratio": middle,
                "ratio_q1": low,
                "ratio_q3": high,
                "plain_ratio": statistics.median(a / b for a, b in zip(one.seconds, plain.seconds, strict=True)),
                "rounds": rounds,
            }
        )
    return pd.DataFrame(rows)


def matmul_peak(dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> float:
    """FLOP/s of a 2048^3 product, the median over `seconds` (one at least)."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(times)


def measured_cases(peaks: dict[str, float]) -> list[str]:
    """The cases for this machine, by its peak in float32 and bf16."""
    return [*CASES, *(NATIVE_ONLY if peaks["bf16"] >= peaks["float32"] else ())]


def step_flops(case: Case) -> float:
    """FLOP of one AdamW step of a decoder: 6 per weight and token in products (head included), and attention's."""
    blocks = 12 * case.depth * case.width**2
    attention = 6 * case.depth * 2 * case.length * case.width  # scores and values, all positions
    return float(case.rows * case.length * (6 * (blocks + case.vocab * case.width) + attention))


# ---------------------------------------------------------------------- memory


def peak_memory(name: str) -> dict[str, float]:
    """In this process: peak resident bytes of the second step of a contender over what was there before its model."""
    peak = peak_bytes(lambda: contender(MEMORY_CASE, name, MEMORY_CASE.batch()).step)
    return {"peak": peak, "parameters": 4 * sum(p.numel() for p in MEMORY_CASE.model().parameters())}


def measure_memory(console: Console) -> pd.DataFrame:
    """Peak memory of each contender of MEMORY_CASE, each in a fresh process; in MiB and in copies of the parameters."""
    rows = []
    for name in MEMORY_CASE.methods:
        console.print(f"memory: {name}", style="dim", highlight=False)
        found = in_a_process(__name__, name)
        rows.append({"method": name, "peak_mib": found["peak"] / 2**20, "parameters_mib": found["parameters"] / 2**20})
    frame = pd.DataFrame(rows)
    base = float(frame[frame.method == "adamw"].peak_mib.iloc[0])
    frame["extra_mib"] = frame.peak_mib - base
    frame["extra_in_parameters"] = frame.extra_mib / frame.parameters_mib
    return frame


# ---------------------------------------------------------------------- speed


def speed_of(time_frame: pd.DataFrame, peaks: dict[str, float]) -> pd.DataFrame:
    """Tokens per second of AdamW on the decoders, ours and plain ones, and the share of the machine's peak in that precision."""
    rows = []
    for name, case in {**CASES, **NATIVE_ONLY}.items():
        for method in ("adamw", "plain AdamW", "plain GPT") if case.kind == "decoder" else ():
            found = time_frame[(time_frame.case == name) & (time_frame.method == method)]
            if found.empty:
                continue
            seconds, peak = float(found.ms_per_step.iloc[0]) / 1e3, peaks[case.precision]
            rows.append(
                {
                    "case": name,
                    "method": method,
                    "tokens_per_second": case.rows * case.length / seconds,
                    "share_of_peak": step_flops(case) / seconds / peak,
                    "peak_gflops": peak / 1e9,
                }
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- the page of the package


def table(times: pd.DataFrame, memory: pd.DataFrame, speed: pd.DataFrame) -> str:
    """The costs as the page shows them: "ratio (q1-q3), ratio to the plain loop" for each case, peak memory, speed."""
    cases = list(dict.fromkeys(times.case))
    lines = [f"| method | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    for name, rows in times.groupby("method", sort=False):
        by_case = {row.case: row for row in rows.itertuples()}
        cells = [
            f"{row.ratio:.2f} ({row.ratio_q1:.2f}-{row.ratio_q3:.2f}), {row.plain_ratio:.2f}" if (row := by_case.get(case)) else ""
            for case in cases
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Peak memory of a step (D=576, N=6, V=32,000, B=8, T=512: 42.4M parameters), each in a process of its own:", ""]
    lines += ["| method | peak MiB | over our AdamW, MiB | in copies of the parameters |", "|---|---|---|---|"]
    lines += [
        f"| {row.method} | {row.peak_mib:.0f} | {row.extra_mib:+.0f} | {row.extra_in_parameters:+.2f} |"
        for row in memory.itertuples()
    ]
    lines += ["", "Speed of AdamW training, ours and plain, as a share of what a product reaches in that precision:", ""]
    lines += ["| case | loop | tokens/s | share of peak |", "|---|---|---|---|"]
    lines += [
        f"| {row.case} | {row.method} | {row.tokens_per_second:,.0f} | {row.share_of_peak:.0%} of {row.peak_gflops:.0f} GFLOP/s |"
        for row in speed.itertuples()
    ]
    return "\n".join(lines)


def fill(directory: Path, page: Path = PAGE) -> None:
    """Put the table of time.csv and memory.csv between the marks of the page."""
    before, rest = page.read_text(encoding="utf-8").split("<!-- costs -->")
    _, after = rest.split("<!-- end of costs -->")
    text = table(*(pd.read_csv(directory / f"{name}.csv") for name in ("time", "memory", "speed")))
    write_text(page, f"{before}<!-- costs -->\n{text}\n<!-- end of costs -->{after}")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    print(json.dumps(peak_memory(sys.argv[1])))
