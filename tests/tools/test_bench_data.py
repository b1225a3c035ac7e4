"""tools/bench_data.py: its sums, then the command on a few small pictures."""

import io
import json
from pathlib import Path

import bench_data
import numpy as np
import pytest
from PIL import Image

from elip_ds.data.record import Record
from elip_ds.data.shards import write_shards
from elip_ds.errors import UserError

WORDS = [
    "preset=demo",
    "data.crop_scale=[0.2, 1]",
    "data.rand_augment={}",
    "model.text.vocab_size=300",
]


def turn(per_second: float, per_core_second: float, peak_bytes: int = 10) -> dict[str, float]:
    return {
        "per_second": per_second,
        "per_core_second": per_core_second,
        "peak_bytes": peak_bytes,
        "own_bytes": peak_bytes // 2,
    }


def test_ratios_are_of_the_same_turn() -> None:
    turns = {
        "ours": [turn(100, 200), turn(10, 20), turn(100, 200, peak_bytes=30)],
        "other": [turn(50, 100), turn(5, 10), turn(40, 50)],
    }
    summary = bench_data.summarise(turns, normalising=0.005)
    other = summary["other"]
    assert (other["per_second"], other["per_core_second"]) == (40, 50)
    assert other["ours_per_second"] == {
        "median": 2,
        "lowest": 2,
        "highest": 2.5,
        # 5 ms more make 66.7, 9.52 and 66.7 of 100, 10 and 100
        "normalised_median": pytest.approx(1 / (1 / 100 + 0.005) / 40),
    }
    assert (summary["ours"]["peak_bytes"], other["own_bytes"]) == (30, 5)
    report = {"pipelines": summary}
    assert bench_data.cores(report, 500) == {"images_per_second": 500, "ours": 2.5, "other": 10}


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pairs 0: 1 or more"):
        bench_data.main(["--pairs", "0"])
    with pytest.raises(UserError, match="there is no folder"):
        bench_data.main(["--json", str(tmp_path / "no" / "out.json")])


def photograph(i: int) -> Record:
    small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((120, 90)).save(buffer, "JPEG")
    return Record(f"p{i}", buffer.getvalue(), "jpg", (f"photograph {i}", "another one"))


@pytest.mark.slow  # starts loaders and imports torchvision
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(map(photograph, range(24)), tmp_path, "train", per_shard=12)
    out = tmp_path / "out.json"
    counts = ["--batch=4", "--batches=2", "--pairs=2", "--stage-samples=8"]
    words = [*WORDS, f"data.train={tmp_path}/train-*.tar"]
    bench_data.main([*words, *counts, "--images-per-second=1000", f"--json={out}"])
    report = json.loads(out.read_text())
    assert report["samples"] == 24 and report["pairs"] == 2
    assert set(report["stages"]) == set(bench_data.STAGES)
    assert all(seconds > 0 for seconds in report["stages"].values())
    assert set(report["pipelines"]) == {"ours", "webdataset", "json and PIL"}
    for name, entry in report["pipelines"].items():
        assert len(entry["turns"]) == 2 and entry["per_second"] > 0
        assert 0 < entry["own_bytes"] <= entry["peak_bytes"]
        assert report["cores"][name] == 1000 / entry["per_core_second"]
    assert "A GPU that takes 1000 images/s" in capsys.readouterr().out
