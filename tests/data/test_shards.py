"""Records into tar shards and back; what is wrong with a shard is said in one line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_shards import count, png, record, write_tar

from elip_ds.config.schema import DataConfig
from elip_ds.data.corpus import build_fetcher
from elip_ds.data.record import BadSample, BadShard, Record
from elip_ds.data.shards import (
    INDEX,
    ShardReader,
    count_samples,
    expand_shards,
    scan_shard,
    write_shards,
)
from elip_ds.errors import UserError


def read_all(path: Path) -> list[Record]:
    reader = ShardReader(path)
    records = [reader.read(i) for i in range(len(reader))]
    reader.close()
    return records


def read_one(path: Path, *members: tuple[str, bytes]) -> Record:
    (only,) = read_all(write_tar(path, members))
    return only


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    (path,) = write_shards(map(record, range(6)), tmp_path, "train")
    return path


# There and back


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [record(number) for number in range(7)]
    records[3] = replace(records[3], captions=(" ünïcode, kept as it is \n",), extension="webp")
    paths = write_shards(iter(records), tmp_path, "train", per_shard=3)
    assert [path.name for path in paths] == [f"train-00000{i}.tar" for i in range(3)]
    assert [r for path in paths for r in read_all(path)] == records
    assert count(paths, "data.train") == [3, 3, 1]


@settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.from_regex(r"[^.\0/\ud800-\udfff]{1,150}", fullmatch=True).filter(
        lambda key: not key.startswith("__")
    ),
    st.binary(max_size=2000),
    st.lists(st.text().filter(str.strip), min_size=1, max_size=3).map(tuple),
)
def test_any_record_comes_back(
    tmp_path: Path, key: str, image: bytes, captions: tuple[str, ...]
) -> None:
    (path,) = write_shards([Record(key, image, "jpg", captions)], tmp_path, "any")
    assert read_all(path) == [Record(key, image, "jpg", captions)]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shards(map(record, range(3)), tmp_path / folder, "train")
    a, b = (tmp_path / folder / "train-000000.tar" for folder in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_no_records_give_no_shard(tmp_path: Path) -> None:
    assert write_shards([], tmp_path, "train") == []


def test_splits_share_an_index(tmp_path: Path) -> None:
    for prefix, number in (("train", 5), ("val", 2)):
        write_shards(map(record, range(number)), tmp_path, prefix, per_shard=4)
    index = json.loads((tmp_path / INDEX).read_text())
    assert {name: entry["samples"] for name, entry in index.items()} == {
        "train-000000.tar": 4, "train-000001.tar": 1, "val-000000.tar": 2
    }  # fmt: skip
    assert all(entry["bytes"] == (tmp_path / name).stat().st_size for name, entry in index.items())


def test_an_interrupted_writer_leaves_no_shard(tmp_path: Path) -> None:
    def broken() -> object:
        yield record(0)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_shards(broken(), tmp_path, "train")  # type: ignore[arg-type]
    assert list(tmp_path.glob("*.tar")) == []


# Counting


def test_a_fitting_index_is_believed(shard: Path) -> None:
    index = shard.parent / INDEX
    entry = {"samples": 99, "bytes": shard.stat().st_size}
    index.write_text(json.dumps({shard.name: entry}))
    assert count([shard], "data.train") == [99]


@pytest.mark.parametrize(
    "text",
    [
        '{"train-000000.tar": {"samples": 99, "bytes": 1}}',
        '{"train-000000.tar": {"samples": "99"}}',
        '{"train-000000.tar": {"samples": 99, "bytes": null}}',
        '{"train-000000.tar": 99}',
        "{}",
        "[]",
        "{",
        "\xff",
    ],
)
def test_an_index_that_does_not_fit_is_ignored(shard: Path, text: str) -> None:
    (shard.parent / INDEX).write_text(text, encoding="latin-1")
    assert count([shard], "data.train") == [6]


def test_an_index_that_does_not_answer_is_one_line(shard: Path) -> None:
    index = shard.parent / INDEX
    index.unlink()
    os.mkfifo(index)
    fetcher = build_fetcher(DataConfig(time_limit_seconds=0.2))
    with pytest.raises(UserError, match=rf"^data.train: {index} cannot be read: no answer within"):
        count_samples([shard], "data.train", fetcher)
    os.close(os.open(index, os.O_RDWR))  # now the thread that was left behind ends


def test_a_name_that_no_file_can_have_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^data.train: shard a+\.tar does not exist$"):
        expand_shards("a" * 300 + ".tar", "data.train")


def test_a_missing_index_is_done_without(shard: Path) -> None:
    (shard.parent / INDEX).unlink()
    assert count([shard], "data.train") == [6]


def test_an_unusable_index_is_written_anew(shard: Path) -> None:
    (shard.parent / INDEX).write_text("[")
    write_shards([record(9)], shard.parent, "val")
    assert list(json.loads((shard.parent / INDEX).read_text())) == ["val-000000.tar"]


# Finding


def test_patterns_find_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"x-{i:06d}.tar" for i in range(12)]
    for path in paths:
        path.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in ("x-{000000..000011}.tar", "x-*.tar", "x-0000{00..09}.tar::{D}/x-00001?.tar"):
        assert expand_shards(f"{tmp_path}/{pattern}".replace("{D}", str(tmp_path)), "k") == paths
    assert expand_shards("~/x-*.tar", "k") == paths
    assert expand_shards(str(paths[3]), "k") == [paths[3]]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "[a]*.tar"
    path.touch()
    assert expand_shards(str(path), "k") == [path]


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("x-{0..2}.tar", "data.val: shard {}/x-1.tar and 1 more does not exist"),
        ("y-*.tar", "data.val: no file matches {}/y-*.tar"),
        ("empty/*.tar", "data.val: no file matches {}/empty/*.tar"),
        ("empty", "data.val: {}/empty is a folder; name its shards, {}/empty/*.tar"),
        ("x-{0..2.tar", "data.val={}/x-{{0..2.tar: the braces do not fit: "),
        ("no/such/file.tar", "data.val: shard {}/no/such/file.tar does not exist"),
    ],
)
def test_what_a_pattern_does_not_find(tmp_path: Path, pattern: str, line: str) -> None:
    (tmp_path / "x-0.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        expand_shards(f"{tmp_path}/{pattern}", "data.val")
    assert str(caught.value).startswith(line.format(tmp_path, tmp_path))


# Damage


def end_of(shard: Path) -> int:
    """Where the last member's data end."""
    entries = scan_shard(shard).entries
    return max(offset + size for entry in entries for offset, size in entry.members.values())


def test_of_a_shard_cut_anywhere_the_whole_samples_are_left(shard: Path) -> None:
    (shard.parent / INDEX).unlink()
    data, (entries, whole) = shard.read_bytes(), scan_shard(shard)
    assert whole
    records = read_all(shard)
    end = -(-end_of(shard) // 512) * 512
    blocks = {*range(0, end + 512, 512), *range(100, end + 512, 700), end_of(shard) - 1, end + 511}
    for size in sorted(blocks):
        shard.write_bytes(data[:size])
        try:
            found, whole = scan_shard(shard)
        except BadShard as error:
            assert error.kind == "truncated"
            with pytest.raises(UserError) as caught:
                count([shard])
            line = str(caught.value)
            assert line.startswith(f"data.train: shard {shard} is damaged or no tar: ")
            assert "\n" not in line
        else:
            assert not whole and found == entries[: len(found)] and len(found) < len(entries)
            assert read_all(shard) == records[: len(found)]
            assert count([shard]) == [len(found)]
    for size in (end + 512, end + 1024, len(data)):  # all data and one end mark are there
        shard.write_bytes(data[:size])
        assert scan_shard(shard) == (entries, True)


def test_an_index_tells_how_many_a_cut_shard_has_lost(shard: Path) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    counted = count_samples([shard], "data.train", build_fetcher(DataConfig()))
    assert counted == ([6], [shard])
    reader = ShardReader(shard)
    assert 1 <= len(reader) < 6 and not reader.whole
    with pytest.raises(BadSample, match="its shard ends before it") as caught:
        reader.read(5)
    assert caught.value.kind == "truncated" and reader.key(5) == ""
    reader.close()


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=600))
def test_overwritten_bytes_raise_nothing_else(shard: Path, at: int, data: bytes) -> None:
    whole = shard.read_bytes()
    at %= len(whole)
    shard.write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        reader = ShardReader(shard)
        for i in range(len(reader)):
            try:
                reader.read(i)
            except BadSample as error:
                assert str(error)
        reader.close()
    except BadShard as error:
        assert error.kind == "truncated"
    finally:
        shard.write_bytes(whole)


@pytest.mark.parametrize("data", [b"", b"no tar", b"\x1f\x8b" + b"x" * 2000, b"\xff" * 5000])
def test_a_file_that_is_no_tar(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"^data.val: shard {path} is damaged or no tar: "):
        count([path], "data.val")


@pytest.mark.parametrize("members", [[], [("README", b"x")], [("__meta__.json", b"{}")]])
def test_a_shard_without_samples(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=rf"^data.train: shard {path} holds no sample$"):
        count([path], "data.train")


# Samples of others


IMAGE = ("a.png", png(0))


def test_a_text_file_is_the_caption(tmp_path: Path) -> None:
    only = read_one(tmp_path / "x.tar", IMAGE, ("a.txt", b" a dog \n"))
    assert only == Record("a", png(0), "png", ("a dog",))


@pytest.mark.parametrize(
    ("meta", "captions"),
    [
        (b'{"captions": ["a", "b"]}', ("a", "b")),
        (b'{"captions": ["a", "", null, 3]}', ("a",)),
        (b'{"captions": "a dog"}', ("a dog",)),
        (b'{"other": 1}', ("text",)),
        (b'{"captions": null}', ("text",)),
        (b"[1]", ("text",)),
        (b'{"captions": ["a \\ud83d dog"]}', ("a ? dog",)),  # half a surrogate pair
    ],
)
def test_the_json_s_captions_count_where_there_are_any(
    tmp_path: Path, meta: bytes, captions: tuple[str, ...]
) -> None:
    only = read_one(tmp_path / "x.tar", ("a.json", meta), IMAGE, ("a.txt", b"text"))
    assert only.captions == captions


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.txt", b"text")], "no image"),
        ([IMAGE], "no caption"),
        ([IMAGE, ("a.txt", b" \n")], "no caption"),
        # The caption that a set denies to be one, as nlvr-mini its false sentences.
        ([IMAGE, ("a.txt", b"text"), ("a.json", b'{"captions": []}')], "no caption"),
        ([IMAGE, ("a.txt", b"text"), ("a.json", b"{")], "its json is broken"),
        ([IMAGE, ("a.txt", b"text"), ("a.json", b"\xff\xfe")], "its json is broken"),
    ],
)
def test_a_sample_that_cannot_be_used(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    with pytest.raises(BadSample, match=f"^{reason}$"):
        read_one(tmp_path / "x.tar", *members)


def test_a_shard_that_shrinks_while_it_is_open(shard: Path) -> None:
    reader = ShardReader(shard)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(BadSample, match="its shard has become shorter"):
        reader.read(5)
    reader.close()


def test_captions_are_read_without_the_image(shard: Path) -> None:
    reader = ShardReader(shard)
    assert [reader.captions(i) for i in range(6)] == [record(i).captions for i in range(6)]
    reader.close()


def test_members_that_belong_to_no_sample_are_left_out(tmp_path: Path) -> None:
    members = [("README", b"x"), ("._a.png", b"x"), IMAGE, ("a.txt", b"t"), ("b.cls", b"3")]
    path = write_tar(tmp_path / "x.tar", [*members, ("in/c.jpg", b"j"), ("in/c.txt", b"t")])
    assert [entry.key for entry in scan_shard(path).entries] == ["a", "b", "in/c"]
