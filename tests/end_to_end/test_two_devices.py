"""One recipe on two sizes of memory: other micro-batches, the same samples, rates and losses.

What a loss sees of other samples is a rank's micro-batch, so that a contrast or a choice of
negatives is not the same in smaller ones. What is compared is exact by construction: word losses
are means over captions, and CLIP's contrast is taken over all micro-batches of a step (its cache).
For the image-text contrast and matching of ALBEF and BLIP, whose negatives come from the passes of
a moment, only samples and rates are the same.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_words
from jobs import DEADLINE, ROOT

pytestmark = pytest.mark.slow

STEPS = ["batching.global_batch_size=64", "schedule.length=512 samples", "run.on_finish=nothing"]
STEPS += ["schedule.warmup=128 samples", "metrics.every=64 samples", "engine.precision=fp32"]
# Micro-batches of a rank by the plan alone, without the time of a probe.
STEPS += ["batching.probe=never"]


def trained(name: str, memory: str, tmp_path, scenes, model: str) -> tuple[dict, list[dict]]:
    """Through the launcher, two ranks: plan.json and the lines of metrics.jsonl."""
    words = [*tiny_words(*STEPS, model=model), f"data.builtin.dir={scenes}", f"run.dir={tmp_path}"]
    command = [sys.executable, "-m", "elip_ds.launch", "run", *words, f"run.name={name}"]
    command += ["--deepspeed", str(ROOT / "ds_configs/z2.json"), "--ranks", "2"]
    command += ["--device-memory", memory]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    plan = json.loads((tmp_path / name / "plan.json").read_text())
    return plan, [line for line in lines if "losses" in line]
