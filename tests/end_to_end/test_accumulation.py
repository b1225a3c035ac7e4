"""CLIP in micro-batches trains as in whole batches, on any ranks, at every ZeRO stage.

Real runs on two ranks: 16 samples a step, in one micro-batch of 8 each or in four of 2.
"""

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = ("batching.global_batch_size=16", "schedule.length=160 samples", "run.on_finish=nothing")
FOUR = "batching.micro_batch_size=2"
# Adam's eps so large that a step is the gradient's length, as in SGD: divided by its own size, the
# rounding noise in a gradient that ought to be zero (of the keys' biases) would be a step, too.
SGD = ("optim.lr=0.1", "optim.eps=1.0")


def relative(a, b):
    """The largest relative difference of two runs' losses."""
    losses, expected = a.losses(), b.losses()
    assert losses.keys() == expected.keys() and len(losses) == 10
    return max(
        abs(losses[s][n] - expected[s][n]) / abs(expected[s][n])
        for s in expected
        for n in expected[s]
    )


def apart(a, b):
    """The largest difference of two runs' last weights."""
    weights, expected = (load_file(job.newest() / "weights.safetensors") for job in (a, b))
    assert weights.keys() == expected.keys()
    return max((weights[n] - expected[n]).abs().max().item() for n in expected)


@pytest.fixture(scope="module")
def whole(start):
    """One micro-batch on one rank, plain data parallel."""
    return start("whole", *STEPS, *SGD, ranks=1, json="z0", model="clip").finish()


@pytest.mark.parametrize("json", ["z0", "z1", "z2", "z3"])
def test_four_micro_batches_on_two_ranks_train_as_one_batch_on_one(start, whole, json):
    job = start(f"four-{json}", *STEPS, *SGD, FOUR, json=json, model="clip").finish()
    assert relative(job, whole) < 1e-5
    assert apart(job, whole) < 1e-5


def test_without_the_cache_it_is_another_loss(start, whole):
    words = (*STEPS, *SGD, FOUR, "objectives.contrastive.cache=false")
    job = start("uncached", *words, model="clip").finish()
    assert job.losses()[1]["contrastive"] < 0.8 * whole.losses()[1]["contrastive"]


def test_bf16_in_micro_batches_follows_bf16_in_one(start):
    words = (*STEPS, "engine.precision=bf16")
    one = start("half", *words, json="z3", model="clip").finish()
    four = start("half-four", *words, FOUR, json="z3", model="clip").finish()
    assert relative(four, one) < 0.01
