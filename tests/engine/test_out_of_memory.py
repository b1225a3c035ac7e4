"""What counts as memory that ran out. A rank that really runs out: launching/test_real_steps.py."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from elip_ds.dist import node_name
from elip_ds.engine.out_of_memory import (
    OOM_FOLDER,
    OUT_OF_MEMORY_STATUS,
    asked_bytes,
    is_out_of_memory,
)
from elip_ds.run import PLAN


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_known_by_any_of_its_names(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("while loading")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_the_allocator_of_this_torch_is_known_and_what_was_asked_is_read():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert asked_bytes(caught.value) == 2**50


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0", 5 * 2**29),
        ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("could not create a primitive", None),
    ],
)
def test_what_was_asked_is_in_bytes(message, expected):
    assert asked_bytes(RuntimeError(message)) == expected


# A rank, three stretches into a pruning schedule.
RANK = """
import sys
from pathlib import Path
from elip_ds import dist
from elip_ds.batching import Plan
from elip_ds.engine.out_of_memory import leave_when_out_of_memory
from elip_ds.run import Run

run = Run(dist.read_ranks(), Path(sys.argv[1]), 0)
later = {(0.5, 0.25): 8, (0.5, 0.125): 16}
leave_when_out_of_memory(run, Plan(8, 4, 1, later), 2)
run.step, run.keep_ratios = 7, tuple(map(float, sys.argv[2:]))
raise MemoryError
"""


@pytest.mark.parametrize(
    ("ratios", "micro", "passes", "fingerprint"),
    [((), 8, 4, "first"), ((0.5, 0.25), 8, 4, "first"), ((0.5, 0.125), 16, 2, "later")],
)
def test_the_record_is_of_the_stretch_that_ran_out(tmp_path, ratios, micro, passes, fingerprint):
    later = {"keep_ratios": [0.5, 0.125], "failure_key": "later"}
    node = {"keep_ratios": [0.5, 0.25], "failure_key": "first", "later": [later]}
    (tmp_path / PLAN).write_text(json.dumps({"nodes": {node_name(): node}}))
    rank = subprocess.run(
        [sys.executable, "-c", RANK, str(tmp_path), *map(str, ratios)],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert rank.returncode == OUT_OF_MEMORY_STATUS, rank.stderr[-2000:]
    record = json.loads((tmp_path / OOM_FOLDER / "oom-0.json").read_text())
    assert (record["micro_batch_size"], record["gradient_accumulation_steps"]) == (micro, passes)
    assert record["micro_batches"] == [micro] and record["keep_ratios"] == list(ratios)
    assert record["fingerprints"] == [fingerprint] and record["step"] == 7
    assert record["follows_schedule"]
    assert f"micro-batch {micro}; start again with batching.micro_batch_size={micro // 2}" in (
        rank.stderr
    )
