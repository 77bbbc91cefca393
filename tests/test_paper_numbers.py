"""paper/numbers.csv: well formed, and equal to what the sources say, written down here a second time as they say it."""

import csv
import math
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

PAPER = Path(__file__).resolve().parents[1] / "paper"
COLUMNS = ["id", "value", "unit", "where", "model", "method", "dataset", "source", "standing"]
SIZES = ("23.9M", "42.5M", "117.9M", "1.2B")

# The survey's words, SAM/AdamW; a survey on the gain of Functional-SAM, a review on that of the preconditioned methods over SAM.
SURVEY = "23.9M 3.59/3.57; 42.5M 3.46/3.45; 117.9M 3.29/3.28; 1.2B NaN"
GAINS = {"functional-sam-survey": "0.02-0.06", "precond-extract": "5e-3 to 1e-2"}


def read() -> list[dict[str, str]]:
    with (PAPER / "numbers.csv").open(newline="", encoding="ascii") as file:
        return list(csv.DictReader(file, strict=True))


ROWS = read()
TEXT = {row["id"]: row["value"] for row in ROWS}
VALUE = {name: float(value) for name, value in TEXT.items()}


def survey_losses() -> dict[str, str]:
    losses = {}
    for entry in SURVEY.split("; "):
        size, values = entry.split()
        losses |= {f"c4-loss-{method}-{size}": value for method, value in zip(("sam", "adamw"), values.split("/"), strict=False)}
    return losses


def gain_ends() -> dict[str, float]:
    ends = {}
    for text, words in GAINS.items():
        low, high = re.split(r"-(?=0)| to ", words)
        ends |= {f"gain-{text}-low": float(low), f"gain-{text}-high": float(high)}
    return ends


def test_columns_are_complete():
    assert list(ROWS[0]) == COLUMNS
    for row in ROWS:
        assert None not in row, row  # a cell too many
        assert all(cell and cell == cell.strip() for cell in row.values()), row  # a cell too few, or an empty one


def test_ids_are_unique_and_plain():
    assert [name for name, count in Counter(row["id"] for row in ROWS).items() if count > 1] == []
    assert [row["id"] for row in ROWS if not re.fullmatch(r"[a-z0-9]+([-.][a-zA-Z0-9]+)*", row["id"])] == []


def test_standing_is_one_of_three():
    assert {row["standing"] for row in ROWS} == {"first-hand", "second-hand", "inference"}


def test_what_we_worked_out_is_never_called_published():
    for row in ROWS:
        assert (row["standing"] == "inference") == row["source"].startswith("ours"), row


def test_values_are_numbers_and_only_the_diverged_run_is_not_finite():
    assert [name for name, value in VALUE.items() if not math.isfinite(value)] == ["c4-loss-sam-1.2B"]
    (diverged,) = (row for row in ROWS if row["id"] == "c4-loss-sam-1.2B")
    assert diverged["value"] == "NaN"
    assert "diverged" in diverged["where"]


def test_every_c4_number_has_an_expectation_here():
    named = {row["id"] for row in ROWS if "c4" in " ".join((row["id"], row["dataset"])).lower()}
    assert named == {*survey_losses(), *gain_ends(), "c4-bits-per-byte-per-nat", "c4-bits-per-byte-adamw-23.9M"}


def test_c4_losses_are_the_survey_s():
    expected = survey_losses()
    rows = [row for row in ROWS if row["id"] in expected]
    assert {row["id"]: row["value"] for row in rows} == expected
    for row in rows:
        assert row["id"] == f"c4-loss-{row['method']}-{row['model']}"
        assert (row["unit"], row["dataset"], row["standing"]) == ("nats/token", "C4", "second-hand")


@pytest.mark.parametrize(("size", "difference"), [("23.9M", "0.02"), ("42.5M", "0.01"), ("117.9M", "0.01")])
def test_sam_is_above_adamw_on_c4_by(size: str, difference: str):
    assert Decimal(TEXT[f"c4-loss-sam-{size}"]) - Decimal(TEXT[f"c4-loss-adamw-{size}"]) == Decimal(difference)


def test_both_gains_are_recorded():
    assert {name: VALUE[name] for name in TEXT if name.startswith("gain-")} == gain_ends()


def test_c4_bits_per_byte():
    factor = VALUE["c4-bits-per-byte-per-nat"]
    assert VALUE["c4-bits-per-byte-adamw-23.9M"] == round(3.57 * factor, 3)
    assert 4 < 1 / (math.log(2) * factor) < 5  # bytes per token of English under 32,101 pieces


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_the_parameters_of_their_shape(size: str):
    D, N, F, H = (int(TEXT[f"size-{size}-{key}"]) for key in ("width", "depth", "mlp", "heads"))
    assert F == 4 * D
    assert divmod(D, H) == (VALUE["size-head-width"], 0)
    blocks = N * (4 * D * D + 2 * D * F) + (2 * N + 1) * D  # q, k, v, out; two of the MLP; scales of the LayerNorms
    embeddings = (VALUE["nanodo-tokenizer-pieces"] + VALUE["nanodo-length"]) * D  # tied head; learned positions
    assert VALUE[f"size-{size}-non-embedding"] == pytest.approx(blocks / 1e6, abs=6e-4)
    assert VALUE[f"size-{size}-all"] == pytest.approx((blocks + embeddings) / 1e6, abs=0.06)
    assert VALUE[f"size-{size}-non-embedding"] == pytest.approx(VALUE[f"model-size-{size}"], abs=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_steps_are_20_tokens_per_parameter(size: str):
    tokens = 20 * VALUE[f"model-size-{size}"] * 1e6
    assert VALUE[f"steps-at-20-tokens-per-parameter-{size}"] == round(tokens / (256 * 512))


def test_ranges_have_both_ends_in_order():
    lows = [name.removesuffix("-low") for name in TEXT if name.endswith("-low")]
    assert lows == [name.removesuffix("-high") for name in TEXT if name.endswith("-high")]
    assert all(VALUE[f"{name}-low"] < VALUE[f"{name}-high"] for name in lows)


def test_ids_named_in_the_paper_folder_exist():
    patterns = re.findall(r"`((?:c4|gain|size|glue|superglue|xnli|iwslt14)-[^`]+)`", (PAPER / "README.md").read_text("ascii"))
    assert patterns
    for pattern in patterns:
        expression = re.escape(pattern).replace(r"\*", ".+")
        assert any(re.fullmatch(expression, name) for name in TEXT), pattern
