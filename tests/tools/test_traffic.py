"""The closed form of what a rank sends, in cases that can be counted by hand."""

import pytest
from traffic import Sizes, Step, sent_bytes, sizes_of

SIZES = Sizes(trained=1000, frozen=600, small_trained=100, small_frozen=50)


def test_sizes_are_added_up_by_kind():
    parameters = [(100_000, True), (100_001, True), (7, False), (200_000, False)]
    assert sizes_of(parameters) == Sizes(200_001, 200_007, 100_000, 7)


@pytest.mark.parametrize(
    ("stage", "gradients", "weights"),
    [
        # 4 ranks: 3/4 of the whole, twice for an all-reduce; 4 bytes an element, 3 micro-batches
        (0, 6000, 0),
        (1, 6000, 3000),
        (2, 3 * 6000, 3000),
        (3, 3 * 3000, 3 * (3 * (900 + 550) + (100 + 2 * 50))),
    ],
)
def test_each_stage_sends_its_share(stage, gradients, weights):
    step = Step(stage, 4, weight_bytes=4, accumulation=3, batch=2, width=8)
    features = 3 * (3 * 2 * 2 * 8 * 4)  # to three others, by three micro-batches
    expected = {"gradients": gradients, "weights": weights, "features": features}
    assert sent_bytes(SIZES, step) == pytest.approx(expected)


def test_one_rank_sends_nothing():
    for stage in range(4):
        assert not any(sent_bytes(SIZES, Step(stage, 1)).values())


def test_gloo_scatters_at_the_price_of_an_all_reduce():
    step = Step(3, 2, weight_bytes=4)
    assert sent_bytes(SIZES, step, gloo=True)["gradients"] == 4000
    assert sent_bytes(SIZES, step)["gradients"] == 2000
