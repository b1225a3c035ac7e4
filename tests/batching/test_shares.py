"""Unequal shares of a pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.batching import Plan, choose_micro_batch, share_out
from elip_ds.batching.shares import deal
from elip_ds.errors import UserError

ROOMS = st.lists(st.integers(1, 60), min_size=1, max_size=6)
UNITS = st.sampled_from([1, 2, 8])
CASES = settings(deadline=None, derandomize=True, max_examples=300)


@CASES
@given(ROOMS, st.integers(1, 400), UNITS, st.integers(1, 4))
def test_what_is_dealt_adds_up_and_fits(rooms: list[int], total: int, unit: int, least: int):
    sizes = deal(total, rooms, unit, least)
    possible = [
        total % unit == 0,
        sum(room // unit * unit for room in rooms) >= total,
        total >= -(-least // unit) * unit * len(rooms),
        all(room // unit * unit >= least for room in rooms),
    ]
    assert (sizes is not None) == all(possible)
    if sizes is not None:
        assert sum(sizes) == total and all(size % unit == 0 for size in sizes)
        assert all(least <= size <= room for size, room in zip(sizes, rooms, strict=True))


@CASES
@given(ROOMS, UNITS)
def test_shares_are_in_proportion_to_what_fits(rooms: list[int], unit: int):
    total = sum(rooms) // 2
    sizes = deal(total, rooms, 1, 0)
    assert sizes is not None
    exact = [total * room / sum(rooms) for room in rooms]
    assert all(abs(size - part) < 1 for size, part in zip(sizes, exact, strict=True))


@CASES
@given(ROOMS, st.integers(1, 40), UNITS)
def test_it_never_takes_more_passes_than_equal_shares(rooms: list[int], share: int, unit: int):
    batch = share * len(rooms)
    equal = choose_micro_batch(min(rooms), batch, world_size=len(rooms))
    plan = share_out(rooms, batch, multiple_of=unit)
    assert plan.global_batch_size == batch
    assert plan.gradient_accumulation_steps <= equal.gradient_accumulation_steps
    assert all(size <= room for size, room in zip(plan.micro_batches, rooms, strict=True))


@CASES
@given(ROOMS, UNITS, st.integers(6, 300) | st.none())
def test_a_free_batch_is_one_pass_of_all_that_fits(
    rooms: list[int], unit: int, most: int | None
) -> None:
    plan = share_out(rooms, None, multiple_of=unit, max_global=most)
    limit = sum(rooms) if most is None else min(sum(rooms), most)
    assert plan.gradient_accumulation_steps == 1
    assert limit - unit * len(rooms) < plan.global_batch_size <= limit


def test_equal_ranks_have_a_plan_without_shares():
    assert share_out([40, 40], 64, multiple_of=8) == Plan(32, 1, 2)


def test_the_wish_for_multiples_gives_way():
    assert share_out([40, 8], 45, multiple_of=8) == Plan(37, 1, 2, unequal=(37, 8))


def test_a_batch_that_cannot_be_shared_out_names_the_nearest():
    with pytest.raises(
        UserError, match=r"=53 cannot be shared out: 30 \+ 20 .*nearest: 48, 49, 50"
    ):
        share_out([30, 20], 53, min_micro_batch=2)
    with pytest.raises(UserError, match=r"=64 .* 60 \+ 1 samples fit, each rank needs 2"):
        share_out([60, 1], 64, min_micro_batch=2)
