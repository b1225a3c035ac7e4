"""The command that looks at shards."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from data.raw_files import table_job, write_table

from elip_ds.data.making import make_shards
from elip_ds.errors import exit_with

TOOL = Path(__file__).parents[2] / "tools" / "inspect_shards.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("inspect_shards", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(table_job(write_table(tmp_path / "raw", 6), tmp_path / "out", per_shard=3))
    return tmp_path / "out"


def test_whole_shards_are_told_of(
    tool: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main([f"{folder}/*.tar", "--json", "--decode"])
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["shards"], told["samples"], told["captions"], told["problems"]) == (2, 6, 6, [])
    assert told["short_sides"] == {"mean": 16, "least": 16, "median": 16, "p95": 16, "most": 16}
    assert err == ""
    tool.main([f"{folder}/*.tar"])
    out = capsys.readouterr().out
    assert "2 shards, 6 samples, 6 captions" in out and "words a caption" in out


def test_a_problem_is_a_line_and_a_status(
    tool: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "t-000001.tar"
    data = bytearray(path.read_bytes())
    data[-1] = 1
    path.write_bytes(data)
    with pytest.raises(SystemExit) as left:
        exit_with(tool.main, [f"{folder}/*.tar"])
    assert left.value.code == 1
    err = capsys.readouterr().err
    assert err == f"problem: {path} is not what was written: its checksum differs\n"


@pytest.mark.parametrize("name", ["sheet.html", "sheet.png"])
def test_a_sheet_is_written(tool: Any, folder: Path, tmp_path: Path, name: str) -> None:
    tool.main([f"{folder}/*.tar", "--sheet", str(tmp_path / name), "--number", "4"])
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["none-*.tar"], "shards: no file matches none-*.tar"),
        (["x", "--sheet", "x.pdf"], "--sheet x.pdf: a name that ends in .html or .png"),
        (["x", "--workers", "-1"], "--workers -1: 0 or more"),
        (["x", "--number", "0"], "--number 0: 1 or more"),
        (["x", "--sheets", "x"], "unrecognized arguments: --sheets x; see --help"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    tool: Any, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as left:
        exit_with(tool.main, words)
    assert (left.value.code, capsys.readouterr().err) == (2, f"error: {line}\n")
