"""A global batch is made of whole micro-batches, or the nearest that is gets named."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.batching import Plan, plan_batch
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
