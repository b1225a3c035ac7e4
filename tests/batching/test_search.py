"""The search on made-up curves: never above the limit, close to it where the curve is affine."""

import pytest
from batching.curves import GB, Node, affine, bent, stepped, true_maximum
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elip_ds.batching import Outcome, Peaks, find_micro_batch, micro_batches
from elip_ds.batching.search import LADDER, REACH, NothingFits
from elip_ds.errors import UserError

CASES = settings(deadline=None, derandomize=True, max_examples=50)
ANY_SIZE = range(1, 5000)
BUDGET = 2 * GB
STATES = st.floats(0.05 * GB, 1.2 * GB)
"Up to 0.6 of the budget, 0.72 while the backward pass runs."
LIMITS = st.integers(64, 600)
GUESSES = st.one_of(st.none(), st.floats(0.7, 1.3))
NOISE = 0.003


def curve_with_limit(limit: int, states: float, share: float):
    """Affine, with BUDGET reached half a sample after limit; backward's share of the growth."""
    growth = (BUDGET - states) / (limit + 0.5)
    return affine(min(share * growth, (BUDGET - 1.2 * states) / (limit + 0.5)), growth, states)


def guess_of(limit: int, share: float | None) -> int | None:
    return None if share is None else max(1, round(share * limit))


@CASES
@given(LIMITS, STATES, st.floats(0.1, 1), GUESSES)
def test_without_noise_one_verification_finds_the_limit(
    limit: int, states: float, share: float, guess: float | None
) -> None:
    curve = curve_with_limit(limit, states, share)
    node = Node(curve, BUDGET)
    answer = find_micro_batch(
        node.measure, node.verify, BUDGET, ANY_SIZE, guess=guess_of(limit, guess)
    )
    assert true_maximum(curve, BUDGET) == limit
    assert limit - 1 <= answer.micro_batch_size <= limit
    assert answer.tries == len(node.verified) == 1
    assert answer.verified and answer.verified.micro_batch_size == answer.micro_batch_size
    assert answer.fit.trusted and not answer.warnings
    sizes = [size for group in node.measured for size in group]
    assert len({*sizes}) == len(sizes)


@CASES
@given(LIMITS, STATES, st.floats(0.1, 1), GUESSES, st.integers(0, 10**6))
def test_under_noise_it_stays_below_the_limit_and_within_three_percent(
    limit: int, states: float, share: float, guess: float | None, seed: int
) -> None:
    node = Node(curve_with_limit(limit, states, share), BUDGET, noise=NOISE, seed=seed)
    answer = find_micro_batch(
        node.measure, node.verify, BUDGET, ANY_SIZE, guess=guess_of(limit, guess)
    )
    assert 0.97 * limit <= answer.micro_batch_size <= limit
    assert answer.micro_batch_size in node.verified


@CASES
@given(st.integers(1, 63), STATES, st.floats(0.1, 1), st.integers(0, 10**6))
def test_a_small_limit_is_missed_by_one_or_a_tenth(
    limit: int, states: float, share: float, seed: int
) -> None:
    node = Node(curve_with_limit(limit, states, share), BUDGET, noise=NOISE, seed=seed)
    answer = find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE)
    assert min(limit - 1, 0.9 * limit) <= answer.micro_batch_size <= limit


@CASES
@given(LIMITS, STATES, st.floats(1e6, 20e6), st.integers(0, 10**6))
def test_an_allocator_s_steps_cost_at_most_a_tenth(
    limit: int, states: float, step_bytes: float, seed: int
) -> None:
    curve = stepped(curve_with_limit(limit, states, 0.5), round(step_bytes))
    limit = true_maximum(curve, BUDGET)
    node = Node(curve, BUDGET, noise=0.001, seed=seed)
    answer = find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE)
    assert 0.9 * limit <= answer.micro_batch_size <= limit


@CASES
@given(st.integers(30, 300), st.floats(2e6, 10e6), GUESSES)
def test_a_bend_is_noticed_and_the_limit_found_by_trying(
    at_double: int, per_sample: float, guess: float | None
) -> None:
    curve = bent(per_sample, at_double)
    limit = true_maximum(curve, BUDGET)
    assume(limit >= 64 and limit > at_double / 4)
    node = Node(curve, BUDGET)
    answer = find_micro_batch(
        node.measure, node.verify, BUDGET, ANY_SIZE, guess=guess_of(limit, guess)
    )
    assert 0.85 * limit <= answer.micro_batch_size <= limit
    assert answer.warnings or not answer.fit.trusted


@CASES
@given(
    LIMITS,
    st.one_of(st.floats(1.1, 1.5), st.floats(0.6, 0.9)),
    st.integers(0, 2),
    st.integers(0, 10**6),
)
def test_one_reading_far_off_is_noticed_and_costs_tries_only(
    limit: int, factor: float, which: int, seed: int
) -> None:
    size = max(1, limit // 16) << which
    curve = curve_with_limit(limit, 0.5 * GB, 0.5)
    node = Node(curve, BUDGET, noise=0.001, seed=seed, outliers={size: factor})
    answer = find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE, guess=limit)
    assert 0.9 * limit <= answer.micro_batch_size <= limit
    assert answer.warnings


@CASES
@given(LIMITS, STATES, st.sampled_from([0.02, 0.1, 3, 10]), st.integers(0, 10**6))
def test_a_guess_that_is_far_off_does_no_harm(
    limit: int, states: float, times: float, seed: int
) -> None:
    node = Node(curve_with_limit(limit, states, 0.5), BUDGET, noise=0.001, seed=seed)
    answer = find_micro_batch(
        node.measure, node.verify, BUDGET, ANY_SIZE, guess=max(1, round(times * limit))
    )
    assert 0.95 * limit <= answer.micro_batch_size <= limit


@CASES
@given(LIMITS, st.floats(0.92, 1.2), st.floats(0, 0.5 * GB))
def test_a_plan_s_curve_finds_the_limit_of_a_bend_at_once(
    at_double: int, factor: float, uncounted: float
) -> None:
    planned = bent(4e6, at_double)

    def real(b: int) -> Peaks:
        return Peaks(*[round(uncounted + factor * planned(b).forward)] * 3)

    limit = true_maximum(real, BUDGET)
    guess = true_maximum(planned, BUDGET)
    assume(guess >= 64)
    node = Node(real, BUDGET)
    answer = find_micro_batch(
        node.measure, node.verify, BUDGET, ANY_SIZE, guess=guess, shape=planned
    )
    assert limit - 1 <= answer.micro_batch_size <= limit
    assert answer.tries == 1 and len(node.measured) == 1


@CASES
@given(st.integers(2, 300), st.integers(0, 10**6))
def test_no_try_reaches_far_beyond_what_ran(limit: int, seed: int) -> None:
    """Memory that hardly grows at first looks endless; a huge batch is no way to find out."""
    curve = affine(1.0, (BUDGET - 1.9 * GB) / (limit + 0.5), states=1.6 * GB)
    node = Node(curve, BUDGET, noise=0.01, seed=seed)
    answer = find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE)
    ran = 1 << (LADDER - 1)
    for point in answer.points:
        assert point.micro_batch_size <= REACH * ran
        if point.peaks:
            ran = max(ran, point.micro_batch_size)


def test_a_wanted_size_that_the_line_allows_is_verified_at_once() -> None:
    node = Node(affine(5e6, 8e6), BUDGET)
    answer = find_micro_batch(node.measure, node.verify, BUDGET, range(1, 51))
    assert answer.micro_batch_size == 50
    assert (node.measured, node.verified) == ([[1, 2, 4, 8, 16]], [50])


def test_a_plan_with_room_to_spare_is_only_verified() -> None:
    node = Node(affine(5e6, 8e6), BUDGET)
    answer = find_micro_batch(node.measure, node.verify, BUDGET, range(1, 51), guess=180)
    assert answer.micro_batch_size == 50
    assert (node.measured, node.verified) == ([], [50])


def test_a_plan_that_was_wrong_about_that_is_measured() -> None:
    curve = affine(5e6, 40e6)
    node = Node(curve, BUDGET)
    answer = find_micro_batch(node.measure, node.verify, BUDGET, range(1, 51), guess=500)
    assert answer.micro_batch_size == true_maximum(curve, BUDGET) == 37
    assert node.verified == [50, 37]


def test_a_plan_without_room_to_spare_is_measured_first() -> None:
    node = Node(affine(5e6, 8e6), BUDGET)
    find_micro_batch(node.measure, node.verify, BUDGET, range(1, 51), guess=52)
    assert (node.measured, node.verified) == ([[3, 6, 12]], [50])


def test_a_wanted_size_close_to_the_limit_is_verified_at_once_under_noise_too() -> None:
    for seed in range(20):
        node = Node(affine(5e6, 8e6), BUDGET, noise=0.005, seed=seed)
        answer = find_micro_batch(node.measure, node.verify, BUDGET, range(1, 181), guess=185)
        if answer.fit.predict(180).highest <= BUDGET:
            assert node.verified[0] == 180


def test_a_single_size_that_ran_is_joined_by_smaller_ones() -> None:
    """Twice as many ran out of memory, and one point makes no line."""
    node = Node(affine(1e6, 2.5e6, states=1.1 * GB), BUDGET)
    limit = true_maximum(node.curve, BUDGET)
    answer = find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE, guess=9 * limit)
    ran = 9 * limit // 16
    few = Node(node.curve, BUDGET)
    find_micro_batch(few.measure, few.verify, BUDGET, range(60, 5000), guess=9 * limit)
    assert ran // 4 < 60 and few.measured[1] == [ran // 2]
    assert node.measured == [[ran, 2 * ran, 4 * ran], [ran // 4, ran // 2]]
    assert answer.micro_batch_size == limit
    assert answer.tries == 1


def test_a_reading_above_the_budget_that_is_far_off_limits_nothing() -> None:
    node = Node(affine(5e6, 8e6), BUDGET)
    limit = true_maximum(node.curve, BUDGET)

    def disturbed(sizes):
        *others, last = node.measure(sizes)
        return [*others, Outcome(last.micro_batch_size, Peaks(*[round(1.5 * BUDGET)] * 3))]

    answer = find_micro_batch(disturbed, node.verify, BUDGET, ANY_SIZE, guess=limit)
    assert 0.9 * limit <= answer.micro_batch_size <= limit
    assert "off a line" in answer.warnings[0]


@CASES
@given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 4), LIMITS)
def test_only_sizes_that_the_recipe_can_use_are_verified(
    share: int, ranks: int, least: int, limit: int
) -> None:
    assume(share >= least)
    sizes = micro_batches(share * ranks, world_size=ranks, min_micro_batch=least)
    node = Node(curve_with_limit(limit, 0.5 * GB, 0.5), BUDGET)
    usable = [size for size in sizes if size <= limit]
    if not usable:
        with pytest.raises(NothingFits):
            find_micro_batch(node.measure, node.verify, BUDGET, sizes)
        return
    answer = find_micro_batch(node.measure, node.verify, BUDGET, sizes)
    assert answer.micro_batch_size == usable[-1]
    assert {*node.verified} <= {*sizes}
    assert all(sizes[0] <= size <= sizes[-1] for group in node.measured for size in group)


def test_a_limit_that_nothing_enforces_is_kept_too() -> None:
    """Peaks above the budget are a failure although memory did not run out."""
    curve = affine(5e6, 8e6)
    enough = Node(curve, budget_bytes=100 * GB)
    answer = find_micro_batch(enough.measure, enough.verify, BUDGET, ANY_SIZE)
    assert answer.micro_batch_size == true_maximum(curve, BUDGET)


@CASES
@given(st.integers(1, 6), st.integers(30, 300))
def test_no_more_verifications_than_allowed(max_tries: int, at_double: int) -> None:
    curve = bent(5e6, at_double)
    node = Node(curve, BUDGET)
    answer = find_micro_batch(
        node.measure, node.verify, BUDGET, ANY_SIZE, guess=4000, max_tries=max_tries
    )
    assert answer.tries == len(node.verified) <= max_tries
    assert answer.micro_batch_size <= true_maximum(curve, BUDGET)
    assert (answer.verified is None) == any("no verification passed" in w for w in answer.warnings)


def test_a_size_that_only_longer_runs_break_is_not_given() -> None:
    """Verification is harder than measuring: more steps, captions of all lengths."""
    node = Node(affine(5e6, 8e6), BUDGET)

    def harder(size: int) -> Outcome:
        return node.verify(size) if size < 10 else Outcome(size, None, "no memory in step 5")

    answer = find_micro_batch(node.measure, harder, BUDGET, range(1, 17))
    assert answer.micro_batch_size == 9
    assert answer.warnings[0] == "micro-batch 16 was predicted to fit and did not"


def test_when_nothing_fits_it_says_what_would() -> None:
    curve = affine(5e6, 8e6, states=4 * GB)
    node = Node(curve, BUDGET)
    with pytest.raises(NothingFits) as unknown:
        find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE)
    assert unknown.value.needed_bytes is None
    with pytest.raises(UserError) as planned:
        find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE, guess=1, shape=curve)
    assert str(planned.value) == (
        "micro-batch 1 takes 4.48 GiB; the budget is 1.86 GiB per rank "
        "(rank 1 asked for 2 MiB in backward)"
    )
    with pytest.raises(NothingFits) as mistaken:
        find_micro_batch(node.measure, node.verify, BUDGET, ANY_SIZE, shape=affine(1e6, 1e6))
    assert mistaken.value.needed_bytes is None
    enough = Node(curve, 100 * GB)
    with pytest.raises(NothingFits) as read:
        find_micro_batch(enough.measure, enough.verify, BUDGET, [2, 4, 8])
    assert read.value.micro_batch_size == 2
    assert read.value.needed_bytes == curve(2).highest
