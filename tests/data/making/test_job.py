"""Whole jobs: resumed, refused, short of disk, and the same bytes whatever happened on the way."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from data.made_shards import png
from data.raw_files import (
    bytes_in,
    jpeg,
    records_in,
    table_job,
    write_images,
    write_table,
)

from elip_ds.data.inspecting import inspect_shards
from elip_ds.data.making import Job, make_shards, one_shard
from elip_ds.data.shards import scan_shard, write_shards
from elip_ds.errors import UserError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "raw", 10)


@pytest.fixture
def job(table: Path, tmp_path: Path) -> Job:
    return table_job(table, tmp_path / "out", per_shard=4)


def skipped_lines(job: Job) -> list[str]:
    return (job.folder / "skipped.jsonl").read_text().splitlines()


def test_shards_hold_the_samples_in_order_with_an_index(job: Job) -> None:
    made = make_shards(job)
    assert (made.listed, made.shards, made.new_shards, made.samples) == (10, 3, 3, 10)
    assert (made.captions, made.skipped, made.renamed) == (10, {}, ())
    records = records_in(job.folder)
    assert [record.image for record in records] == [jpeg(i) for i in range(10)]
    assert [record.captions for record in records] == [(f"picture {i}",) for i in range(10)]
    assert records[0].meta == {"width": 24, "height": 16}
    shards = sorted(job.folder.glob("*.tar"))
    assert [len(scan_shard(path).entries) for path in shards] == [4, 4, 2]
    assert inspect_shards(shards, decode=True).problems == []
    index = json.loads((job.folder / "index.json").read_bytes())
    assert sum(entry["bytes"] for entry in index.values()) == made.bytes
    assert set(bytes_in(job.folder)) == {"index.json", *index}


def test_a_second_start_makes_nothing(job: Job) -> None:
    make_shards(job)
    before = {path: path.stat().st_mtime_ns for path in job.folder.glob("*.tar")}
    made = make_shards(job)
    assert (made.new_shards, made.samples) == (0, 10)
    assert {path: path.stat().st_mtime_ns for path in job.folder.glob("*.tar")} == before


@pytest.mark.parametrize("stop", range(1, 11))
def test_wherever_it_is_stopped_it_ends_with_the_same_bytes(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    class Stopped(BaseException):
        pass

    class Stopper:
        def __init__(self, what: str, total: int) -> None:
            self.left = stop

        def advance(self, count: int) -> None:
            self.left -= count
            if self.left == 0:
                raise Stopped

        skip = close = lambda self, count=0: None

    job = replace(job, dedup=True)
    make_shards(job)
    other = replace(job, folder=tmp_path / "stopped")
    for _ in range(4):  # in the search for duplicates, then in every shard that is left
        try:
            make_shards(other, show=Stopper)
        except Stopped:
            whole = list(other.folder.glob("*.tar"))
            if whole:
                assert inspect_shards(whole).problems == []
    make_shards(other)
    assert bytes_in(other.folder) == bytes_in(job.folder)


def test_a_shard_that_was_lost_is_made_again_alone(job: Job) -> None:
    make_shards(job)
    before = bytes_in(job.folder)
    job.shard(1).unlink()
    assert make_shards(job).new_shards == 1
    assert bytes_in(job.folder) == before


def test_dirt_is_left_out_and_named(job: Job, table: Path) -> None:
    folder = table.parent
    (folder / "1.jpg").unlink()
    (folder / "5.jpg").write_bytes(jpeg(5)[:-100])
    (folder / "6.jpg").write_bytes(b"<html>")
    with table.open("a") as file:
        file.write('{"image": "none.jpg", "caption": " "}\n')
    made = make_shards(job)
    assert made.skipped == {"no such file": 2, "cannot be decoded": 1, "no image": 1}
    assert [record.key for record in records_in(job.folder)] == [
        str(i) for i in (0, 2, 3, 4, 7, 8, 9)
    ]
    lines = [json.loads(line) for line in skipped_lines(job)]
    assert [(line["shard"], line["key"]) for line in lines] == [
        ("t-000000.tar", "1"),
        ("t-000001.tar", "5"),
        ("t-000001.tar", "6"),
        ("t-000002.tar", "none"),
    ]
    assert lines[0] == {
        "shard": "t-000000.tar",
        "key": "1",
        "reason": "no such file",
        "where": str(folder / "1.jpg"),
    }


def test_of_the_same_bytes_the_first_usable_stays(job: Job, table: Path) -> None:
    folder = table.parent
    for i, j in ((4, 0), (9, 0), (8, 3)):
        (folder / f"{i}.jpg").write_bytes(jpeg(j))
    rows = table.read_text().replace('"picture 3"', '" "')
    table.write_text(rows)
    made = make_shards(replace(job, dedup=True))
    assert made.skipped == {"duplicate": 2, "no caption": 1}
    assert [record.key for record in records_in(job.folder)] == [
        str(i) for i in (0, 1, 2, 5, 6, 7, 8)
    ]
    lines = [json.loads(line) for line in skipped_lines(job)]
    assert [line["reason"] for line in lines if line["key"] == "9"] == ["duplicate: of 0"]


def test_images_are_brought_down_and_say_what_they_were(tmp_path: Path) -> None:
    table = write_table(tmp_path / "raw", 2)
    (table.parent / "1.jpg").write_bytes(png(1, (80, 40)))
    job = table_job(table, tmp_path / "out", short_side=16)
    make_shards(job)
    first, second = records_in(job.folder)
    assert (first.image, first.meta) == (jpeg(0), {"width": 24, "height": 16})
    assert second.meta == {"width": 32, "height": 16, "original_size": [80, 40]}
    assert second.extension == "jpg"


def test_prefixes_share_an_index_and_a_list(job: Job, table: Path) -> None:
    (table.parent / "1.jpg").unlink()
    make_shards(job)
    make_shards(replace(job, prefix="other", per_shard=6))
    index = json.loads((job.folder / "index.json").read_bytes())
    assert len(index) == 3 + 2
    shards = [json.loads(line)["shard"] for line in skipped_lines(job)]
    assert shards == ["t-000000.tar", "other-000000.tar"]
    make_shards(job)
    assert len(skipped_lines(job)) == 2


# What is refused


def refusal(job: Job) -> str:
    with pytest.raises(UserError) as caught:
        make_shards(job)
    return str(caught.value)


def test_another_plan_is_refused(job: Job, table: Path) -> None:
    make_shards(job)
    before = bytes_in(job.folder)
    assert "of another plan (per_shard was 4, is 5)" in refusal(replace(job, per_shard=5))
    assert "(short_side was None, is 8)" in refusal(replace(job, short_side=8))
    table.write_text(table.read_text().replace("picture 3", "image 3"))
    assert "(other samples are listed: 10 then, 10 now)" in refusal(job)
    assert bytes_in(job.folder) == before


def test_foreign_shards_are_not_mixed_with(job: Job) -> None:
    write_shards([], job.folder, "t")
    (job.folder / "t-000007.tar").touch()
    assert "holds t-000007.tar already, and not its plan" in refusal(job)


def test_a_prefix_may_begin_as_another_one(job: Job) -> None:
    make_shards(replace(job, prefix=f"{job.prefix}-1"))
    assert make_shards(job).new_shards > 0


def test_a_finished_shard_that_changed_is_not_overwritten(job: Job) -> None:
    make_shards(job)
    with job.shard(1).open("ab") as file:
        file.write(bytes(512))
    assert "t-000001.tar has" in refusal(job) and "delete it, and it is made anew" in refusal(job)


def test_nothing_usable_is_an_error_that_may_be_mended(job: Job, table: Path) -> None:
    images = [path.rename(path.with_suffix(".away")) for path in table.parent.glob("*.jpg")]
    line = refusal(job)
    assert line.startswith("table: no sample can be used; the first, ")
    assert line.endswith("raw/0.jpg: no such file")
    for path in images:
        path.rename(path.with_suffix(".jpg"))
    assert make_shards(job).samples == 10


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    job = table_job(tmp_path / "x.jsonl", tmp_path / "out")
    assert refusal(job) == "table: the data set lists no sample"


def test_a_shard_of_dirt_stops_it(tmp_path: Path) -> None:
    table = write_table(tmp_path / "raw", 120)
    write_images(tmp_path / "other", "x.jpg")
    for i in range(5, 120):
        (table.parent / f"{i}.jpg").unlink()
    job = table_job(table, tmp_path / "out")
    line = refusal(job)
    assert line.startswith("t-000000.tar: 115 of 120 samples cannot be used, the first, ")
    assert list(job.folder.glob("*.tar")) == []
    assert make_shards(replace(job, max_bad_share=1.0)).samples == 5


def test_a_full_disk_is_one_line_and_can_be_resumed(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = one_shard.os.fsync, [2]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    make_shards(replace(job, prefix="whole"))
    with monkeypatch.context() as patched:
        patched.setattr(one_shard.os, "fsync", full)
        assert refusal(job) == f"--out {job.folder}: No space left on device"
    assert list(job.state.glob("*.partial")) == [] and list(job.folder.glob("t-*.tar")) == []
    make_shards(job)
    for i in range(3):
        whole = replace(job, prefix="whole").shard(i)
        assert job.shard(i).read_bytes() == whole.read_bytes()


def test_a_folder_that_cannot_be_made_is_one_line(job: Job) -> None:
    line = refusal(replace(job, folder=Path("/dev/null/x")))
    assert line == "--out /dev/null/x: Not a directory"
