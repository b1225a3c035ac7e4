"""A run goes on with other ranks, another ZeRO stage, another precision, as if nothing had changed.

ITM is off: its negatives are drawn within a rank, so that its loss depends on the split.
"""

import shutil

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = (
    *("batching.global_batch_size=12", "schedule.length=120 samples"),  # 10 steps
    *("checkpoint.every=72 samples", "checkpoint.keep=2"),  # after the 6th and the 10th
    *("objectives.itm=null", "run.on_finish=nothing"),
)
NEXT = [7, 8, 9, 10]


@pytest.fixture(scope="module")
def whole(start):
    """An uninterrupted run, 2 ranks, ZeRO 2, fp32."""
    return start("whole", *STEPS).finish()


def stopped_at_six(job, name: str) -> None:
    """A copy of the run as it was after its 6th step."""
    copy = job.dir.with_name(name)
    shutil.copytree(job.dir, copy)
    shutil.rmtree(copy / "ckpt" / "step-00000010")
    (copy / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("ranks", "stage", "words"),
    [(1, "z2", ()), (3, "z3", ()), (2, "z0", ()), (2, "z3", ("engine.precision=bf16",))],
)
def test_it_goes_on_in_another_form(start, whole, ranks, stage, words):
    name = f"{ranks}-{stage}-{len(words)}"
    stopped_at_six(whole, name)
    job = start(name, *STEPS, *words, ranks=ranks, json=stage).finish()
    assert "states rearranged for this start" in job.output[0]
    losses, expected = job.losses(), whole.losses()
    assert list(losses) == NEXT
    rounding = 0.02 if words else 1e-5  # of bf16, which the weights now compute in
    for step in NEXT:
        assert losses[step] == pytest.approx(expected[step], rel=rounding)
    kept = ("samples_seen", "learning_rate")
    lines = {line["step"]: line for line in whole.lines() if "losses" in line}
    for line in job.lines():
        if "losses" in line:
            assert [line[key] for key in kept] == [lines[line["step"]][key] for key in kept]
    if not words:
        weights, reference = (load_file(j.newest() / "weights.safetensors") for j in (job, whole))
        # The gradient of a key's bias is zero but for rounding, which AdamW makes a step of.
        names = [name for name in reference if not name.endswith(("qkv.bias", "key_value.bias"))]
        assert max((weights[n] - reference[n]).abs().max() for n in names) < 1e-6


def test_a_checkpoint_of_all_ranks_but_one_is_refused_by_all_in_one_line(start, whole):
    stopped_at_six(whole, "lost")
    folder = whole.dir.with_name("lost") / "ckpt" / "step-00000006"
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    job = start("lost", *STEPS, json="z0").finish(ok=False)
    assert job.codes == [2, 2]
    assert "zero_pp_rank_1_*_optim_states.pt is missing" in job.output[0].splitlines()[-1]
