"""Executing analysis/*.ipynb by papermill: the notebook that a reader opens is the one that drew the exhibit."""

import json
import warnings
from pathlib import Path

import nbformat
import papermill

from functional_sam.errors import UserError
from functional_sam.exhibits import Plan, notebook
from functional_sam.exhibits.output import paper_directory, stem
from functional_sam.files import atomic_file

QUIET = ["--IPKernelApp.log_level=50"]  # not even the error that a kernel calls its own shutdown


def execute_notebook(plan: Plan) -> tuple[list[Path], str]:
    """Run the exhibit's notebook at the scale of a plan, which can be drawn; the files written, and the verdict.

    At quick in place; that of another scale is written beside it, so that both can be kept.
    """
    name, scale = plan.spec.name, plan.spec.scale
    source, path = notebook(name), notebook(name, scale)
    if not source.exists():
        raise UserError(f"{source} is missing: restore it with git checkout")
    with atomic_file(path) as temporary:
        try:
            warnings.filterwarnings("ignore", message="The specified file", module="papermill")  # the name of a temporary file
            papermill.execute_notebook(
                str(source),
                str(temporary),
                {"scale": scale},
                kernel_name="python3",
                progress_bar=False,
                extra_arguments=QUIET,
                cwd=str(source.parents[1]),
            )
        except papermill.PapermillExecutionError as error:
            raise UserError(f"{source}: {error.ename}: {error.evalue}") from error
        _tidy(temporary)
    made = stem(plan.spec).with_suffix(".json")
    record = json.loads(made.read_text())
    return [*(paper_directory().parent / file for file in record["files"]), made, path], record["verdict"]


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
    # papermill adds a cell with the parameters it was given: they go into the cell that declares them.
    for injected in [cell for cell in content.cells if "injected-parameters" in cell.metadata.get("tags", [])]:
        content.cells.remove(injected)
        (declared,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
        declared.source = injected.source.removeprefix("# Parameters\n").strip()
    nbformat.write(content, path)  # type: ignore[no-untyped-call]
