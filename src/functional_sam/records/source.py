"""Where records are read from: run directories, or what was released of them. It is passed; nothing reads from a current one."""

from typing import Any, Protocol

from functional_sam.config import Config
from functional_sam.records.own import require_own
from functional_sam.records.run import Run


class Source(Protocol):
    """The records of runs, found by their configs."""

    @property
    def name(self) -> str:
        """For people: "runs", or the file of the released records."""

    def done(self, config: Config) -> bool:
        """Whether the run is complete."""

    def summary(self, config: Config) -> dict[str, Any]:
        """Content of done.json. Raises UserError where there is none."""

    def read(self, config: Config, file: str) -> dict[str, Any]:
        """Content of a JSON file of the run, such as curvature.json. Raises UserError where there is none."""

    def metrics(self, config: Config, kind: str | None = None) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, those of one kind or all."""


class RunDirectories:
    """The run directories that configs name, under their runtime.runs. Another run's files are refused as they are read."""

    name = "runs"

    def done(self, config: Config) -> bool:
        return Run(config).done

    def summary(self, config: Config) -> dict[str, Any]:
        return _own(config).summary()

    def read(self, config: Config, file: str) -> dict[str, Any]:
        return _own(config).read(file)

    def metrics(self, config: Config, kind: str | None = None) -> list[dict[str, Any]]:
        run = _own(config)
        if run.done and not run.summary().get("diverged"):
            run.require_metrics_until(config.training.steps)
        return run.metrics(kind)


def _own(config: Config) -> Run:
    run = Run(config)
    require_own(run)
    return run
