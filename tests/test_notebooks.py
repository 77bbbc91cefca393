"""The notebooks under analysis/: made, run and kept."""

import os

import nbformat
import pytest

from functional_sam import exhibits
from functional_sam.exhibits import notebooks
from functional_sam.exhibits.spec import load_spec
from functional_sam.files import write_text


def test_an_executed_notebook_keeps_no_trace_of_when_and_where(tmp_path):
    book = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 1}})
    book.cells = [nbformat.v4.new_code_cell("1", metadata={"papermill": {}, "execution": {}, "tags": []})]
    nbformat.write(book, tmp_path / "n.ipynb")
    notebooks.tidy(tmp_path / "n.ipynb")
    found = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    assert found.cells[0].metadata == {}
    assert "papermill" not in found.metadata


def test_a_notebook_has_its_pictures_whatever_the_backend(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import matplotlib.pyplot as plt\nplt.plot([1])")])
    notebooks.run(book, tmp_path / "n.ipynb", tmp_path)
    assert "image/png" in (tmp_path / "n.ipynb").read_text()
    assert os.environ["MPLBACKEND"] == "agg"


@pytest.mark.parametrize("name", exhibits.known())
def test_the_notebook_of_an_exhibit_is_the_one_that_draws_it(name):
    """Committed: of the largest scale that is released, run from its first cell to its last without an error."""
    code = [cell for cell in nbformat.read(exhibits.notebook(name), as_version=4).cells if cell.cell_type == "code"]
    assert code[0].source == f'scale = "{exhibits.largest_released(name)}"'
    assert code[0].metadata.tags == ["parameters"]
    assert f'exhibit = draw("{name}", scale)\nwrite(exhibit)\n' in code[1].source
    counts = [cell.execution_count for cell in code]
    assert None not in counts
    assert counts == sorted(set(counts))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert name.startswith("table") or any("image/png" in output.get("data", {}) for output in code[1].outputs)


@pytest.mark.parametrize(("name", "again"), [("figure-3", "again.figure"), ("table-2", "Markdown(again.page)")])
def test_a_notebook_lets_a_reader_change_how_sure_a_verdict_is(name, again):
    made = notebooks.notebook_of(load_spec(name, "quick"))
    nbformat.validate(made)
    assert made.cells == notebooks.notebook_of(load_spec(name, "quick")).cells  # the same ids
    (cell,) = [cell.source for cell in made.cells if "level = 0.95" in cell.source]
    compile(cell, name, "exec")
    assert again in cell


def test_which_notebook_is_of_which_scale(home):
    assert exhibits.notebook("figure-1").name == "figure_1.ipynb"
    assert exhibits.notebook("figure-1", "quick").name == "figure_1.ipynb"
    assert exhibits.notebook("figure-1", "laptop").name == "figure_1_laptop.ipynb"
    write_text(home / "results" / "figure-1-laptop.csv", "seed\n")
    assert exhibits.notebook("figure-1").name == exhibits.notebook("figure-1", "laptop").name == "figure_1.ipynb"
    assert exhibits.notebook("figure-1", "quick").name == "figure_1_quick.ipynb"
