"""submit: an exhibit on a cluster."""

import argparse

from functional_sam.commands import wide
from functional_sam.commands.scale import warn_on
from functional_sam.jobs.launch import submit


def submit_command(options: argparse.Namespace) -> int:
    """Submit the missing runs of the exhibit and the job that draws it, or print their scripts."""
    given = (options.exhibit, options.scale, options.cluster, options.overrides, options.dry_run, wide(), options.released)
    submit(*given, warn=warn_on)
    return 0
