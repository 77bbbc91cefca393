"""What a run is: the schema with every default. YAML files under configs/ hold differences only.

compose() = defaults <- tasks/TASK.yaml <- scales/SCALE.yaml (its section for the task) <- method <- exhibit <- overrides.
"""

from functional_sam.config.check import validated
from functional_sam.config.compose import PLACES, compose, instance, load, refuse_names, settings_of, to_yaml
from functional_sam.config.files import configs_directory, copied, nearest, read_yaml
from functional_sam.config.schema import Config, OptimizerConfig, RuntimeConfig

__all__ = [
    "PLACES",
    "Config",
    "OptimizerConfig",
    "RuntimeConfig",
    "compose",
    "configs_directory",
    "copied",
    "instance",
    "load",
    "nearest",
    "read_yaml",
    "refuse_names",
    "settings_of",
    "to_yaml",
    "validated",
]
