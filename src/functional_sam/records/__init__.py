"""Run directories: what a run was asked, where it came from, what it measured."""

from functional_sam.records.code import content
from functional_sam.records.run import Run, RunLocked
from functional_sam.records.source import RunDirectories, Source
from functional_sam.records.status import Status, found_in, move_aside, status

__all__ = ["Run", "RunDirectories", "RunLocked", "Source", "Status", "content", "found_in", "move_aside", "status"]
