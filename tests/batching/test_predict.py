"""A prediction's parts add up, and the largest micro-batch that fits is found in a few traces."""

import math

from hypothesis import given
from hypothesis import strategies as st

from elip_ds.batching.memory import Peaks
from elip_ds.batching.predict import AT_WORK, largest_fitting, predict
from elip_ds.batching.trace import Traced

HELD = {"parameters": 3_000_000, "optimizer": 5_000_000}


def traced(size: int, slopes=(90_000, 70_000, 10), offsets=(0, 2_000_000, 100)) -> Traced:
    peaks = Peaks(*(a + s * size for a, s in zip(offsets, slopes, strict=True)))
    return Traced(size, peaks, {"vision": 60_000 * size, "text": 20_000 * size})


def test_parts_add_up_to_the_highest_peak():
    prediction = predict(traced(8), HELD)
    assert prediction.peaks == Peaks(8_720_000, 10_560_000, 8_000_180)
    assert sum(prediction.parts.values()) == 10_560_000
    assert prediction.parts["activations, vision"] == 480_000
    assert prediction.parts[AT_WORK] == 10_560_000 - 8_000_000 - 640_000


@given(
    budget=st.integers(0, 10**8),
    slopes=st.tuples(st.integers(1000, 10**6), st.integers(1000, 10**6)),
    offset=st.integers(0, 10**8),
    at_most=st.integers(1, 300),
)
def test_the_answer_is_the_largest_that_fits(budget, slopes, offset, at_most):
    def predict_at(size: int):
        return predict(traced(size, (*slopes, 0), (0, offset, 0)), HELD)

    best, seen = largest_fitting(predict_at, budget, at_most=at_most, max_traces=99)
    fits = [n for n in range(1, at_most + 1) if predict_at(n).peaks.highest <= budget]
    assert (best and best.micro_batch_size) == max(fits, default=None)
    assert len({p.micro_batch_size for p in seen}) == len(seen)  # none was traced twice


@given(st.integers(8_300_000, 10**9), st.integers(1, 6))
def test_few_traces_never_give_what_does_not_fit(budget, max_traces):
    best, seen = largest_fitting(
        lambda size: predict(traced(size), HELD), budget, at_most=10**6, max_traces=max_traces
    )
    assert len(seen) <= max_traces
    truth = min((budget - 8_000_000) // 90_000, math.floor((budget - 10_000_000) / 70_000))
    assert best is None or (best.peaks.highest <= budget and best.micro_batch_size <= truth)


def test_four_traces_are_enough_where_a_step_grows_as_ours_do():
    best, seen = largest_fitting(lambda n: predict(traced(n), HELD), 30_000_000, at_most=4096)
    assert best is not None and best.micro_batch_size == 244
    assert len(seen) <= 4
