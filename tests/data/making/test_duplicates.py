"""Images with the same bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elip_ds.data.making.duplicates import DIGEST_BYTES, repeats


@given(st.lists(st.integers(0, 5), max_size=30))
def test_every_repeat_names_the_first(values: list[int]) -> None:
    hashes = np.zeros((len(values), DIGEST_BYTES), np.uint8)
    hashes[:, 3] = values  # 0 is unknown, and like nothing
    expected = [
        (i, values.index(value)) for i, value in enumerate(values) if value and value in values[:i]
    ]
    assert repeats(hashes) == expected
