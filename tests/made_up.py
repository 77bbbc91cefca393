"""Runs that were never trained: a source of records with made-up losses, for tests of plans, choices, tables and figures."""

import math

from functional_sam.study.report import DIAGNOSIS


class MadeUp:
    """Records by config name; `do` makes them, with the loss that a function of the config gives (None: diverged)."""

    name = "made up"

    def __init__(self, loss):
        self.loss, self.records = loss, {}

    def do(self, configs):
        """Finish the runs; their number."""
        left = [config for config in configs if config.name not in self.records]
        for config in left:
            self.records[config.name] = (config, self.loss(config))
        return len(left)

    def done(self, config):
        return config.name in self.records

    def summary(self, config):
        _, loss = self.records[config.name]
        if loss is None:
            return {"diverged": True, "error": "e", "loss": None}
        numbers = {"loss": loss, "accuracy": 1 / loss}
        if config.training.test_best:  # as training records it: a trial, which tests nothing, has no best_... in its summary
            numbers |= {"best_loss": loss - 0.5, "best_step": 7, "best_accuracy": 1 / loss}
        tested = {f"test_{key}": value + 0.25 for key, value in numbers.items()} if config.training.test else {}
        return {"step": config.training.steps, "seconds": 2.0, "tokens": 100, "images": 100, **numbers, **tested}

    def read(self, config, file):
        if file == "provenance.json":
            data = {"data": "d", "sha256": f"of {config.data.sources}"}
            return {"commit": "c", "diff": "", "versions": {}, "data": data, "code": {"sha256": "s", "files": {}}}
        assert file == "curvature.json"
        assert config.measure.curvature
        record = {}
        for path in DIAGNOSIS.values():
            place = record
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = 0.5
        return record

    def metrics(self, config, kind=None):
        if kind == "validation":
            loss = self.loss(config)
            return [{"kind": kind, "step": step, "loss": loss + more, "accuracy": 1 / loss} for step, more in ((7, -0.5), (9, 0.0))]
        if kind != "dose" or config.method.rho is None:
            return []
        slope = {"sam": 4.0, "precond-sam": 3.0}.get(config.method.name, 1.0)
        return [{"kind": "dose", "step": step, "dose": slope * config.method.rho} for step in (1, 10, 100)]


def bowl(best_lr=0.02, best_rho=0.05, spread=0.1):
    """A loss with its optimum at best_lr and best_rho; seeds differ by `spread`, alike for every method, and a little in pairs."""

    def loss(config):
        seed = config.training.init_seed
        value = 4 + 0.3 * math.log(config.optimizer.lr / best_lr) ** 2 + spread * math.sin(seed)
        if config.method.rho is not None:
            value += 0.02 * math.log(config.method.rho / best_rho) ** 2 + 0.004 * math.cos(3 * seed + len(config.method.name))
        return value

    return loss
