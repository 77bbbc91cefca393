"""Making and executing analysis/*.ipynb by papermill: the notebook that a reader opens is the one that drew the exhibit."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill

from functional_sam.errors import UserError
from functional_sam.exhibits import Plan, notebook
from functional_sam.exhibits.output import paper_directory, stem
from functional_sam.exhibits.spec import Spec
from functional_sam.files import atomic_file

QUIET = ["--IPKernelApp.log_level=50"]  # not even the error that a kernel calls its own shutdown
HEAD = """# {name}: {title}

Draws {name} from the records of the runs under `runs/` or, without them, of those released in `results/`, and writes it to
`paper/`. Nothing is trained here: `make {name} SCALE={scale}` does the runs."""
DRAW = """from functional_sam.exhibits import draw, write

exhibit = draw("{name}", scale)
write(exhibit)
{show}"""
SAID = """print(exhibit.caption)
print()
print(exhibit.verdict)"""
CHANGE = """**Change one thing**: how sure an interval or a verdict has to be.
At 0.95 it is the exhibit above; try 0.8 or 0.99, and run the cell again. Nothing is written."""
AGAIN = """level = 0.95

from unittest.mock import patch

from functional_sam.study import compare

with patch.object(compare, "LEVEL", level):
    again = draw("{name}", scale)
print(again.verdict)
{again} if level != 0.95 else None"""
NUMBERS = """import pandas as pd

pd.options.display.max_rows = pd.options.display.max_columns = 12
exhibit.frame  # the numbers behind it; the whole of it is the CSV beside the drawing"""


def execute_notebook(plan: Plan) -> tuple[list[Path], str]:
    """Make the exhibit's notebook at the scale of a plan, which can be drawn, and run it; the files written, and the verdict."""
    name, scale = plan.spec.name, plan.spec.scale
    path = notebook(name, scale)
    with atomic_file(path) as temporary:
        run(notebook_of(plan.spec), temporary, path.parents[1])
    made = stem(plan.spec).with_suffix(".json")
    record = json.loads(made.read_text())
    return [*(paper_directory().parent / file for file in record["files"]), made, path], record["verdict"]


def notebook_of(spec: Spec) -> Any:
    """The notebook of an exhibit before it is run: a cell of parameters, the drawing, and a cell to change one thing in."""
    figure = spec.name.startswith("figure")
    show = "exhibit.figure" if figure else "from IPython.display import Markdown\n\nMarkdown(exhibit.page)"
    again = "again.figure" if figure else "Markdown(again.page)"
    fill = {"name": spec.name, "title": spec.title, "scale": spec.scale, "show": show, "again": again}
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [
        text(HEAD.format(**fill)),  # type: ignore[no-untyped-call]
        code(f'scale = "{spec.scale}"', metadata={"tags": ["parameters"]}),  # type: ignore[no-untyped-call]
        code(DRAW.format(**fill)),  # type: ignore[no-untyped-call]
        code(SAID),  # type: ignore[no-untyped-call]
        text(CHANGE),  # type: ignore[no-untyped-call]
        code(AGAIN.format(**fill)),  # type: ignore[no-untyped-call]
        code(NUMBERS),  # type: ignore[no-untyped-call]
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # nbformat's are random
    return nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]


def run(source: Any, output: Path, directory: Path) -> None:
    """Execute a notebook (a path or its content) in a directory; without times and paths. Raises UserError where a cell fails."""
    with warnings.catch_warnings(), _pictures_inline():
        warnings.filterwarnings("ignore", message="The specified file", module="papermill")  # the name of a temporary file
        try:
            papermill.execute_notebook(
                source, str(output), kernel_name="python3", progress_bar=False, extra_arguments=QUIET, cwd=str(directory)
            )
        except papermill.PapermillExecutionError as error:
            raise UserError(f"{output}: {error.ename}: {error.evalue}") from error
    tidy(output)


@contextlib.contextmanager
def _pictures_inline() -> Iterator[None]:
    """Without the caller's MPLBACKEND, which a kernel would take over, and leave the notebook without its pictures."""
    given = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["MPLBACKEND"] = given


def tidy(path: Path) -> None:
    """Drop what differs between two executions of the same content: times, paths, machine."""
    content = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    content.metadata.pop("papermill", None)
    for cell in content.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.metadata.get("tags") == []:
            del cell.metadata["tags"]
    nbformat.write(content, path)  # type: ignore[no-untyped-call]
