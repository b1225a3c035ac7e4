"""Real photographs in every raw form, and back: the shards hold what the first ones held."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data.made_shards import write_tar
from data.raw_files import write_json

from elip_ds import registry
from elip_ds.data.making import Job, make_shards
from elip_ds.data.raw import open_raw
from elip_ds.data.record import Record
from elip_ds.data.shards import ShardReader

DATA = (Path(__file__).parents[3] / "../shared/data").resolve()
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
SOURCE = DATA / "openclipart/openclipart-val-000000.tar"  # one or two captions each


def records_of(path: Path) -> list[Record]:
    reader = ShardReader(path)
    return [reader.read(i) for i in range(len(reader))]


def write_files(records: list[Record], folder: Path, name: Callable[[Record], str]) -> None:
    for record in records:
        path = folder / name(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.image)


def file_name(record: Record) -> str:
    return f"{record.key}.{record.extension}"


def as_json_list(records: list[Record], folder: Path) -> list[str]:
    write_files(records, folder, file_name)
    entries = [{"image": file_name(r), "caption": c} for r in records for c in r.captions]
    path = write_json(folder / "list.json", entries)
    return [f"files={path}", f"images={folder}"]


def as_karpathy(records: list[Record], folder: Path) -> list[str]:
    write_files(records, folder, lambda record: f"val2014/{file_name(record)}")
    images = [
        {
            "filepath": "val2014",
            "filename": file_name(record),
            "split": "train",
            "sentences": [{"raw": caption} for caption in record.captions],
        }
        for record in records
    ]
    path = write_json(folder / "dataset.json", {"images": images, "dataset": "coco"})
    return [f"file={path}", f"images={folder}"]


def as_visual_genome(records: list[Record], folder: Path) -> list[str]:
    write_files(records, folder, lambda record: f"VG_100K/{int(record.key)}.jpg")
    entries = [
        {"id": int(record.key), "regions": [{"phrase": caption} for caption in record.captions]}
        for record in records
    ]
    path = write_json(folder / "region_descriptions.json", entries)
    return [f"file={path}", f"images={folder}"]


def as_table(records: list[Record], folder: Path) -> list[str]:
    write_files(records, folder, file_name)
    with (folder / "x.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["image", "caption"])
        out.writerows([file_name(r), c] for r in records for c in r.captions)
    return [f"files={folder}/x.csv"]


def as_img2dataset(records: list[Record], folder: Path) -> list[str]:
    members = [
        member
        for record in records
        for member in (
            (f"{record.key}.jpg", record.image),
            (f"{record.key}.json", json.dumps({"status": "success"}).encode()),
            (f"{record.key}.txt", record.captions[0].encode()),
        )
    ]
    folder.mkdir()
    write_tar(folder / "00000.tar", members)
    return [f"folder={folder}"]


def as_arrow(records: list[Record], folder: Path) -> list[str]:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(
        {
            "image": [record.image for record in records],
            "caption": [list(record.captions) for record in records],
            "image_id": [file_name(record) for record in records],
            "split": ["train" for _ in records],
        }
    )
    folder.mkdir()
    path = folder / "x.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    return [f"files={path}"]


def as_shards(records: list[Record], folder: Path) -> list[str]:
    return [f"shards={SOURCE}"]


FORMS = {
    "albef_json": as_json_list,
    "arrow": as_arrow,
    "img2dataset": as_img2dataset,
    "karpathy": as_karpathy,
    "shards": as_shards,
    "table": as_table,
    "visual_genome": as_visual_genome,
}


def test_no_form_is_left_out() -> None:
    assert set(FORMS) == set(registry.SOURCES) - {"scenes"}  # which are drawn


@pytest.mark.parametrize("kind", FORMS)
def test_the_shards_hold_what_the_raw_form_held(kind: str, tmp_path: Path) -> None:
    records = records_of(SOURCE)
    source = open_raw(kind, FORMS[kind](records, tmp_path / "raw"))
    job = Job(kind, source.config, tmp_path / "out", "x", per_shard=30)
    made = make_shards(job)
    assert (made.samples, made.shards, made.skipped) == (100, 4, {})
    found = [record for i in range(4) for record in records_of(job.shard(i))]
    assert [record.image for record in found] == [record.image for record in records]
    expected = [tuple(caption.strip() for caption in record.captions) for record in records]
    if kind == "img2dataset":  # which knows one
        expected = [captions[:1] for captions in expected]
    assert [record.captions for record in found] == expected
    sizes = [(record.meta["width"], record.meta["height"]) for record in records]
    assert [(record.meta["width"], record.meta["height"]) for record in found] == sizes
