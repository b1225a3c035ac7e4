"""Each model's tiny preset as it is: 200 steps on the built-in scenes, two ranks, ZeRO-2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from end_to_end.jobs import ROOT, TRAIN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DEEPSPEED = Path(sys.executable).with_name("deepspeed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(preset) -> its summary and metrics; each preset runs once, in one run folder."""
    folder, done = tmp_path_factory.mktemp("tiny"), {}

    def train(preset: str):
        if preset not in done:
            command = [DEEPSPEED, "--num_accelerators", "2", TRAIN]
            command += ["--deepspeed", ROOT / "ds_configs/z2.json", f"preset={preset}"]
            command += [f"run.dir={folder}", f"data.builtin.dir={folder}/scenes"]
            command += ["metrics.port=null", "metrics.every=256 samples"]
            finished = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"PATH": f"{DEEPSPEED.parent}:{os.environ['PATH']}"},
                text=True,
                capture_output=True,
            )
            assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
            lines = (folder / preset / "metrics.jsonl").read_text().splitlines()
            losses = [line["losses"] for line in map(json.loads, lines) if "losses" in line]
            done[preset] = json.loads((folder / preset / "summary.json").read_text()), losses
        return done[preset]

    return train


@pytest.mark.parametrize(
    ("preset", "objectives", "candidates"),
    [
        ("albef_tiny", {"itc", "itm", "mlm"}, 1000),
        ("blip_tiny", {"itc", "itm", "lm"}, 1000),
        ("clip_tiny", {"contrastive"}, 1000),
        ("meter_tiny", {"mlm", "itm"}, 64),  # by its matching head
    ],
)
def test_every_loss_falls_and_recall_is_ten_times_chance(trained, preset, objectives, candidates):
    if preset == "meter_tiny":
        trained("albef_tiny")  # where its towers start from
    summary, losses = trained(preset)
    assert summary["world_size"] == 2 and len(summary["kept_tokens"]) == 3
    assert set(losses[0]) == objectives
    for name in objectives:
        start, end = (sum(x[name] for x in part) / 10 for part in (losses[:10], losses[-10:]))
        assert end < start, (name, start, end)
    assert summary["candidates"] == candidates
    assert summary["recall_at_1"] >= 10 / candidates
