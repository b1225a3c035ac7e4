"""How much of a rank's memory is left free."""

from hypothesis import given
from hypothesis import strategies as st

from elip_ds.config.schema import BatchingConfig
from elip_ds.launching.budget import (
    HEADROOM,
    HEADROOM_BYTES,
    REPEATS,
    least_memory,
    left_free,
)

SIZES = st.integers(2**20, 2**37)


@given(usable=SIZES, share=st.floats(0, 0.99), least=st.integers(0, 2**34))
def test_the_larger_of_share_and_bytes_and_never_less_than_starts_differ(usable, share, least):
    batching = BatchingConfig(headroom=share, headroom_bytes=least)
    for device in ("cpu", "cuda"):
        free = left_free(batching, usable, device)
        assert free == max(int(share * usable), least, REPEATS[device])


@given(usable=SIZES)
def test_what_is_left_free_where_nothing_is_said(usable):
    batching = BatchingConfig()
    for device in ("cpu", "cuda"):
        free = left_free(batching, usable, device)
        assert free >= HEADROOM[device] * usable - 1 and free >= HEADROOM_BYTES[device]


def test_without_headroom_a_cpu_keeps_what_starts_differ_by():
    assert left_free(BatchingConfig(headroom=0, headroom_bytes=0), 2**30, "cpu") == 2**21


@given(
    taken=SIZES, outside=st.integers(0, 2**31), share=st.floats(0, 0.9), least=st.integers(0, 2**34)
)
def test_the_least_memory_that_would_do_does_and_nothing_less(taken, outside, share, least):
    batching = BatchingConfig(headroom=share, headroom_bytes=least)
    for device in ("cpu", "cuda"):
        found = least_memory(batching, taken + outside, outside, device)
        assert found - left_free(batching, found - outside, device) >= taken + outside
        less = found - 2  # a byte is lost where the share is rounded down
        assert less - left_free(batching, less - outside, device) < taken + outside
