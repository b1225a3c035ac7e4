"""The same numbers at every ZeRO stage, and at another number of ranks where mathematics says
so."""

import json

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = ("schedule.length=160 samples", "checkpoint.every=160 samples")


def relative(a: dict[int, dict[str, float]], b: dict[int, dict[str, float]]) -> float:
    """The largest relative difference of two runs' losses."""
    assert a.keys() == b.keys()
    return max(abs(a[s][n] - b[s][n]) / abs(b[s][n]) for s in b for n in b[s])


def test_all_zero_stages_train_alike_on_two_ranks(start):
    """20 steps in fp32: losses to 1e-4, teacher to 1e-5, queues equal on both ranks."""
    plain = start("z0", *STEPS, json="z0").finish()
    reference = load_file(plain.newest() / "weights.safetensors")
    assert len(plain.losses()) == 20
    for stage in ("z1", "z2", "z3", "z2_offload"):
        job = start(stage, *STEPS, json=stage).finish()
        assert relative(job.losses(), plain.losses()) < 1e-4, stage
        weights = load_file(job.newest() / "weights.safetensors")
        assert weights.keys() == reference.keys()
        teacher = [name for name in reference if name.startswith("teacher.")]
        assert max((weights[n] - reference[n]).abs().max() for n in teacher) < 1e-5, stage
        digests = json.loads((job.newest() / "meta.json").read_text())["state_digests"]
        assert len(digests) == 2 and len(set(digests)) == 1, stage
        queues = load_file(job.newest() / "state.safetensors")
        ours = load_file(plain.newest() / "state.safetensors")
        assert (queues["itc.image_queue"] - ours["itc.image_queue"]).abs().max() < 1e-5, stage


def test_one_rank_of_eight_equals_two_of_four_without_local_negatives(start):
    """ITC and MLM do not depend on the split; ITM draws its negatives locally, so it is off
    here."""
    words = (*STEPS, "objectives.itm=null")
    one = start("one", *words, ranks=1).finish()
    two = start("two", *words, ranks=2).finish()
    assert relative(two.losses(), one.losses()) < 1e-5


def test_hard_negatives_depend_on_the_split(start):
    """The documented exception: the first step's ITM differs, its ITC and MLM do not."""
    words = ("schedule.length=8 samples", "run.on_finish=nothing")
    one = start("one-itm", *words, ranks=1).finish()
    two = start("two-itm", *words, ranks=2).finish()
    a, b = one.losses()[1], two.losses()[1]
    assert a["itc"] == pytest.approx(b["itc"], rel=1e-5)
    assert a["mlm"] == pytest.approx(b["mlm"], rel=1e-5)
    assert a["itm"] != pytest.approx(b["itm"], rel=1e-5)


def test_keep_ratio_one_everywhere_equals_pruning_off_bit_for_bit(start):
    words = ("schedule.length=40 samples", "run.on_finish=nothing")
    off = start("off", *words, "pruning.stages=[]").finish()
    stages = (
        "[{layer: 1, lookahead: 1, keep_ratio: 1.0}, {layer: 2, lookahead: 1, keep_ratio: 1.0}]"
    )
    kept = start("kept", *words, f"pruning.stages={stages}").finish()
    assert kept.losses() == off.losses()


@pytest.mark.parametrize("json", ["z2", "z3"])
def test_recomputing_changes_no_number(start, json):
    words = ("schedule.length=40 samples", "run.on_finish=nothing")
    plain = start(f"plain-{json}", *words, json=json).finish()
    for mode in ("cheap", "full"):
        again = (f"model.vision.recompute={mode}", f"model.text.recompute={mode}")
        recomputed = start(f"{mode}-{json}", *words, *again, json=json).finish()
        assert recomputed.losses() == plain.losses()


@pytest.mark.parametrize("json", ["z0", "z1", "z2", "z3"])
def test_bf16_trains_and_its_teacher_averages_in_fp32(start, json):
    job = start(
        f"half-{json}", *STEPS, "engine.precision=bf16", "teacher.momentum=0.999", json=json
    )
    job.finish()
    losses = job.losses()
    assert losses[20]["mlm"] < losses[1]["mlm"]
    weights = load_file(job.newest() / "weights.safetensors")
    weight = weights["model.visual.norm.weight"]  # as the optimizer has it
    assert (weight != weight.bfloat16()).any()
    # With momentum 0.999 an average kept in bf16 would not have moved a single bit.
    teacher = weights["teacher.visual.norm.weight"]
    assert (teacher != 1).float().mean() > 0.5
    assert ((teacher - 1).abs() < 2**-8).all()


def test_accumulated_micro_batches_take_the_same_samples_in_the_same_step(start):
    """Two micro-batches of 2 on 2 ranks see the global batch of 8 that one of 4 sees."""
    words = ("schedule.length=40 samples", "run.on_finish=nothing", "objectives.itm=null")
    words = (*words, "objectives.itc=null")
    whole = start("whole", *words, ranks=1).finish()
    micro = start("micro", *words, "batching.micro_batch_size=2").finish()
    assert [line["samples_seen"] for line in micro.lines()] == [8, 16, 24, 32, 40]
    # A mean of means, so only near: words are not spread evenly over micro-batches.
    assert relative(micro.losses(), whole.losses()) < 0.05
