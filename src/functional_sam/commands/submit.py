"""submit: an exhibit on a cluster."""

import argparse

from functional_sam.commands import wide
from functional_sam.jobs.launch import submit


def submit_command(options: argparse.Namespace) -> int:
    """Submit the missing runs of the exhibit and the job that draws it, or print their scripts."""
    submit(options.exhibit, options.scale, options.cluster, options.overrides, options.dry_run, wide(), options.released)
    return 0
