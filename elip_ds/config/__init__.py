"""Command line and presets in, one typed and frozen Config out."""

from elip_ds.config.duration import check_duration, duration_in_samples
from elip_ds.config.load import changed_keys, dump_config, load_config, read_config
from elip_ds.config.schema import Config, PruningConfig, ShardSource, Stage

__all__ = [
    "Config",
    "PruningConfig",
    "ShardSource",
    "Stage",
    "changed_keys",
    "check_duration",
    "dump_config",
    "duration_in_samples",
    "load_config",
    "read_config",
]
