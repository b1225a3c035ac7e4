"""Runs a task under DeepSpeed; the only room that imports it."""

import os

import torch

if not torch.accelerator.is_available():
    # DeepSpeed would find this out too, with a warning on stdout from every process.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from elip_ds.engine.fused import unusable_apex_hidden

with unusable_apex_hidden():
    import deepspeed  # noqa: F401  # here first, for whatever is called apex

from elip_ds.engine.checkpoint import read_meta
from elip_ds.engine.consolidate import consolidate
from elip_ds.engine.ds_config import json_batch, read_ds_config
from elip_ds.engine.engine import Engine, StepRecord
from elip_ds.engine.out_of_memory import leave_when_out_of_memory
from elip_ds.engine.schedule import due
from elip_ds.engine.weights import load_weights, read_weights

__all__ = [
    "Engine",
    "StepRecord",
    "consolidate",
    "due",
    "json_batch",
    "leave_when_out_of_memory",
    "load_weights",
    "read_ds_config",
    "read_meta",
    "read_weights",
]
