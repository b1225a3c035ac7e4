"""Reads StepRecords; the only room that knows Prometheus."""

from elip_ds.metrics.catalog import CATALOG
from elip_ds.metrics.checks import check_metrics
from elip_ds.metrics.recorder import Recorder
from elip_ds.metrics.summary import close_run

__all__ = ["CATALOG", "Recorder", "check_metrics", "close_run"]
