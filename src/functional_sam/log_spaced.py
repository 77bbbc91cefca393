"""At which steps of a run something is measured: training does it there, and a record that lacks one of them is not whole."""

import math


def measure_steps(points: int, steps: int) -> set[int]:
    """At most `points` steps, log-spaced from 1 to `steps`, both included."""
    if points == 0:
        return set()
    if points == 1:
        return {steps}
    return {round(math.exp(math.log(steps) * i / (points - 1))) for i in range(points)}
