"""The order of samples: an endless sequence that no rank, worker or batch size changes."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.data.order import Place, SampleOrder, SourceSize, rank_batches

CASES = settings(deadline=None, derandomize=True, max_examples=50)

SHARDS = st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple)
WEIGHTS = st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.7, 2.0, 3.5])
SOURCES = st.lists(st.builds(SourceSize, SHARDS, WEIGHTS), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32 - 1)
WINDOWS = st.integers(1, 7)


def sequence(order: SampleOrder, start: int, count: int) -> list[Place]:
    return [order.place(position) for position in range(start, start + count)]


def epoch(order: SampleOrder, number: int) -> list[Place]:
    return sequence(order, number * order.samples_per_epoch, order.samples_per_epoch)


@CASES
@given(st.lists(SHARDS, min_size=1, max_size=3), SEEDS, WINDOWS, st.integers(0, 3))
def test_an_epoch_visits_every_sample_once(
    shards: list[tuple[int, ...]], seed: int, window: int, number: int
) -> None:
    order = SampleOrder([SourceSize(s) for s in shards], seed, window)
    visited = sorted((place.source, place.sample) for place in epoch(order, number))
    assert visited == [(i, j) for i, s in enumerate(shards) for j in range(sum(s))]
    assert {place.epoch for place in epoch(order, number)} == {number}


@CASES
@given(
    SOURCES, SEEDS, WINDOWS, st.integers(0, 40), st.lists(st.integers(1, 4), min_size=1, max_size=4)
)
def test_ranks_and_micro_batches_only_cut_the_sequence_up(
    sources: list[SourceSize], seed: int, window: int, start: int, micro: list[int]
) -> None:
    passes = 4
    streams = [
        rank_batches(
            SampleOrder(sources, seed, window),
            start,
            micro_batches=micro,
            rank=rank,
        )
        for rank in range(len(micro))
    ]
    read = [place for _ in range(passes) for stream in streams for place in next(stream)]
    assert read == sequence(SampleOrder(sources, seed, window), start, passes * sum(micro))


@CASES
@given(SOURCES, SEEDS, WINDOWS, st.integers(1, 6))
def test_visits_follow_the_weight_and_spread_evenly(
    sources: list[SourceSize], seed: int, window: int, epochs: int
) -> None:
    order = SampleOrder(sources, seed, window)
    visits = Counter((p.source, p.sample) for e in range(epochs) for p in epoch(order, e))
    for i, source in enumerate(sources):
        counts = [visits[i, j] for j in range(source.samples)]
        assert sum(counts) == epochs * max(1, round(source.weight * source.samples))
        assert max(counts) - min(counts) <= 1


def test_weight_2_visits_twice_an_epoch() -> None:
    order = SampleOrder([SourceSize((3, 4), 2.0), SourceSize((5,))], 0, 16)
    visits = Counter((place.source, place.sample) for place in epoch(order, 1))
    assert visits == {(0, i): 2 for i in range(7)} | {(1, i): 1 for i in range(5)}


def test_weight_one_half_visits_every_other_epoch() -> None:
    order = SampleOrder([SourceSize((4, 4), 0.5)], 0, 16)
    first, second = ({place.sample for place in epoch(order, e)} for e in (0, 1))
    assert len(first) == len(second) == 4
    assert first | second == set(range(8))


def test_sources_are_mixed() -> None:
    order = SampleOrder([SourceSize((50,)), SourceSize((50,))], 0, 16)
    labels = [place.source for place in epoch(order, 0)]
    assert 10 < sum(labels[:50]) < 40


def test_epochs_and_seeds_differ() -> None:
    def samples(seed: int, number: int) -> list[int]:
        order = SampleOrder([SourceSize((10, 10, 10))], seed, 16)
        return [place.sample for place in epoch(order, number)]

    orders = [samples(0, 0), samples(0, 1), samples(0, 2), samples(1, 0)]
    assert len({tuple(order) for order in orders}) == 4
    assert samples(0, 1) == orders[1]


@CASES
@given(SOURCES, SEEDS, WINDOWS, st.integers(0, 30), st.integers(0, 5))
def test_seeking_equals_skipping(
    sources: list[SourceSize], seed: int, window: int, start: int, skipped: int
) -> None:
    def batches(at: int, order: SampleOrder) -> list[list[Place]]:
        stream = rank_batches(order, at, micro_batches=(2, 2, 2), rank=1)
        return list(islice(stream, skipped + 3))

    order = SampleOrder(sources, seed, window)
    batches(1000, order)  # where it read before leaves no trace
    there = batches(start + 6 * skipped, order)
    assert there[:3] == batches(start, SampleOrder(sources, seed, window))[skipped:]


@pytest.mark.parametrize("window", [1, 2, 4])
def test_reading_stays_among_a_window_of_shards(window: int) -> None:
    order = SampleOrder([SourceSize((5,) * 8)], 0, window)
    shards = [place.sample // 5 for place in epoch(order, 0)]
    for at in range(0, 40, 5 * window):
        assert len(set(shards[at : at + 5 * window])) == window
    dealt = list(dict.fromkeys(shards))
    assert dealt != sorted(dealt)
