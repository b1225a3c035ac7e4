"""Sizes in bytes: binary and decimal units, none guessed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.batching.sizes import UNITS, is_size, parse_bytes, show_bytes
from elip_ds.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("24gb", 24 * 10**9),
        (" 1.5 MiB ", 3 * 2**19),
        ("0B", 0),
        ("512kB", 512_000),
    ],
)
def test_a_number_and_a_unit(text: str, count: int) -> None:
    assert is_size(text)
    assert parse_bytes(text, "batching.headroom_bytes") == count


@pytest.mark.parametrize(
    "text", ["", "24", "24G", "GiB", "-1GiB", "1e3GiB", "24 GiB free", "1,5GiB"]
)
def test_anything_else_names_the_key_and_the_units(text: str) -> None:
    with pytest.raises(UserError, match=r"^batching\.device_memory=.* kB, MB, .* such as 24GiB$"):
        parse_bytes(text, "batching.device_memory")


def test_people_read_gibibytes() -> None:
    assert show_bytes(int(23.7 * 2**30)) == "23.70 GiB"
    assert show_bytes(2**29) == "512.0 MiB"
    assert show_bytes(-(2**31)) == "-2.00 GiB"


@settings(derandomize=True)
@given(st.integers(0, 2**50))
def test_what_is_shown_reads_back_within_its_digits(count: int) -> None:
    shown = show_bytes(count)
    step = UNITS[shown.split()[1]] / (10 if "MiB" in shown else 100)
    assert abs(parse_bytes(shown, "x") - count) <= step / 2 + 1
