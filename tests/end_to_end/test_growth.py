"""The micro-batch follows the pruning schedule, in a real run of two ranks."""

import os
import subprocess
import sys

import pytest
from conftest import tiny_words
from jobs import DEADLINE, ROOT, free_port

pytestmark = pytest.mark.slow

SCHEDULE = "pruning.schedule=[{after: 48 samples, keep_ratios: [0.5, 0.125]}]"
WORDS = (
    SCHEDULE,
    "schedule.shape=exponential",
    "schedule.decay=1.0",  # the same rate at any length
    "checkpoint.every=48 samples",
    "run.on_finish=nothing",
    "engine.precision=fp32",
)
# train.py with everything real but the memory that the plan is made for.
GROWING = """
import sys
from dataclasses import replace
from elip_ds import train
from elip_ds.errors import leave_with

settle = train.settle_batch

def as_if_memory_were_short(*given):
    config, plan = settle(*given)
    return config, replace(plan, later={(0.5, 0.25): 2, (0.5, 0.125): 4})

train.settle_batch = as_if_memory_were_short
leave_with(train.main, sys.argv[1:])
"""


@pytest.mark.parametrize("stage", ["z0", "z2", "z3"])
def test_after_the_switch_a_run_is_one_of_the_larger_micro_batch(
    start, stage, tmp_path, shared_scenes
):
    small = (
        "batching.micro_batch_size=2",
        f"run.name=apart-{stage}",
        "run.allow_config_change=true",
    )
    apart = start("apart", *WORDS, *small, "schedule.length=48 samples", json=stage).finish()
    large = ("batching.micro_batch_size=4", *small[1:])
    start("apart", *WORDS, *large, "schedule.length=96 samples", json=stage).finish()

    script = tmp_path / "growing.py"
    script.write_text(GROWING)
    words = [
        *tiny_words(*WORDS, "batching.micro_batch_size=2", "schedule.length=96 samples"),
        f"data.builtin.dir={shared_scenes}", f"run.dir={tmp_path}", "run.name=grown",
    ]  # fmt: skip
    output = two_ranks(script, "--deepspeed", str(ROOT / f"ds_configs/{stage}.json"), *words)
    assert "micro-batch 2 -> 4, accumulation 2 -> 1 from sample 48 on" in output
    grown = type(apart)(tmp_path / "grown", [])
    apart = type(apart)(apart.dir.parent / f"apart-{stage}", [])
    assert sorted(grown.losses()) == list(range(1, 13))
    assert grown.losses() == apart.losses()
    norms = [
        [line["gradient_norm"] for line in job.lines() if "losses" in line]
        for job in (grown, apart)
    ]
    assert norms[0] == norms[1]


def two_ranks(script, *argv: str) -> str:
    port, processes = str(free_port()), []
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        env = os.environ | {name: str(value) for name, value in ranks.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(ROOT)
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *argv],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    return outputs[0]
