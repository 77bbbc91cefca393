"""The page of the package: its code runs, its table is METHODS, and it has its place for the costs."""

import re
from pathlib import Path

import torch

import functional_sam.sharpness
from functional_sam.sharpness.methods import table
from functional_sam.sharpness.options import ASCENT_OPTIONS, MIX_OPTIONS, PATH_OPTIONS

PAGE = (Path(functional_sam.sharpness.__file__).parent / "README.md").read_text()


def test_every_code_block_runs():
    """One after the other, as a reader would."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"])


def test_the_table_is_methods():
    text = PAGE.split("<!-- table -->")[1].split("<!-- end of table -->")[0].strip().splitlines()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text[2:]]
    assert rows == [tuple(map(str, row)) for row in table()]


def test_every_axis_is_explained():
    for name in [*ASCENT_OPTIONS, *PATH_OPTIONS, *MIX_OPTIONS]:
        if name not in (None, "plain"):
            assert f"| {name} |" in PAGE
    assert "## Costs measured" in PAGE
