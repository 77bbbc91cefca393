"""figure-1 of runs that were never trained: made-up shares, written as run directories where their configs say."""

import argparse
import itertools
import json

from functional_sam.config import to_yaml
from functional_sam.files import write_text
from functional_sam.log_spaced import measure_steps
from functional_sam.records import Run

HEADLINE = "language against vision: "
HEADLINE += "language above at all 3 matched numbers of targets (0.69 against 0.59 at 2,048)"
HEADLINE += "; without sampling noise 0.75 \N{PLUS-MINUS SIGN} 0.00 against 0.75 \N{PLUS-MINUS SIGN} 0.00"
# 3 seeds, 2 origins: of language 7 points with one number of targets and 4 with 3 more, of vision 7 and 4 with 2 more; under adam
# the last 4 of the 7, and 2 of the 4.
CELLS = 3 * 2 * ((7 + 4 * 3 + 7 + 4 * 2) + (4 + 2 * 3 + 4 + 2 * 2)) * 8
PROVENANCE = {"commit": "c", "diff": "", "versions": {}, "machine": "processor A, 2 cores", "code": {"sha256": "0", "files": {}}}


def share(config, step):
    end = step / config.training.steps
    return 0.2 + 0.01 * config.training.init_seed + 0.1 * end + (0.1 if config.task == "vision" else 0.0)


def do(configs, machine="processor A, 2 cores", of=share):
    """Finished runs of figure-1 with made-up shares, where and of what their configs say."""
    for config in configs:
        run = Run(config)
        lines: list[dict] = []
        points = sorted(measure_steps(config.measure.points, config.training.steps))
        every_second, more = points[::-1][::2], config.measure.more_targets
        for step, targets in itertools.product(points, [*config.measure.targets, *more]):
            if targets in more and step not in every_second:
                continue
            same = {"share": of(config, step), "norm_logit": 0.5, "norm_func": 0.4, "cosine": 0.1}
            origins = {"same": same, "independent": {**same, "square_logit": 0.36, "square_func": -0.1 if step == 1 else 0.04}}
            about = {
                "kind": "targets",
                "step": step,
                "targets": targets,
                "temperature": 1.0,
                "loss": 3.0,
                "norm": 9.0,
                "entropy": 2.0,
                "norm_gradient": 2.0,
                "square_gradient": 1.0,
            }
            ascents = config.measure.ascents if step >= config.measure.adam_from else ["gradient"]
            lines.append({**about, **dict.fromkeys(ascents, origins)})
        evaluations = range(config.training.eval_every, config.training.steps + 1, config.training.eval_every)
        lines += [{"kind": "validation", "step": step, "loss": 3.0} for step in evaluations]
        lines.append({"kind": "train", "step": config.training.steps, "loss": 3.0})
        write_text(run.directory / "config.yaml", to_yaml(config))
        write_text(run.directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        run.write("provenance.json", {**PROVENANCE, "machine": machine, "data": {"data": "d", "sha256": "s"}})
        run.write("done.json", {"step": config.training.steps, "seconds": 1.0, "loss": 3.0})


def options(**more):
    """The command line of a command on figure-1."""
    given = {"exhibit": "figure-1", "scale": "quick", "overrides": [], "no_notebook": True, "unfinished": False}
    return argparse.Namespace(**{**given, **more})
