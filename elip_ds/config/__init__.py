"""Command line and presets in, one typed and frozen Config out."""

from elip_ds.config.duration import check_duration, duration_in_samples
from elip_ds.config.load import (
    changed_keys,
    config_for_model,
    dump_config,
    load_config,
    read_config,
)
from elip_ds.config.schema import Config, PruningConfig, Stage

__all__ = [
    "Config",
    "PruningConfig",
    "Stage",
    "changed_keys",
    "check_duration",
    "config_for_model",
    "dump_config",
    "duration_in_samples",
    "load_config",
    "read_config",
]
