"""What the methods and the curvature products cost on this machine: functional-sam benchmark (make benchmark)."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from functional_sam.benchmark import curvature, methods
from functional_sam.benchmark.memory import HIGH_WATER
from functional_sam.files import atomic_file

PARTS = ("methods", "curvature")


def benchmark(directory: Path, console: Console, rounds: int | None = None, only: str | None = None) -> dict[str, pd.DataFrame]:
    """Everything, or one of PARTS; each frame goes under `directory` as CSV once it is measured, and all are returned by name."""
    torch.set_num_threads(os.cpu_count() or 1)
    result: dict[str, pd.DataFrame] = {}

    def keep(name: str, measure: Callable[[], pd.DataFrame]) -> None:
        result[name] = measure()
        with atomic_file(directory / f"{name}.csv") as temporary:
            result[name].to_csv(temporary, index=False, float_format="%.4g")

    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    keep("machine", lambda: pd.DataFrame([machine]))
    if only != "curvature":
        peaks = {"float32": methods.matmul_peak(), "bf16": methods.matmul_peak(torch.bfloat16)}
        if peaks["bf16"] < peaks["float32"]:
            times = peaks["float32"] / peaks["bf16"]
            text = f"bf16 is left out: a product takes {times:.0f} times as long as in float32 here"
            console.print(text, style="dim", highlight=False)
        cases = methods.measured_cases(peaks)
        keep("time", lambda: pd.concat([methods.measure_time(name, console, rounds) for name in cases]))
        keep("speed", lambda: methods.speed_of(result["time"], peaks))
        if HIGH_WATER.exists():
            keep("memory", lambda: methods.measure_memory(console))
    if only != "methods":
        keep("curvature", lambda: curvature.measure(console, rounds))
    return result
