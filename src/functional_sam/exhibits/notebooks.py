"""Executing analysis/*.ipynb by papermill: the notebook that a reader opens is the one that drew the exhibit."""

import json
import warnings
from pathlib import Path

import nbformat
import papermill

from functional_sam.errors import UserError
from functional_sam.exhibits import draw, known, notebook, source, spec
from functional_sam.exhibits.output import paper_directory, stem
from functional_sam.files import atomic_file

QUIET = ["--IPKernelApp.log_level=40"]  # errors only


def execute_notebook(name: str, scale: str) -> tuple[list[Path], str, str]:
    """Run the exhibit's notebook in place at a scale; the files it wrote, its verdict, and what it was drawn from."""
    if name not in known() or not notebook(name).exists():
        draw(name, scale)  # raises for an unknown name
        raise UserError(f"{notebook(name)} is missing: restore it with git checkout")
    drawn = spec(name, scale)
    source(name, scale)  # the clear error for a missing run, before a kernel is started
    path = notebook(name)
    with atomic_file(path) as temporary:
        try:
            warnings.filterwarnings("ignore", message="The specified file", module="papermill")  # the name of a temporary file
            papermill.execute_notebook(
                str(path),
                str(temporary),
                {"scale": scale},
                kernel_name="python3",
                progress_bar=False,
                extra_arguments=QUIET,
                cwd=str(path.parents[1]),
            )
        except papermill.PapermillExecutionError as error:
            raise UserError(f"{path}: {error.ename}: {error.evalue}") from error
        _tidy(temporary)
    record = json.loads(stem(drawn).with_suffix(".json").read_text())
    files = [paper_directory().parent / file for file in record["files"]]
    return [*files, stem(drawn).with_suffix(".json")], record["verdict"], record["drawn_from"]


def _tidy(path: Path) -> None:
    """Drop what differs between two executions of the same content: times, paths, machine."""
    content = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    content.metadata.pop("papermill", None)
    for cell in content.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        tags = cell.metadata.get("tags")
        if tags == []:
            del cell.metadata["tags"]
    # papermill adds a cell with the parameters it was given; fold it into the cell that declares them.
    injected = [cell for cell in content.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    for cell in injected:
        content.cells.remove(cell)
    nbformat.write(content, path)  # type: ignore[no-untyped-call]
