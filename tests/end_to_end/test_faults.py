"""Each kind of dirt in the data of a real run: it goes on, and counts what was put there."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import Job
from PIL import Image

from elip_ds.data.record import Record
from elip_ds.data.shards import scan_shard, write_shards

pytestmark = pytest.mark.slow

PER_SHARD = 20


def jpeg(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 100 000 x 100 000 pixels by its header."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body
    return head + struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 64) + b"IDAT" + b"\0" * 68


def record(number: int) -> Record:
    name = f"r{number:04d}"
    image, extension, captions = jpeg(number), "jpg", (f"a picture of a dog {number}",)
    match number:
        case 3:
            image = image[: len(image) // 2]
        case 8:
            image = b"no image at all"
        case 23:
            captions = ("   ",)
        case 25:
            image, extension = bomb(), "png"
        case 31:
            image = jpeg(number, (3, 3))
    return Record(name, image, extension, captions)


def test_a_run_goes_on_and_counts_what_is_wrong(start: Callable[..., Job], tmp_path: Path) -> None:
    """One epoch of 200 samples: each bad one is met once, and its neighbour stands in."""
    folders = {name: tmp_path / name for name in ("cut", "gone", "stuck", "val")}
    paths = {
        name: write_shards(map(record, range(first, first + count)), folders[name], "x", PER_SHARD)
        for name, first, count in (
            ("cut", 0, 120), ("gone", 200, 40), ("stuck", 300, 40), ("val", 400, 16)
        )
    }  # fmt: skip
    cut, gone, stuck = paths["cut"][5], paths["gone"][1], paths["stuck"][1]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    lost = PER_SHARD - len(scan_shard(cut).entries)
    gone.unlink()  # its index is there, and nobody looks for a remote shard before it is wanted
    stuck.unlink()
    os.mkfifo(stuck)  # whose opening waits for ever
    names = {
        "cut": f"{folders['cut']}/x-*.tar",
        "gone": f"file://{folders['gone']}/x-{{000000..000001}}.tar",
        "stuck": f"{folders['stuck']}/x-*.tar",
    }
    job = start(
        "dirty",
        "data.train=[" + ", ".join(f"{{shards: '{name}'}}" for name in names.values()) + "]",
        f"data.val={paths['val'][0]}",
        f"data.cache.dir={tmp_path}/cache",
        "data.max_bad_share=0.5",
        "data.time_limit_seconds=3",
        "data.retries=0",
        "data.workers=2",
        "schedule.length=1 epochs",
    ).finish()
    last = [line for line in job.lines() if "skipped" in line][-1]
    assert last["samples_seen"] == 200
    assert last["skipped"] == {
        names["cut"]: {"caption": 1, "decode": 2, "size": 2, "truncated": lost},
        names["gone"]: {"missing": PER_SHARD},
        names["stuck"]: {"slow": PER_SHARD},
    }
    lines = [json.loads(line) for line in (job.dir / "skipped.jsonl").read_text().splitlines()]
    named = {line["key"] for line in lines if line["shard"].startswith(str(folders["cut"]))}
    assert {"r0003", "r0008", "r0023", "r0025", "r0031"} <= named


def test_too_much_dirt_stops_all_ranks_with_one_line(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    (val,) = write_shards(map(record, range(400, 416)), tmp_path / "val", "x")
    write_shards((replace(record(n), image=b"x" * (n % 3)) if n % 3 else record(n)
                  for n in range(500, 900)), tmp_path / "train", "x", PER_SHARD)  # fmt: skip
    job = start(
        "filthy",
        f"data.train={tmp_path}/train/x-*.tar",
        f"data.val={val}",
        "data.workers=1",
        "schedule.length=1 epochs",
    ).finish(ok=False)
    assert job.codes == [2, 2]
    (line,) = [line for line in job.output[0].splitlines() if line.startswith("error: ")]
    assert "samples read cannot be used, more than data.max_bad_share=0.01; most often: " in line
    assert not any(line.startswith("error: ") for line in job.output[1].splitlines())
