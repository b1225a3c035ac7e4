"""The built-in scenes as shards, by the command that people type."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elip_ds.data.shards import ShardReader, count_samples
from elip_ds.errors import exit_with

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"
SMALL = ["--train", "5", "--val", "3", "--image-size", "48"]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error_line(tool: Any, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        exit_with(tool.main, list(words))
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.strip()


def test_the_command_writes_both_splits(tmp_path: Path) -> None:
    out = tmp_path / "new" / "scenes"
    words = [sys.executable, str(TOOL), "scenes", "--out", str(out), *SMALL, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    train, val = out / "scenes-train-000000.tar", out / "scenes-val-000000.tar"
    assert json.loads(done.stdout) == {
        "source": "scenes",
        "out": str(out),
        "splits": {
            "train": {"shards": 1, "samples": 5, "bytes": train.stat().st_size},
            "val": {"shards": 1, "samples": 3, "bytes": val.stat().st_size},
        },
    }
    assert done.stderr == ""
    assert count_samples([train, val], "data.train") == [5, 3]
    record = ShardReader(val).read(0)
    assert (record.key, record.meta["licence"]) == ("val-000000", "CC0-1.0")


def test_the_table_names_shards_samples_and_bytes(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main(["scenes", "--out", str(tmp_path), *SMALL])
    out = capsys.readouterr().out
    assert str(tmp_path) in out
    for word in ("split", "shards", "samples", "bytes", "train", "val"):
        assert word in out
    size = (tmp_path / "scenes-train-000000.tar").stat().st_size
    assert f"{size:,}" in out


def test_shards_that_are_there_stay(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scenes-val-000007.tar").touch()
    line = error_line(tool, capsys, "scenes", "--out", str(tmp_path), *SMALL)
    assert line == (
        f"error: --out {tmp_path} holds scenes-val-000007.tar already; name another folder"
    )
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["scene", "--out", "x"], "source='scene' is not known; did you mean 'scenes'? known: sc"),
        (["scenes"], "the following arguments are required: --out; see --help"),
        (["scenes", "--out", "x", "--train", "0"], "argument --train: 0 samples are no split"),
        (
            ["scenes", "--out", "x", "--val", "many"],
            "argument --val: invalid samples value: 'many'",
        ),
        (["scenes", "--out", "x", "--image-size", "8"], "image_size=8 is too small; at least 48"),
        (["scenes", "--out", "/dev/null/x"], "--out /dev/null/x: Not a directory"),
        (["scenes", "--out", "x", "--size", "8"], "unrecognized arguments: --size 8"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    tool: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_line(tool, capsys, *words).startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        tool.main(["--help"])
    assert left.value.code == 0
    assert "python tools/make_shards.py scenes --out" in capsys.readouterr().out
