"""Run directories: what a run was asked, where it came from, what it measured."""

from functional_sam.records.run import Run, RunLocked

__all__ = ["Run", "RunLocked"]
