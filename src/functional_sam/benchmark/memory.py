"""Peak memory of one piece of work in a process of its own."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HIGH_WATER = Path("/proc/self/clear_refs")  # Linux: writing 5 to it restarts VmHWM


def peak_bytes(build: Callable[[], Callable[[], Any]]) -> int:
    """In this process: peak resident bytes of the second call of what `build` returns, over those before it was built."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    warm = torch.randn(512, 512, dtype=torch.bfloat16)
    warm @ warm
    gc.collect()
    before = status("VmRSS")
    step = build()
    step()
    HIGH_WATER.write_text("5")
    step()
    return status("VmHWM") - before


def in_a_process(module: str, *arguments: str) -> Any:
    """The last line of `python -m module arguments`, from JSON."""
    # Large blocks go back to the system when freed, so that the resident set follows what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
