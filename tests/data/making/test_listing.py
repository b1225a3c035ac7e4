"""The plan: which sample is in which shard, and under which key."""

import io
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.data.making.listing import LONGEST_KEY, Keys, list_items, read_items, shard_ranges
from elip_ds.data.raw import Item, RawSource


class Given(RawSource):
    """A source that lists what it is given."""

    def items(self):
        yield from self.config


ITEMS = st.lists(
    st.builds(
        Item,
        st.text(max_size=20) | st.sampled_from(["a", "a.b", "a_b"]),
        st.text(max_size=9),
        st.lists(st.text(max_size=9), max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), st.integers() | st.none(), max_size=2),
        st.none() | st.integers(0, 9),
    ),
    max_size=30,
)


@given(st.integers(1, 500), st.integers(1, 40))
def test_every_sample_is_in_one_shard_and_only_the_last_is_smaller(
    samples: int, per_shard: int
) -> None:
    ranges = shard_ranges(samples, per_shard)
    assert [i for part in ranges for i in part] == list(range(samples))
    assert {len(part) for part in ranges[:-1]} <= {per_shard} and 1 <= len(ranges[-1]) <= per_shard


@settings(deadline=None, max_examples=50)
@given(ITEMS, st.integers(1, 7))
def test_any_part_of_a_listing_comes_back(
    tmp_path_factory, items: list[Item], per_shard: int
) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "listing"
    with path.open("wb") as out:
        listing = list_items(Given(items), out)
    assert listing.samples == len(items)
    parts = [
        list(read_items(path, int(listing.starts[part.start]), len(part)))
        for part in shard_ranges(len(items), per_shard)
    ]
    listed = [item for part in parts for item in part]
    assert [(i.where, i.captions, i.meta, i.at) for i in listed] == [
        (i.where, i.captions, i.meta, i.at) for i in items
    ]
    assert len({item.key for item in listed}) == len(items)
    assert len(listing.renamed) <= len(items)


@settings(deadline=None, max_examples=30)
@given(ITEMS, ITEMS)
def test_the_digest_tells_two_listings_apart(a: list[Item], b: list[Item]) -> None:
    one, other, again = (list_items(Given(items)) for items in (a, b, a))
    assert one.digest == again.digest
    assert (one.digest == other.digest) == (lines(a) == lines(b))


def lines(items: list[Item]) -> bytes:
    out = io.BytesIO()
    list_items(Given(items), out)
    return out.getvalue()


@given(st.lists(st.text(max_size=200), max_size=20))
def test_keys_are_names_of_tar_members_and_unique(raw: list[str]) -> None:
    keys = Keys()
    given_out = [keys.take(name) for name in raw]
    assert len(set(given_out)) == len(raw)
    for key in given_out:
        assert re.fullmatch(r"[A-Za-z0-9=+-][A-Za-z0-9_=+-]*", key) and not key.startswith("__")
        assert len(key) <= LONGEST_KEY + 4


def test_a_repeat_gets_a_number_that_is_free() -> None:
    keys = Keys()
    taken = [keys.take(name) for name in ("a", "a-2", "a", "a", "b.c", "b/c", "__x")]
    assert taken == ["a", "a-2", "a-3", "a-4", "b_c", "b_c-2", "x"]
    assert keys.renamed == ["a-3", "a-4", "b_c-2"]
