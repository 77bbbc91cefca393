"""analysis/walkthrough.ipynb runs from its first cell to its last, and its hand-written line is the library's."""

import re
from pathlib import Path

import nbformat
import papermill

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "analysis" / "walkthrough.ipynb"


def printed(book):
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    return "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")


def test_the_walkthrough_runs(tmp_path):
    output = tmp_path / "walkthrough.ipynb"
    papermill.execute_notebook(
        str(NOTEBOOK), str(output), {"steps": 6, "seeds": [0, 1, 2]}, kernel_name="python3", progress_bar=False, cwd=str(ROOT)
    )
    text = printed(nbformat.read(output, as_version=4))
    differences = [float(value) for value in re.findall(r"sam: relative difference of the two gradients (\S+)", text)]
    assert len(differences) == 2
    assert max(differences) < 1e-5  # float32
    assert "(n = 3, 95 %)" in text
    assert re.search(r"Functional-SAM +p = \d\.\d+, adjusted \d\.\d+: (better|worse|no difference|inconclusive)", text)


def test_the_committed_walkthrough_was_run_and_is_small():
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert "(n = 4, 95 %)" in printed(book)
    assert NOTEBOOK.stat().st_size < 400_000
