"""draw, check, release: from records to figures and tables, and the released ones."""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from functional_sam.commands import console, wide
from functional_sam.commands.runs import stale_words, statuses
from functional_sam.errors import UserError
from functional_sam.exhibits import draw, drawable, fresh, notebook, pack_name, sharing, source
from functional_sam.exhibits.check import compare, load_released, released_paths
from functional_sam.files import write_text
from functional_sam.records import Run
from functional_sam.records.released import load_pack, reading, save_pack


def draw_command(options: argparse.Namespace) -> int:
    """Draw the exhibit, through its notebook unless told otherwise."""
    from functional_sam.exhibits.notebooks import execute_notebook

    if options.no_notebook or options.overrides:
        exhibit = draw(options.exhibit, options.scale, tuple(options.overrides))
        paths, verdict, drawn_from = exhibit.paths, exhibit.verdict, exhibit.source
    else:
        paths, verdict, drawn_from = execute_notebook(options.exhibit, options.scale)
        paths = [*paths, notebook(options.exhibit)]
    for path in paths:
        console.print(f"wrote {shown(path)}", highlight=False, soft_wrap=True)
    if drawn_from != "runs":
        console.print(
            f"drawn from the released results in {drawn_from}: not all of its runs are under runs/", style="yellow", soft_wrap=True
        )
    console.print(f"[bold]{options.exhibit}[/bold]: {verdict}", highlight=False, soft_wrap=True)
    return 0


def check_command(options: argparse.Namespace) -> int:
    """Compare the exhibit drawn from the present runs with the released one; 1 when a cell differs by more than its tolerance."""
    name, scale = options.exhibit, options.scale
    released, tolerance = load_released(name, scale)
    frame = fresh(name, scale, tuple(options.overrides))
    found = compare(frame, released, tolerance)
    csv, yaml = released_paths(name, scale)
    if found:
        table = Table("row", "column", "fresh", "released", "tolerance", title=f"{name}, scale {scale}, against {shown(csv)}")
        for one in found:
            table.add_row(one.row, one.column, one.fresh, one.released, one.tolerance)
        wide().print(table)
        console.print(f"{len(found)} cells differ by more than the tolerance in {shown(yaml)}", style="red", soft_wrap=True)
        return 1
    rows = len(released) - len(tolerance.rows_ignored)
    cells = rows * (len(tolerance.bounds) + len(tolerance.exact))
    ignored = list(tolerance.ignored)
    same = frame.drop(columns=ignored, errors="ignore").equals(released.drop(columns=ignored))
    console.print(
        f"{name}, scale {scale}: all {cells} cells of {rows} rows are those of {shown(csv)}, "
        + ("to the last digit" if same else f"within the tolerance in {shown(yaml)}"),
        soft_wrap=True,
    )
    return 0


def release_command(options: argparse.Namespace) -> int:
    """Write the released records and numbers of an exhibit from the present runs."""
    name, scale = options.exhibit, options.scale
    if source(name, scale) is not None:
        raise UserError(f"{name} at scale {scale}: only complete runs can be released; functional-sam run {name} --scale {scale}")
    frame = fresh(name, scale)
    runs = [Run(config) for config in drawable(name, scale)]
    pack = save_pack(pack_name(name, scale), scale, *to_release(name, scale))
    csv, yaml = released_paths(name, scale)
    write_text(csv, frame.to_csv(index=False, float_format="%.8g"))
    console.print(f"wrote {shown(pack)} ({len(runs)} runs, {pack.stat().st_size / 1000:.0f} kB) and {shown(csv)}", soft_wrap=True)
    changed = sum(bool(run.read("provenance.json").get("diff")) for run in runs)
    if changed:
        console.print(f"{changed} runs were made with uncommitted changes, which are not released", style="yellow")
    words = stale_words(name, statuses(runs))
    if words:
        console.print(words.removeprefix("; "), style="yellow", soft_wrap=True)
    if not yaml.is_file():
        console.print(f"`check` needs {shown(yaml)} too: keys, tolerances and their reason", style="yellow", soft_wrap=True)
    return 0


def to_release(name: str, scale: str) -> tuple[list[Run], list[dict[str, Any]]]:
    """The runs here that exhibits sharing a pack can draw, and what the present pack holds for them beyond those."""
    here: dict[str, Run] = {}
    kept: dict[str, dict[str, Any]] = {}
    pack = load_pack(pack_name(name, scale), scale)
    for other in sharing(name, scale):
        here |= {config.name: Run(config) for config in drawable(other, scale)}
        if pack is not None:
            with reading(pack):
                kept |= {config.name: pack.runs[config.name] for config in drawable(other, scale)}
    return list(here.values()), [line for run, line in kept.items() if run not in here]


def shown(path: Path) -> Path:
    """A path as short as it can be read from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def claims_command(options: argparse.Namespace) -> int:
    """Write README's table of claims."""
    from functional_sam.exhibits.claims import update

    console.print(f"wrote {shown(update())}", highlight=False)
    return 0
