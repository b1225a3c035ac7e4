"""Photographs and clip art as raw files: made into shards, looked at, trained on by two ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from end_to_end.jobs import ROOT, Job

from elip_ds.data.record import Record
from elip_ds.data.shards import ShardReader, expand_files

DATA = (ROOT / "../shared/data").resolve()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there"),
]


def real_records(name: str, split: str) -> list[Record]:
    paths = expand_files(f"{DATA}/{name}/{name}-{split}-*.tar", "data")
    return [reader.read(i) for reader in map(ShardReader, paths) for i in range(len(reader))]


def unpack(records: list[Record], folder: Path) -> Path:
    """As ALBEF has its data: image files, and a json list with one entry for each caption."""
    folder.mkdir(parents=True)
    entries = []
    for record in records:
        name = f"{record.key}.{record.extension}"
        (folder / name).write_bytes(record.image)
        entries += [{"image": name, "caption": caption} for caption in record.captions]
    path = folder / "list.json"
    path.write_text(json.dumps(entries))
    return path


def tool(name: str, *words: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / name), *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stripped(record: Record) -> tuple[bytes, tuple[str, ...]]:
    return record.image, tuple(caption.strip() for caption in record.captions)


def test_raw_files_become_shards_and_train_two_ranks(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    sources = {"train": real_records("fsa-color-photos", "val")}
    sources["val"] = real_records("openclipart", "val")
    for split, records in sources.items():
        listed = unpack(records, tmp_path / split)
        words = [f"files={listed}", f"images={listed.parent}", "--prefix", split]
        told = tool(
            "make_shards.py", "albef_json", *words, "--out", str(out), "--per-shard", "30",
            "--workers", "2", "--json",
        )  # fmt: skip
        assert json.loads(told)["samples"] == len(records) == 100
        readers = [ShardReader(path) for path in expand_files(f"{out}/{split}-*.tar", "data")]
        made = [reader.read(i) for reader in readers for i in range(len(reader))]
        assert list(map(stripped, made)) == list(map(stripped, records))
    seen = json.loads(tool("inspect_shards.py", f"{out}/*.tar", "--decode", "--json"))
    assert (seen["samples"], seen["shards"], seen["problems"]) == (200, 8, [])
    job = start(
        "real",
        f"data.train={out}/train-*.tar",
        f"data.val={out}/val-*.tar",
        "model.text.vocab_size=2000",
        "schedule.length=80 samples",
    ).finish()
    losses = job.losses()
    assert len(losses) >= 8 and all(abs(x) < 100 for step in losses.values() for x in step.values())
    assert not (job.dir / "skipped.jsonl").exists()
