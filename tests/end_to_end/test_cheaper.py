"""What makes a run cheaper by choice, in real runs: keep ratios by schedule, short texts, a twin
that repeats the student's choice.
"""

import json

import pytest

pytestmark = pytest.mark.slow

CHEAPER = (
    "schedule.length=192 samples",  # 24 steps
    "checkpoint.every=64 samples",
    "run.on_finish=nothing",
    "model.text.dropout=0.1",
    "data.workers=1",
    "data.pad=longest",
    "teacher.prune=student",
    "pruning.stages=[{layer: 1, lookahead: 1, keep_ratio: 1.0}, "
    "{layer: 2, lookahead: 1, keep_ratio: 1.0}]",
    "pruning.schedule=[{after: 50 samples, keep_ratios: [1.0, 0.5]}, "
    "{after: 100 samples, keep_ratios: [0.5, 0.25]}]",
    "batching.micro_batch_size=2",  # two of them a rank and step
)
KEPT = {
    step: [17, 17] if step <= 7 else [17, 10] if step <= 13 else [10, 6] for step in range(1, 25)
}
"Before step 8 56 samples were seen, before step 7 48; before step 14 104, before step 13 96."


def kept(job):
    """step -> tokens after each stage."""
    return {line["step"]: line["kept_tokens"] for line in job.lines() if "losses" in line}


@pytest.mark.parametrize("stage", ["z0", "z3"])
def test_a_run_follows_its_schedule_at_step_boundaries_and_so_does_a_resumed_one(start, stage):
    whole = start(f"whole-{stage}", *CHEAPER, json=stage).finish()
    assert kept(whole) == KEPT
    assert json.loads((whole.dir / "summary.json").read_text())["kept_tokens"] == [10, 6]
    job = start(f"killed-{stage}", *CHEAPER, json=stage)
    job.wait_for(lambda: len(job.losses()) >= 10, "10 steps")
    job.kill()
    job.finish(ok=False)
    resumed = start(f"killed-{stage}", *CHEAPER, json=stage).finish()
    assert "resumed" in resumed.output[0]
    assert kept(resumed) == KEPT
    assert resumed.losses() == whole.losses()
