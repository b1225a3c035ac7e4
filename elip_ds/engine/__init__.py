"""Runs a task under DeepSpeed; the only room that imports it."""

from elip_ds.engine.checkpoint import find_checkpoint, list_checkpoints, read_meta
from elip_ds.engine.ds_config import json_batch, read_ds_config
from elip_ds.engine.engine import Engine, StepRecord, read_weights
from elip_ds.engine.schedule import due

__all__ = [
    "Engine",
    "StepRecord",
    "due",
    "find_checkpoint",
    "json_batch",
    "list_checkpoints",
    "read_ds_config",
    "read_meta",
    "read_weights",
]
