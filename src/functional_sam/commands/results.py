"""draw, check, release: from records to figures and tables, and the released ones."""

import argparse
from typing import Any

import pandas as pd
from rich.table import Table

from functional_sam.commands import console, shown, wide
from functional_sam.commands.runs import stale_words, statuses
from functional_sam.config import Config
from functional_sam.errors import UserError
from functional_sam.exhibits import Plan, changing, draw_plan, fresh, module_of, pack_name, planned, ready, sharing, way, write
from functional_sam.exhibits.check import check, load_released, released_path
from functional_sam.exhibits.output import as_written, csv_text, overridden_directory, stem
from functional_sam.exhibits.spec import load_spec
from functional_sam.files import write_text
from functional_sam.records import Run, RunDirectories
from functional_sam.records.released import load_pack, save_pack


def draw_command(options: argparse.Namespace) -> int:
    """Draw the exhibit, through its notebook unless told otherwise; the last line says how it compares with the released one."""
    from functional_sam.exhibits.notebooks import execute_notebook

    plan = ready(options.exhibit, options.scale, tuple(options.overrides))
    changed = changing(options.overrides)
    place = overridden_directory() if changed else None
    if options.no_notebook or options.overrides:
        exhibit = draw_plan(plan)
        paths, verdict = write(exhibit, place, changed), exhibit.verdict
    else:
        paths, verdict = execute_notebook(plan)
    for path in paths:
        console.print(f"wrote {shown(path)}", highlight=False, soft_wrap=True)
    console.print(f"[bold]{options.exhibit}[/bold]: {verdict}", highlight=False, soft_wrap=True)
    frame = pd.read_csv(stem(plan.spec, place).with_suffix(".csv"))
    console.print(against_released(plan, frame, bool(options.overrides)), highlight=False, soft_wrap=True, markup=False)
    return 0


def against_released(plan: Plan, frame: pd.DataFrame, overridden: bool) -> str:
    """One line: yours, the released one, whether that is within the tolerance, and the known reason where it is not."""
    spec = plan.spec
    if not isinstance(plan.source, RunDirectories):
        return f"{spec.name}: drawn from the released results in {plan.source.name}: not all of its runs are under runs/"
    if overridden:
        return f"{spec.name}: drawn from runs with settings of the command line, which nothing released compares with"
    try:
        released, tolerance = load_released(spec)
    except UserError as error:
        return f"{spec.name}: not compared with a released result: {error}"
    found = check(frame, released, tolerance)
    if found.mismatches:
        words = f"{len(found.mismatches)} of {found.cells} cells not within the tolerance (furthest: {found.furthest}). "
        words += known_reason(plan)
    else:
        words = f"all {found.cells} cells " + ("the same to the last digit" if found.same else "within the tolerance")
    headline = module_of(spec.name).headline
    try:
        both = f"yours {headline(frame)}; released {headline(released)}; "
    except (KeyError, AttributeError, IndexError):  # released by an earlier version, with other columns
        both = "yours and the released: "
    return f"{spec.name}: {both}{words}"


def known_reason(plan: Plan) -> str:
    """Why a result may differ from the released one: other settings, another kind of processor, other code."""
    pack = load_pack(pack_name(plan.spec.name, plan.spec.scale), plan.spec.scale)
    if pack is None:
        return "The records of the released runs are not here, so that no reason is known"
    if not all(pack.done(config) for config in plan.shown):
        return "Known reason: the released runs had other settings, or are of an earlier version"
    ours, theirs = ([source.read(config, "provenance.json") for config in plan.shown] for source in (plan.source, pack))
    here, there = ({str(record.get("machine")).split(",")[0] for record in records} for records in (ours, theirs))
    if here.isdisjoint(there):
        machines = f"released on {' and '.join(sorted(there))}, yours on {' and '.join(sorted(here))}"
        return f"Known reason: kernels of another processor round differently, and training amplifies it ({machines})"
    here, there = ({record.get("code", {}).get("sha256", "") for record in records} for records in (ours, theirs))
    if here.isdisjoint(there):
        return "Known reason: other code than the released runs were made by"
    return f"No known reason: `{way('plan', plan.spec.name, plan.spec.scale)}` says whether code or data differ"


def check_command(options: argparse.Namespace) -> int:
    """Compare the exhibit drawn from the present runs with the released one; 1 when a cell differs by more than its tolerance."""
    name, scale = options.exhibit, options.scale
    released, tolerance = load_released(load_spec(name, scale))
    refuse_released(planned(name, scale, tuple(options.overrides)))
    frame = as_written(fresh(name, scale, tuple(options.overrides)).frame)
    found = check(frame, released, tolerance)
    csv, yaml = released_path(name, scale), f"configs/exhibits/{name}.yaml"
    if found.mismatches:
        table = Table("row", "column", "fresh", "released", "tolerance", title=f"{name}, scale {scale}, against {shown(csv)}")
        for one in found.mismatches:
            table.add_row(one.row, one.column, one.fresh, one.released, one.tolerance)
        wide().print(table)
        text = f"{len(found.mismatches)} cells differ by more than the tolerance in {yaml}"
        console.print(text, style="red", soft_wrap=True)
        return 1
    how = "to the last digit" if found.same else f"within the tolerance in {yaml}"
    console.print(
        f"{name}, scale {scale}: all {found.cells} cells of {found.rows} rows are those of {shown(csv)}, {how}", soft_wrap=True
    )
    return 0


def refuse_released(plan: Plan) -> None:
    """Raise UserError where runs that are drawn were not trained here: nothing is checked by comparing records with themselves."""
    same = [run for run in map(Run, plan.shown) if run.released]
    if same:
        name, scale = plan.spec.name, plan.spec.scale
        raise UserError(
            f"{name} at scale {scale}: {len(same)} of {len(plan.shown)} runs are the released ones (first: {same[0].directory}), "
            f"which agree with themselves; train them with: functional-sam run {name} --scale {scale} --fresh"
        )


def release_command(options: argparse.Namespace) -> int:
    """Write the released records and numbers of an exhibit from the present runs; of an unfinished one the records alone."""
    name, scale = options.exhibit, options.scale
    if options.overrides:
        given = " ".join(options.overrides)
        raise UserError(f"release {name}: {given}: only runs as the exhibit states them, under runs/, are released: leave it out")
    if options.unfinished:
        return release_unfinished(name, scale)
    plan = ready(name, scale)
    if not isinstance(plan.source, RunDirectories):
        raise UserError(f"{name} at scale {scale}: only complete runs can be released; functional-sam run {name} --scale {scale}")
    exhibit, runs = draw_plan(plan), [Run(config) for config in plan.shown]
    pack = save_pack(pack_name(name, scale), scale, *to_release(name, scale))
    csv = released_path(name, scale)
    write_text(csv, csv_text(exhibit.frame))
    console.print(f"wrote {shown(pack)} ({len(runs)} runs, {pack.stat().st_size / 1000:.0f} kB) and {shown(csv)}", soft_wrap=True)
    changed = sum(bool(run.read("provenance.json").get("diff")) for run in runs)
    if changed:
        console.print(f"{changed} runs were made with uncommitted changes, which are not released", style="yellow")
    words = stale_words(name, scale, statuses(runs))
    if words:
        console.print(words.removeprefix("; "), style="yellow", soft_wrap=True)
    try:
        load_released(plan.spec)
    except UserError as error:
        console.print(f"`check` cannot compare with it yet: {error}", style="yellow", soft_wrap=True)
    return 0


def release_unfinished(name: str, scale: str) -> int:
    """Add to the pack every complete run of the exhibits that share it, also those that no drawing shows yet.

    With `run --released` another machine goes on from there. Raises UserError where none is complete.
    """
    runs, kept = to_release(name, scale, unfinished=True)
    if not runs:
        raise UserError(f"{name} at scale {scale}: no run is complete; make them with: functional-sam run {name} --scale {scale}")
    pack = save_pack(pack_name(name, scale), scale, runs, kept)
    console.print(
        f"wrote {shown(pack)} ({len(runs) + len(kept)} runs, {pack.stat().st_size / 1000:.0f} kB); "
        f"elsewhere `functional-sam run {name} --scale {scale} --released` goes on from it",
        soft_wrap=True,
    )
    return 0


def to_release(name: str, scale: str, unfinished: bool = False) -> tuple[list[Run], list[dict[str, Any]]]:
    """The runs here that exhibits sharing a pack can draw, and what the present pack holds for them beyond those.

    unfinished: every complete run that they need, drawn or not. Without it what was released unfinished stays as long as its
    exhibit is not complete.
    """
    here: dict[str, Run] = {}
    kept: dict[str, dict[str, Any]] = {}
    pack = load_pack(pack_name(name, scale), scale)
    for other in sharing(name, scale):
        plan = planned(other, scale)
        here |= {config.name: Run(config) for config in _complete(plan, unfinished)}
        if pack is not None:
            plan = planned(other, scale, source=pack)
            kept |= {config.name: pack.runs[config.name] for config in _complete(plan, True)}
    return list(here.values()), [line for run, line in kept.items() if run not in here]


def _complete(plan: Plan, unfinished: bool) -> list[Config]:
    """The runs that a drawing shows; unfinished: and all others that are complete."""
    drawn = plan.shown if plan.drawable else []
    return drawn + [config for config in plan.configs if unfinished and plan.source.done(config)]


def claims_command(options: argparse.Namespace) -> int:
    """Write README's table of claims and findings, and its picture."""
    from functional_sam.exhibits.claims import update

    console.print(f"wrote {shown(update())}", highlight=False)
    return 0


def report_command(options: argparse.Namespace) -> int:
    """Write paper/report.pdf and both galleries."""
    from functional_sam.exhibits.report import make

    for path in make():
        console.print(f"wrote {shown(path)}", highlight=False, soft_wrap=True)
    return 0
