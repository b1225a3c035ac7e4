"""What a run's memory depends on, in JSON: a change in any of it makes earlier answers void."""

import dataclasses
import hashlib
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import elip_ds
from elip_ds.config import Config
from elip_ds.engine.ds_config import BATCH_KEYS

ROOMS = ("towers", "models", "objectives", "tasks", "engine", "batching", "launching")
"Of the package, those whose code runs in a step, measures or predicts it."
ENVIRONMENT = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "MALLOC_MMAP_THRESHOLD_",
               "MALLOC_ARENA_MAX", "OMP_NUM_THREADS")  # fmt: skip


def memory_facts(
    config: Config,
    tree: dict[str, Any],
    *,
    world_size: int,
    local_ranks: int,
    device: dict[str, Any],
    accumulates: bool,
) -> dict[str, Any]:
    """tree: the DeepSpeed JSON.  device: its name and memory.  accumulates: more than one
    micro-batch an optimizer step.

    Not in it: learning rate, seed, data paths, length of the run, names and ports.
    """
    model = dataclasses.asdict(config.model)
    model.pop("init_from", None)
    return {
        "model": model,
        "pruning": dataclasses.asdict(config.pruning),
        "teacher": dataclasses.asdict(config.teacher),
        "objectives": {name: dataclasses.asdict(part) for name, part in config.objectives.items()},
        "text": {key: getattr(config.data, key) for key in ("text_length", "pad", "tokenizer")},
        "optimizer": config.optim.name,
        "precision": config.engine.precision,
        "compile": config.engine.compile,
        "fused": config.engine.fused,
        "evaluates": [config.eval.batch_size, config.eval.match_candidates, config.eval.prune],
        "deepspeed": {key: value for key, value in tree.items() if key not in BATCH_KEYS},
        "accumulates": accumulates,
        "ranks": [world_size, local_ranks],
        "device": device,
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "deepspeed": version("deepspeed"),
            "elip_ds": elip_ds.__version__,
            "code": code_digest(),
        },
    }


@cache
def code_digest() -> str:
    """Of the rooms' sources: an edited model is another model."""
    digest = hashlib.sha256()
    package = Path(elip_ds.__file__).parent
    for room in ROOMS:
        for path in sorted((package / room).glob("*.py")):
            digest.update(f"{room}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()
