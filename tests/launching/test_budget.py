"""How much of a rank's memory is left free."""

from hypothesis import given
from hypothesis import strategies as st

from elip_ds.config.schema import BatchingConfig
from elip_ds.launching.budget import HEADROOM, HEADROOM_BYTES, REPEATS, left_free

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
