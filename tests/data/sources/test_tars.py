"""Shards as a source of shards."""

from pathlib import Path

import pytest
from data.made_shards import record

from elip_ds.data.raw import open_raw
from elip_ds.data.record import BadSample
from elip_ds.data.shards import write_shards


def test_records_come_back_in_order_of_the_patterns(tmp_path: Path) -> None:
    write_shards(map(record, range(3)), tmp_path, "b", per_shard=2)
    write_shards(map(record, range(3, 5)), tmp_path, "a")
    source = open_raw("shards", [f"shards={tmp_path}/b-*.tar::{tmp_path}/a-000000.tar"])
    items = list(source.items())
    assert [source.read(item) for item in items] == [record(i) for i in range(5)]
    assert source.read(items[0]) == record(0)  # in any order


def test_a_damaged_shard_is_one_bad_sample(tmp_path: Path) -> None:
    (path,) = write_shards(map(record, range(3)), tmp_path, "x")
    path.write_bytes(path.read_bytes()[:1500])
    source = open_raw("shards", [f"shards={path}"])
    (item,) = source.items()
    assert item.key == "x-000000"
    with pytest.raises(BadSample, match=r"^not one sample of it is whole$"):
        source.read(item)


def test_of_a_cut_shard_the_whole_samples_are_listed_and_one_that_is_bad(tmp_path: Path) -> None:
    (path,) = write_shards(map(record, range(3)), tmp_path, "x")
    path.write_bytes(path.read_bytes()[:-9000])
    source = open_raw("shards", [f"shards={path}"])
    *items, lost = source.items()
    assert [source.read(item) for item in items] == [record(0), record(1)]
    with pytest.raises(BadSample, match="its shard ends too early"):
        source.read(lost)


def test_a_shard_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    write_shards(map(record, range(3)), tmp_path, "x")
    source = open_raw("shards", [f"shards={tmp_path}/x-*.tar"])
    items = list(source.items())
    write_shards(map(record, range(2)), tmp_path, "x")
    with pytest.raises(BadSample, match=r"its shard ends before it"):
        source.read(items[2])
