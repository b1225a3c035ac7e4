"""A global batch is made of whole micro-batches, or the nearest that is gets named."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.batching import (
    Plan,
    choose_micro_batch,
    micro_batches,
    next_smaller,
    plan_batch,
)
from elip_ds.batching.plan import better_batches
from elip_ds.errors import UserError

SIZES = st.integers(1, 4096)
RANKS = st.integers(1, 64)


def test_auto_gives_each_rank_its_whole_share() -> None:
    assert plan_batch(64, "auto", world_size=4) == Plan(16, 1, 4)


def test_a_small_micro_batch_is_accumulated() -> None:
    assert plan_batch(64, 4, world_size=2) == Plan(4, 8, 2)


@settings(deadline=None, derandomize=True)
@given(SIZES, st.one_of(st.just("auto"), st.integers(1, 128)), RANKS)
def test_it_divides_exactly_or_names_the_nearest(size: int, micro: int | str, ranks: int) -> None:
    step = ranks if micro == "auto" else int(micro) * ranks
    try:
        plan = plan_batch(size, micro, world_size=ranks)
    except UserError as error:
        assert size % step
        found = re.search(r"nearest: ([\d, ]+)$", str(error))
        assert found, error
        near = [int(number) for number in found[1].split(", ")]
        assert near == [n for n in (size - size % step, size - size % step + step) if n]
        for better in near:
            assert plan_batch(better, micro, world_size=ranks).global_batch_size == better
    else:
        assert plan.global_batch_size == size
        assert plan.world_size == ranks
        assert micro in ("auto", plan.micro_batch_size)
        assert micro != "auto" or plan.gradient_accumulation_steps == 1


def test_the_message_of_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError) as caught:
        plan_batch(1000, 24, world_size=8)
    assert str(caught.value) == (
        "batching.global_batch_size=1000 is not a multiple of micro_batch_size x world_size = "
        "24 x 8 = 192; nearest: 960, 1152"
    )


def test_the_objectives_least_micro_batch() -> None:
    with pytest.raises(
        UserError, match=r"batching.micro_batch_size=1: .* at least 2 .* 8 or more$"
    ):
        plan_batch(4, "auto", world_size=4, min_micro_batch=2)
    assert plan_batch(8, "auto", world_size=4, min_micro_batch=2).micro_batch_size == 2


SHARES = st.integers(1, 2000)
MULTIPLES = st.sampled_from([1, 2, 8, 16])


def choose(largest: int, batch: int | None, ranks: int = 1, **wishes: int) -> Plan:
    return choose_micro_batch(largest, batch, world_size=ranks, **wishes)


@settings(deadline=None, derandomize=True)
@given(SHARES, st.integers(1, 16), st.integers(1, 300), MULTIPLES)
def test_a_fixed_global_batch_is_met_exactly_by_what_fits(
    share: int, ranks: int, largest: int, multiple_of: int
) -> None:
    plan = choose(largest, share * ranks, ranks, multiple_of=multiple_of)
    assert plan.global_batch_size == share * ranks
    fitting = [size for size in range(1, min(share, largest) + 1) if share % size == 0]
    assert 0.75 * fitting[-1] <= plan.micro_batch_size <= fitting[-1]
    if plan.micro_batch_size != fitting[-1]:
        assert plan.micro_batch_size % multiple_of == 0 != fitting[-1] % multiple_of
    sizes = micro_batches(share * ranks, world_size=ranks)
    assert [size for size in sizes if size <= largest] == fitting


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 16), st.integers(1, 300), MULTIPLES, st.integers(16, 5000))
def test_a_free_global_batch_is_one_pass_of_what_fits(
    ranks: int, largest: int, multiple_of: int, max_global: int
) -> None:
    plan = choose(largest, None, ranks, multiple_of=multiple_of, max_global=max_global)
    assert plan.gradient_accumulation_steps == 1
    most = min(largest, max_global // ranks)
    assert plan.micro_batch_size == (most // multiple_of * multiple_of or most)


def test_the_multiple_gives_way_where_it_would_cost_too_much() -> None:
    assert choose(60, 240, multiple_of=8).micro_batch_size == 48  # not 60: four fifths
    assert choose(40, 72, multiple_of=8).micro_batch_size == 36  # not 24: two thirds
    assert choose(9, 27, multiple_of=8).micro_batch_size == 9  # there is none


def test_a_global_batch_with_no_divisor_that_fits_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        choose(50, 97 * 4, 4, min_micro_batch=2)
    assert str(caught.value) == (
        "batching.global_batch_size=388 needs micro-batches of 97 or more on 4 ranks, "
        "of which 50 fit; nearest: 376, 384, 392"
    )


def test_too_little_for_the_objectives_is_said() -> None:
    with pytest.raises(UserError, match=r"=64 needs micro-batches of 4 .* 3 fit; no other would"):
        choose(3, 64, min_micro_batch=4)
    with pytest.raises(UserError, match=r"=auto needs micro-batches of 4 .* 3 fit; no other would"):
        choose(3, None, min_micro_batch=4)
    with pytest.raises(UserError, match=r"max_global=8 leaves 1 .* of 8 ranks, .* at least 2: 16$"):
        choose(50, None, 8, min_micro_batch=2, max_global=8)
    with pytest.raises(UserError, match="does not divide among 8 ranks; nearest: 96, 104"):
        choose(50, 100, 8)


@settings(deadline=None, derandomize=True)
@given(SHARES, st.integers(1, 8), st.integers(1, 200), st.integers(1, 4))
def test_better_batches_use_three_quarters_and_are_the_nearest(
    share: int, ranks: int, largest: int, least: int
) -> None:
    plan = choose(largest, share * ranks, ranks)
    better = better_batches(plan, largest, least)
    used = [choose(largest, batch, ranks).micro_batch_size for batch in better]
    assert all(0.75 * largest <= size <= largest for size in used)
    if plan.gradient_accumulation_steps == 1 or plan.micro_batch_size >= 0.75 * largest:
        assert not better
    elif better:
        spread = max(abs(batch - share * ranks) for batch in better)
        between = range(share * ranks - spread + 1, share * ranks + spread)
        assert plan.global_batch_size not in better
        for batch in between:
            if batch > 0 and batch % ranks == 0 and batch not in better:
                sizes = micro_batches(batch, world_size=ranks)
                fit = [s for s in sizes if max(0.75 * largest, least) <= s <= largest]
                assert not fit
    else:
        assert least > largest


def test_better_batches_of_a_prime_share() -> None:
    assert better_batches(choose(50, 97 * 4, 4), 50) == [376, 384, 392]


@settings(deadline=None, derandomize=True)
@given(SHARES, st.integers(1, 8), st.integers(1, 200))
def test_the_next_smaller_keeps_the_global_batch(share: int, ranks: int, largest: int) -> None:
    plan = choose(largest, share * ranks, ranks)
    smaller = next_smaller(plan, plan.micro_batch_size)
    if smaller is None:
        assert plan.micro_batch_size == 1
    else:
        assert smaller.global_batch_size == plan.global_batch_size
        between = range(smaller.micro_batch_size + 1, plan.micro_batch_size)
        assert not [s for s in between if share % s == 0 and s <= 0.9 * plan.micro_batch_size]
        assert smaller.micro_batch_size <= 0.9 * plan.micro_batch_size


def test_a_step_down_frees_a_tenth_at_least() -> None:
    assert next_smaller(Plan(20, 19, 1), 20) == Plan(10, 38, 1)  # not 19 of 380
    assert next_smaller(Plan(20, 9, 1), 20) == Plan(18, 10, 1)


def test_nothing_is_smaller_than_the_objectives_need() -> None:
    assert next_smaller(Plan(4, 1, 2), 4, min_micro_batch=2) == Plan(2, 2, 2)
    assert next_smaller(Plan(2, 2, 2), 2, min_micro_batch=2) is None


def test_after_unequal_shares_all_ranks_take_the_same() -> None:
    plan = Plan(24, 1, 2, unequal=(24, 8))
    assert plan.global_batch_size == 32
    assert next_smaller(plan, failed=24) == Plan(16, 1, 2)
    assert next_smaller(plan, failed=8) == Plan(4, 4, 2)
    assert next_smaller(Plan(24, 1, 2, unequal=(24, 9)), failed=24) is None  # 33 for 2 ranks
