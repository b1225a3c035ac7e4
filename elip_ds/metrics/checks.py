"""What the metrics are asked to use, looked at before a run begins."""

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from elip_ds.config.schema import MetricsConfig
from elip_ds.errors import NodeError


def check_metrics(config: MetricsConfig) -> None:
    """Every rank calls it before it meets the others, so that none of them waits for one that
    could not go on. Raises UserError where a package, a file or a folder is missing.
    """
    for name in ("certificate", "key", "password_file"):
        path = getattr(config, name)
        if path is not None and not os.access(path, os.R_OK):
            raise NodeError(f"metrics.{name}={path}: not a file that can be read")
    for name in ("sd_dir", "textfile_dir"):
        path = getattr(config, name)
        with suppress(OSError):
            Path(path or ".").mkdir(parents=True, exist_ok=True)
        if path is not None and not os.access(path, os.W_OK):
            raise NodeError(f"metrics.{name}={path}: not a folder that can be written to")
    for name in config.also:
        if name != "csv" and find_spec(name) is None:
            raise NodeError(
                f"metrics.also={list(config.also)}: pip install {name}, or leave it out"
            )
