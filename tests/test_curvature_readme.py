"""The page of the curvature package: its code runs, its costs are those measured; and the benchmark that measures them."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from test_architecture import git

import functional_sam.curvature
from functional_sam.benchmark import curvature
from functional_sam.benchmark.methods import Case

PAGE = Path(functional_sam.curvature.__file__).parent / "README.md"
TINY = {name: Case("decoder", 8, 1, 1, 2, 6, 20) for name in curvature.CASES}


def test_every_code_block_runs():
    """One after the other, as a reader would."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["top"].converged
    assert 0 < names["sharpness"].share < 1


def test_every_public_function_is_on_the_page():
    names = {name for name in functional_sam.curvature.__all__ if not name[0].isupper()} - {"decompose_many", "parameter_groups"}
    assert {name for name in names if f"`{name}" not in PAGE.read_text()} == set()


def test_costs_on_the_page_are_those_measured():
    """Both as committed."""
    page = git("show", "HEAD:src/functional_sam/curvature/README.md")
    frame = pd.read_csv(io.StringIO(git("show", "HEAD:results/benchmark/curvature.csv")))
    assert set(frame.case) == set(curvature.CASES)
    assert set(frame.contender) >= {"gradient", "graph", *curvature.KEPT, *curvature.ANEW}
    assert curvature.table(frame) in page


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(curvature, "CASES", TINY)
    monkeypatch.setattr(curvature, "HIGH_WATER", Path("/nowhere"))
    return curvature.measure(Console(file=io.StringIO()), rounds=2)


def test_benchmark_of_products(measured, tmp_path):
    """Every contender has a row in every case; a kept product bears its part of the graph; the table fills the page and no more."""
    assert len(measured) == len(TINY) * measured.contender.nunique()
    assert set(measured.contender) >= {"gradient", "graph", *curvature.KEPT, *curvature.ANEW}
    assert ((measured.ratio_q1 > 0) & (measured.ratio >= measured.ratio_q1) & (measured.ratio_q3 >= measured.ratio)).all()
    assert measured.peak_mib.isna().all()
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- costs -->\nold\n<!-- end of costs -->\nbelow\n")
    measured.to_csv(tmp_path / "curvature.csv", index=False, float_format="%.4g")
    curvature.fill(tmp_path / "curvature.csv", page)
    table = curvature.table(pd.read_csv(tmp_path / "curvature.csv"))
    assert page.read_text() == f"above\n<!-- costs -->\n{table}\n<!-- end of costs -->\nbelow\n"
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + measured.contender.nunique()


def test_contenders_are_what_they_are_called():
    """The gradient and the products of the benchmark are those of the library on the same model, batch and v."""
    model = TINY["decoder-quick"].model()
    batch = TINY["decoder-quick"].batch()
    v = [torch.randn_like(p) for p in model.parameters()]
    calls = {name: curvature.contender(name, model, batch, v) for name in ("gradient", "graph", *curvature.KEPT, *curvature.ANEW)}
    products = functional_sam.curvature.CurvatureProducts(model, [batch])
    for ours, exact in zip(calls["gradient"](), products.gradient(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)
    for name, product in curvature.PRODUCTS.items():
        for kept, anew, exact in (
            zip(calls[name](), calls[f"{name}, graph anew"](), getattr(products, product)(v), strict=True)
            if product != "split"
            else ()
        ):
            torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(anew, exact, rtol=1e-5, atol=1e-6)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    for name in ("H v", "H v, graph anew", "graph"):
        before = len(forwards)
        for _ in range(3):
            calls[name]()
        assert len(forwards) - before == (0 if name == "H v" else 3), name
