"""img2dataset's output, in tars and in files."""

import json
from pathlib import Path

import pytest
from data.made_shards import write_tar
from data.raw_files import jpeg, read_source

from elip_ds.data.raw import open_raw
from elip_ds.data.record import BadSample
from elip_ds.errors import UserError

KEYS = ("000000000", "000000002", "000010001")  # what could not be downloaded is absent


def members(key: str, number: int) -> list[tuple[str, bytes]]:
    meta = {
        "caption": f"caption {key}",
        "url": f"http://x/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 24,
        "height": 16,
        "exif": "{}",
        "original_width": 240,
    }
    return [
        (f"{key}.jpg", jpeg(number)),
        (f"{key}.json", json.dumps(meta, indent=4).encode()),
        (f"{key}.txt", f"caption {key}".encode()),
    ]


@pytest.fixture(params=["webdataset", "files"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shards: dict[str, list[tuple[str, bytes]]] = {}
    for number, key in enumerate(KEYS):
        shards.setdefault(key[:5], []).extend(members(key, number))
    for name, inside in shards.items():
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{name}_stats.json").write_text("{}")
        if request.param == "webdataset":
            write_tar(tmp_path / f"{name}.tar", inside)
        else:
            (tmp_path / name).mkdir()
            for member, data in inside:
                (tmp_path / name / member).write_bytes(data)
    return tmp_path


def test_both_forms_give_the_same_samples(folder: Path) -> None:
    records = read_source("img2dataset", f"folder={folder}")
    assert [record.key for record in records] == list(KEYS)
    assert [record.captions for record in records] == [(f"caption {key}",) for key in KEYS]
    assert [record.image for record in records] == [jpeg(i) for i in range(3)]
    assert records[0].meta == {"url": "http://x/000000000.jpg", "original_width": 240}


def test_a_file_without_a_text_has_no_caption(tmp_path: Path) -> None:
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000/1.jpg").write_bytes(jpeg(1))
    source = open_raw("img2dataset", [f"folder={tmp_path}"])
    (item,) = source.items()
    with pytest.raises(BadSample, match="no caption"):
        source.read(item)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither \*.tar nor \*/\*.jpg"):
        read_source("img2dataset", f"folder={tmp_path}")
