"""How well classes are told apart, from a table of how often each was taken for each."""

import math
from collections.abc import Sequence

import numpy as np


def agreement(table: Sequence[float]) -> dict[str, float]:
    """Accuracy, Matthews' correlation and F1, from counts of (class, answer): all answers to the first class, to the second, ...

    matthews: of two classes phi (GLUE's CoLA), of more Gorodkin's R_K; 0 where all texts or all answers are of one class.
    f1: of two classes that of the second (MRPC, QQP), of more the mean over those that were there or said (SuperGLUE's CB).
    """
    counts = np.array(table, dtype=np.float64).reshape(math.isqrt(len(table)), -1)
    right, there, said, texts = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    spread = (texts**2 - there @ there) * (texts**2 - said @ said)
    f1 = 2 * right / np.maximum(there + said, 1)
    return {
        "accuracy": float(right.sum() / texts),
        "matthews": float((right.sum() * texts - there @ said) / math.sqrt(spread)) if spread else 0.0,
        "f1": float(f1[1] if len(f1) == 2 else f1[there + said > 0].mean()),
    }
