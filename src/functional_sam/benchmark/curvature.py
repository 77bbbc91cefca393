"""Time and memory of the curvature products, as ratios to one gradient measured in the same rounds.

theta the parameters, v a direction, g the gradient. The gradient is PyTorch's: float32, whole logits, F.cross_entropy, fused
attention. Beside ours, where it can be imported, the public library curvlinops on the same model and batch. It depends on
torchvision only by way of a dependency of a dependency, and runs without.
"""

import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import functional_sam.curvature
from functional_sam.benchmark.memory import HIGH_WATER, in_a_process, peak_bytes
from functional_sam.benchmark.methods import Case
from functional_sam.curvature import CurvatureProducts
from functional_sam.files import write_text

CASES = {
    "decoder-1.3M": Case("decoder", width=128, depth=4, heads=2, rows=8, length=128, vocab=4096),
    "decoder-quick": Case("decoder", width=64, depth=4, heads=1, rows=16, length=128, vocab=1024),
}
MEMORY_CASE = "decoder-1.3M"
ROUNDS = 20
RUN = 50  # products of a Lanczos run, which share the making of the graph

PRODUCTS = {"H_G v": "gauss_newton", "H_F v": "functional", "H v": "hessian", "H_G v and H_F v": "split"}
KEPT = tuple(PRODUCTS)
ANEW = tuple(f"{name}, graph anew" for name in PRODUCTS)
PUBLIC = ("curvlinops H_G v", "curvlinops H v")
INSTALL = (
    "pip install --no-deps curvlinops-for-pytorch backpack-for-pytorch linear_operator unfoldNd einconv einops opt-einsum "
    "jaxtyping wadler-lindig"
)
PAGE = Path(functional_sam.curvature.__file__).parent / "README.md"


def contender(name: str, model: nn.Module, batch: tuple[Tensor, Tensor], v: list[Tensor]) -> Callable[[], Any]:
    """One product, or what it is compared with, as a call."""
    inputs, targets = batch
    if name == "gradient":
        return lambda: torch.autograd.grad(
            F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()), list(model.parameters())
        )
    if name.startswith("curvlinops "):
        return _public(name, model, inputs, targets, v)
    products = CurvatureProducts(model, [batch], retain=name not in ANEW)
    if name == "graph":

        def graph() -> None:
            products.release()
            products.loss_and_gradient()

        return graph
    product = getattr(products, PRODUCTS[name.removesuffix(", graph anew")])
    return lambda: product(v)


def _public(name: str, model: nn.Module, inputs: Tensor, targets: Tensor, v: list[Tensor]) -> Callable[[], Any]:
    """curvlinops as its documentation shows. It takes logits [N, V], and attention that can be differentiated twice."""
    import curvlinops

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, tokens: Tensor) -> Any:
            return self.inner(tokens).flatten(0, -2)

    operator_of = curvlinops.GGNLinearOperator if "H_G" in name else curvlinops.HessianLinearOperator
    operator = operator_of(
        Flat(),
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(inputs, targets.flatten())],
        check_deterministic=False,
        num_data=targets.numel(),
        batch_size_fn=lambda tokens: tokens.numel(),
    )

    def product() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return operator @ v

    return product


def _setting(case: str) -> tuple[nn.Module, tuple[Tensor, Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model, batch = CASES[case].model(), CASES[case].batch()
    return model, batch, [torch.randn_like(p) for p in model.parameters()]


def measure_case(case: str, console: Console, rounds: int, public: bool) -> pd.DataFrame:
    """One row for each contender; they take turns, and each turn begins with a gradient to compare with.

    ratio: to that gradient, median and quartiles; the row of the gradient itself shows the noise. ms: median. A product of a kept
    graph bears 1/RUN of the time to make it. error: of the public library's result against ours, |difference| / |ours|.
    """
    setting = _setting(case)
    names = ["gradient", "graph", *KEPT, *ANEW, *(PUBLIC if public else ())]
    calls = {name: contender(name, *setting) for name in names}
    first = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        for name, call in calls.items():
            base, own = _seconds(calls["gradient"]), _seconds(call)
            seconds[name].append(own)
            ratios[name].append(own / base)
        if done in (0, rounds // 2):
            console.print(f"curvature, {case}: round {done + 1} of {rounds}", style="dim", highlight=False)
    rows = []
    for name in names:
        share = 1 / RUN if name in KEPT else 0
        low, middle, high = statistics.quantiles(ratios[name], n=4, method="inclusive") if rounds > 1 else ratios[name] * 3
        made = share * statistics.median(ratios["graph"])
        row = {
            "case": case,
            "contender": name,
            "ms": 1e3 * (statistics.median(seconds[name]) + share * statistics.median(seconds["graph"])),
            "ratio": middle + made,
            "ratio_q1": low + made,
            "ratio_q3": high + made,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "error": _distance(first[name], first[name.removeprefix("curvlinops ")]) if name in PUBLIC else float("nan"),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    x, y = (torch.cat([tensor.detach().flatten() for tensor in tensors]).double() for tensors in (a, b))
    return float((x - y).norm() / y.norm())


def peak_memory(name: str) -> dict[str, float]:
    """In this process: peak resident bytes of a contender on MEMORY_CASE over what was there before its model."""
    return {"peak": peak_bytes(lambda: contender(name, *_setting(MEMORY_CASE)))}


def measure(console: Console, rounds: int | None = None) -> pd.DataFrame:
    """All cases; with a column of peak memory for one of them, each contender in a process of its own."""
    try:
        importlib.import_module("curvlinops")
        public = True
        console.print(f"beside ours: curvlinops {importlib.metadata.version('curvlinops-for-pytorch')}", highlight=False)
    except ImportError as error:
        public = False
        console.print(f"curvlinops is left out of the comparison ({error}): {INSTALL}", highlight=False, soft_wrap=True)
    frame = pd.concat([measure_case(case, console, rounds or ROUNDS, public) for case in CASES], ignore_index=True)
    frame["peak_mib"] = float("nan")
    for i, row in frame[frame.case == MEMORY_CASE].iterrows() if HIGH_WATER.exists() else ():
        if row.contender != "graph":
            console.print(f"curvature, memory: {row.contender}", style="dim", highlight=False)
            frame.loc[i, "peak_mib"] = in_a_process(__name__, row.contender)["peak"] / 2**20
    return frame


# ---------------------------------------------------------------------- the page of the package


def table(frame: pd.DataFrame) -> str:
    """The costs as the page shows them: "ratio (q1-q3)" for each case, and the memory."""
    lines = [f"| product | {' | '.join(CASES)} | peak MiB, {MEMORY_CASE} |", "|---" * (len(CASES) + 2) + "|"]
    for name, rows in frame.groupby("contender", sort=False):
        by_case = {row.case: row for row in rows.itertuples()}
        cells = [f"{by_case[case].ratio:.2f} ({by_case[case].ratio_q1:.2f}-{by_case[case].ratio_q3:.2f})" for case in CASES]
        peak = by_case[MEMORY_CASE].peak_mib
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if pd.isna(peak) else f'{peak:.0f}'} |")
    lines += ["", f"Threads: {frame.threads.iloc[0]}; rounds: {frame.rounds.iloc[0]}."]
    return "\n".join(lines)


def fill(csv: Path, page: Path = PAGE) -> None:
    """Put the table of a written curvature.csv between the marks of the page."""
    before, rest = page.read_text(encoding="utf-8").split("<!-- costs -->")
    _, after = rest.split("<!-- end of costs -->")
    write_text(page, f"{before}<!-- costs -->\n{table(pd.read_csv(csv))}\n<!-- end of costs -->{after}")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    print(json.dumps(peak_memory(sys.argv[1])))
