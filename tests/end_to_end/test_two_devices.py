"""One recipe on two sizes of memory: other micro-batches, the same samples, rates and losses.

What a loss sees of other samples is a rank's micro-batch, so that a contrast or a choice of
negatives is not the same in smaller ones. What is compared is exact by construction: word losses
are means over captions, and CLIP's contrast is taken over all micro-batches of a step (its cache).
For the image-text contrast and matching of ALBEF and BLIP, whose negatives come from the passes of
a moment, only samples and rates are the same.
"""

import json

import pytest

pytestmark = pytest.mark.slow

RECIPE = [
    *("batching.global_batch_size=512", "schedule.length=1536 samples"),
    *("schedule.warmup=1024 samples", "metrics.every=512 samples", "run.on_finish=nothing"),
    "batching.probe=never",  # by the plan alone, which takes less time
    *("model.vision.image_size=64", "model.vision.patch_size=4", "data.builtin.image_size=64"),
]
WORDS_ALONE = ["objectives.itc=null", "objectives.itm=null"]


@pytest.mark.parametrize(
    ("model", "changes", "small", "close"),
    [("clip", [], "cpu:1150MiB", 1e-4), ("albef", WORDS_ALONE, "cpu:1250MiB", 0.01)],
)
def test_one_recipe_trains_alike_in_little_and_in_much_memory(start, model, changes, small, close):
    """close: of losses, relative. ALBEF's words are a mean over micro-batches of means over words,
    and micro-batches have a few words more or less.
    """
    jobs = [
        start(f"{model}-{i}", *RECIPE, *changes, f"batching.device_memory={memory}", model=model)
        for i, memory in enumerate((small, "cpu:6GiB"))
    ]
    plan, roomy_plan = (json.loads((job.finish().dir / "plan.json").read_text()) for job in jobs)
    lines, roomy = ([line for line in job.lines() if "losses" in line] for job in jobs)
    assert plan["micro_batch_size"] < roomy_plan["micro_batch_size"] == 256
    assert plan["gradient_accumulation_steps"] > roomy_plan["gradient_accumulation_steps"] == 1
    assert plan["global_batch_size"] == roomy_plan["global_batch_size"] == 512
    assert len(lines) == len(roomy) == 3
    for mine, other in zip(lines, roomy, strict=True):
        for key in ("step", "samples_seen", "learning_rate"):
            assert mine[key] == other[key]
        assert mine["losses"] == pytest.approx(other["losses"], rel=close)
    assert len({line["learning_rate"] for line in lines}) == 3  # it moved


def test_nodes_of_unequal_memory_share_a_batch_and_train_as_equal_ones(start):
    """Two nodes of one machine, of which Slurm has given less memory to the first."""
    equal = start("equal", *RECIPE, model="clip").finish()
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    nodes = [alone | {"SLURM_MEM_PER_NODE": size} for size in ("1150", "6144")]
    words = [*RECIPE, "batching.hetero=per_node"]
    unequal = start("unequal", *words, model="clip", environ=nodes).finish()
    plan = json.loads((unequal.dir / "plan.json").read_text())
    little, much = plan["unequal"]
    assert 8 <= little < much and little + much == 512 == plan["global_batch_size"]
    assert plan["gradient_accumulation_steps"] == 1
    assert unequal.losses().keys() == equal.losses().keys() == {1, 2, 3}
    for step, losses in equal.losses().items():
        assert unequal.losses()[step] == pytest.approx(losses, rel=1e-4)
