"""Published numbers, the rows of paper/numbers.csv, and the gains in fine-tuning among them."""

import csv
from dataclasses import dataclass
from pathlib import Path

SIZES = ("small", "base", "large", "xl")
GLUE = ("cola", "sst", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


@dataclass(frozen=True)
class Gain:
    """One comparison that was published. values: (task or size, method minus its baseline in points)."""

    title: str
    method: str
    values: list[tuple[str, float]]
    transfer: bool = False


def rows(numbers: Path) -> dict[str, dict[str, str]]:
    """The rows of paper/numbers.csv by their ids."""
    with numbers.open(newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def gains(numbers: Path) -> list[Gain]:
    """Those that table-6 shows, from the rows glue-delta-*, superglue-* and xnli-*."""
    shown = ("glue-", "superglue-", "xnli-")
    value = {name: float(row["value"]) for name, row in rows(numbers).items() if name.startswith(shown)}

    def minus(method: str, base: str) -> float:
        return round(value[method] - value[base], 2)

    def superglue(part: str) -> list[tuple[str, float]]:
        return [(size, minus(f"superglue-{part}{size}-sam", f"superglue-{part}{size}-adafactor")) for size in SIZES]

    tram = [(end, minus(f"xnli-zero-shot-tram-{end}", "xnli-zero-shot-adam")) for end in ("low", "high")]
    return [
        Gain("GLUE, RoBERTa-base (Kaddour 2022)", "sam", [(task, value[f"glue-delta-sam-{task}"]) for task in GLUE]),
        Gain("SuperGLUE, T5.1.1 (Bahri 2022)", "sam", superglue("")),
        Gain("SuperGLUE with 5 % of the data, T5.1.1 (Bahri 2022)", "sam", superglue("5pct-")),
        Gain("XNLI, English (Sherborne 2023)", "sam", [("en", minus("xnli-en-sam", "xnli-en-adam"))]),
        Gain("XNLI, English (Sherborne 2023)", "asam", [("en", minus("xnli-en-asam", "xnli-en-adam"))]),
        Gain("XNLI, zero-shot (Sherborne 2023)", "sam", [("zero-shot", minus("xnli-zero-shot-sam", "xnli-zero-shot-adam"))], True),
        Gain(
            "XNLI, zero-shot (Sherborne 2023)", "asam", [("zero-shot", minus("xnli-zero-shot-asam", "xnli-zero-shot-adam"))], True
        ),
        Gain("XNLI, zero-shot (Sherborne 2023)", "tram", tram, True),
    ]
