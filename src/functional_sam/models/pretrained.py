"""Weights as `transformers` saves them, all of them from the files: nothing is downloaded, and nothing is left at random."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from functional_sam.errors import UserError


def loaded(kind: Any, directory: Path, **options: Any) -> Any:
    """kind.from_pretrained in float32. Raises UserError for a weight that the files lack, or have in another shape."""
    with _quiet():
        model, info = kind.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # not ignored: see below
            **options,
        )
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if wrong:
        raise UserError(
            f"{directory} lacks {wrong[0]}, or has it in another shape ({len(wrong)} weights in all): they would be random. "
            f"Save it again with save_pretrained of a {type(model).__name__}"
        )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no report of the weights that are not used: another head than ours, on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
