"""Shards looked at."""

import json
from collections import Counter
from pathlib import Path

import pytest
from data.made_shards import png, record, write_tar
from data.raw_files import jpeg, table_job, write_table
from hypothesis import given
from hypothesis import strategies as st

from elip_ds.data.inspecting import inspect_shards, mean, quantile
from elip_ds.data.making import make_shards
from elip_ds.data.record import Record
from elip_ds.data.shards import INDEX, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    make_shards(table_job(write_table(tmp_path / "raw", 6), tmp_path / "out", per_shard=3))
    return sorted((tmp_path / "out").glob("*.tar"))


def test_what_is_in_shards_is_counted(tmp_path: Path) -> None:
    records = [
        Record("a", jpeg(0, (20, 10)), "jpg", ("a b c", "d")),
        Record("b", png(1, (30, 30)), "png", ("e",)),
        Record("c", png(1, (30, 30)), "png", ("f",)),
    ]
    found = inspect_shards(write_shards(records, tmp_path, "x", per_shard=2), decode=True)
    assert (found.samples, found.problems, found.repeated_images) == (3, [], 1)
    assert found.short_sides == {10: 1, 30: 2} and found.long_sides == {20: 1, 30: 2}
    assert found.aspects == {2.0: 1, 1.0: 2} and found.words == {3: 1, 1: 3}
    assert found.captions_per_image == {2: 1, 1: 2} and found.formats == {"JPEG": 1, "PNG": 2}


def test_any_changed_byte_is_found(shards: list[Path]) -> None:
    data = bytearray(shards[1].read_bytes())
    for place in (0, 700, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        shards[1].write_bytes(changed)
        problems = inspect_shards(shards).problems
        assert f"{shards[1]} is not what was written: its checksum differs" in problems
        assert not any(str(shards[0]) in problem for problem in problems)


def test_a_cut_shard_is_found(shards: list[Path]) -> None:
    size = shards[0].stat().st_size
    with shards[0].open("ab") as file:
        file.truncate(2000)
    first, second = inspect_shards(shards).problems
    assert first == f"{shards[0]} has 2000 bytes, {INDEX} says {size}"
    assert second.startswith(f"{shards[0]} is damaged or no tar: ")


def test_a_shard_that_is_gone_is_found_by_the_index(shards: list[Path]) -> None:
    shards[0].unlink()
    write_shards([record(0)], shards[0].parent, "other")  # another series is not asked for
    (shards[0].parent / "other-000000.tar").unlink()
    assert inspect_shards(shards[1:]).problems == [f"{shards[0]} is in {INDEX} and does not exist"]


def test_an_index_that_counts_otherwise_is_found(shards: list[Path]) -> None:
    path = shards[0].parent / INDEX
    index = json.loads(path.read_text())
    index[shards[0].name]["samples"] = 7
    path.write_text(json.dumps(index))
    assert inspect_shards(shards).problems == [f"{shards[0]} holds 3 samples, {INDEX} says 7"]


def test_unusable_samples_are_named(tmp_path: Path) -> None:
    members = [
        ("a.jpg", jpeg(0)),
        ("b.jpg", b"nothing"),
        ("b.txt", b"b"),
        ("c.jpg", jpeg(1, (90, 90))[:-500]),
        ("c.txt", b"c"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    no_caption, no_header = inspect_shards([path]).problems
    assert no_caption == f"{path}: sample a: no caption"
    assert no_header.startswith(f"{path}: sample b: its image has no readable header")
    assert len(inspect_shards([path], decode=True).problems) == 3


def test_a_key_that_comes_twice_is_a_problem(tmp_path: Path) -> None:
    paths = [*write_shards([record(1)], tmp_path, "a"), *write_shards([record(1)], tmp_path, "b")]
    assert inspect_shards(paths).problems == ["1 keys come twice or more"]


def test_thousands_of_problems_are_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"") for i in range(100)])
    problems = inspect_shards([path]).problems
    assert (len(problems), problems[-1]) == (21, f"{path}: and 80 more like these")


@given(st.lists(st.integers(0, 20), min_size=1), st.floats(0, 1))
def test_quantile_and_mean_are_those_of_the_sorted_list(values: list[int], share: float) -> None:
    counts = Counter(values)
    ordered = sorted(values)
    assert quantile(counts, share) == next(
        x for i, x in enumerate(ordered) if i + 1 >= share * len(ordered)
    )
    assert mean(counts) == pytest.approx(sum(values) / len(values))


def test_of_nothing_there_is_no_quantile() -> None:
    assert (quantile(Counter(), 0.5), mean(Counter())) == (None, 0)
