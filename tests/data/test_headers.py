"""One scan of a shard's headers serves all who read it."""

import os
from pathlib import Path

import pytest
from made_shards import record

from elip_ds.data import headers
from elip_ds.data.headers import scan_once
from elip_ds.data.record import BadShard
from elip_ds.data.shards import scan_shard, write_shards


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shards(map(record, range(5)), tmp_path, "x")[0]


def test_the_second_look_reads_no_header(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan_once(shard, tmp_path / "notes")
    assert first == scan_shard(shard) and len(first.entries) == 5
    monkeypatch.setattr(headers, "scan_shard", lambda path: pytest.fail("scanned again"))
    assert scan_once(shard, tmp_path / "notes") == first


def test_another_file_of_the_same_name_is_scanned_anew(shard: Path, tmp_path: Path) -> None:
    scan_once(shard, tmp_path / "notes")
    write_shards(map(record, range(3)), tmp_path, "x")
    assert len(scan_once(shard, tmp_path / "notes").entries) == 3


def test_a_file_has_one_note_and_all_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    for count in (5, 3):
        (shard,) = write_shards(map(record, range(count)), tmp_path, "x")
        scan_once(shard, notes)
    (note,) = notes.iterdir()
    monkeypatch.setattr(headers, "MOST_BYTES", 3 * note.stat().st_size)
    monkeypatch.setattr(headers, "LOOKS", "")  # each note, not one in 256
    for i in range(5):
        write_shards(map(record, range(3)), tmp_path, f"y{i}")
        scan_once(tmp_path / f"y{i}-000000.tar", notes)
        assert sum(path.stat().st_size for path in notes.iterdir()) <= headers.MOST_BYTES
    assert scan_once(shard, notes) == scan_shard(shard)


def test_a_name_may_be_no_unicode(shard: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9 #1?.tar")
    shard.rename(odd)
    assert scan_once(odd, tmp_path / "notes") == scan_once(odd, tmp_path / "notes")


@pytest.mark.parametrize("note", [b"", b"[true]", b'[true, [["a", {"png": [1]}]]]', b"\xff"])
def test_a_broken_note_is_done_without(shard: Path, tmp_path: Path, note: bytes) -> None:
    scan_once(shard, tmp_path / "notes")
    (path,) = (tmp_path / "notes").iterdir()
    path.write_bytes(note)
    assert scan_once(shard, tmp_path / "notes") == scan_shard(shard)


def test_a_folder_that_cannot_be_made_costs_nothing(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert scan_once(shard, tmp_path / "file" / "notes") == scan_shard(shard)


def test_a_shard_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(BadShard) as caught:
        scan_once(tmp_path / "x.tar", tmp_path / "notes")
    assert caught.value.kind == "missing"
