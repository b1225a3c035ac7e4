"""Raw data into shards, by the command that people type; killed, interrupted and started again."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data.raw_files import bytes_in, write_table

from elip_ds import registry
from elip_ds.data.shards import ShardReader, scan_shard
from elip_ds.errors import exit_with

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"
SMALL = ["count=5", "image_size=48", "--workers", "0"]
DEADLINE = 120
"Seconds that a start may take on a loaded machine."


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


def test_scenes_become_shards(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scenes", "split=val", *SMALL, "--out", str(tmp_path), "--prefix", "val", "--json"]
    tool.main(words)
    out, err = capsys.readouterr()
    path = tmp_path / "val-000000.tar"
    assert json.loads(out) == {
        "out": str(tmp_path), "prefix": "val", "listed": 5, "shards": 1, "new_shards": 1,
        "samples": 5, "captions": json.loads(out)["captions"], "bytes": path.stat().st_size,
        "skipped": {}, "renamed": [],
    }  # fmt: skip
    assert err == ""
    assert [len(scan_shard(path).entries) for path in [path]] == [5]
    record = ShardReader(path).read(0)
    assert (record.key, record.meta["licence"]) == ("val-000000", "CC0-1.0")


def test_the_table_tells_what_is_there_and_what_is_not(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "raw", 6)
    (table.parent / "2.jpg").write_bytes((table.parent / "1.jpg").read_bytes())
    (table.parent / "4.jpg").unlink()
    tool.main(["table", f"files={table}", "--out", str(tmp_path / "o"), "--dedup", "--workers=0"])
    out = capsys.readouterr().out
    size = (tmp_path / "o/table-000000.tar").stat().st_size
    for words in (f"{size:,}", "skipped 1 of 6: duplicate", "skipped 1 of 6: no such file"):
        assert words in out
    assert f"{tmp_path}/o/skipped.jsonl" in out


def test_a_plan_writes_nothing(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "raw", 6)
    words = ["table", f"files={table}", "--out", str(tmp_path / "o"), "--per-shard", "4", "--plan"]
    tool.main(words)
    assert capsys.readouterr().out == (
        "6 samples in 2 shards of up to 4\n"
        f"from {tmp_path}/o/table-000000.tar to {tmp_path}/o/table-000001.tar\n"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["scene", "--out", "x"], "kind='scene' is not known; did you mean 'scenes'? known: alb"),
        (["scenes"], "the following arguments are required: --out; see --help"),
        (["scenes", "--out", "x", "--per-shard", "0"], "argument --per-shard: 0 is too few"),
        (["scenes", "--out", "x", "--resize", "many"], "argument --resize: invalid positive value"),
        (["scenes", "--out", "x", "--quality", "0"], "--quality 0: 1 to 100"),
        (["scenes", "--out", "x", "--max-bad-share", "2"], "--max-bad-share 2.0: 0 to 1"),
        (["scenes", "--out", "x", "--workers", "-1"], "--workers -1: 0 or more"),
        (["scenes", "--out", "x", "--prefix", "a/b"], "--prefix 'a/b': letters, digits and _=+.-"),
        (["scenes", "--out", "x", "size=8"], "scenes.size is not a setting; did you mean scenes"),
        (["scenes", "image_size=8", "--out", "x"], "scenes: image_size=8 is too small; at least"),
        (["scenes", "--out", "/dev/null/x", *SMALL], "--out /dev/null/x: Not a directory"),
        (["scenes", "--out", "x", "--size", "8"], "unrecognized arguments: --size 8"),
        (["table", "files=no.csv", "--out", "x", "--plan"], "table.files: no.csv does not exist"),
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


def test_help_shows_examples_and_every_kind(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        tool.main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "python tools/make_shards.py karpathy file=" in out
    assert all(f"\n  {kind} " in out for kind in registry.SOURCES)


# Ended from outside


SCENES = ["scenes", "count=600", "image_size=64", "--per-shard", "20", "--dedup"]


def start(out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(TOOL), *SCENES, "--out", str(out), "--workers", "2", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen, out: Path, pattern: str, count: int) -> None:
    end = time.time() + DEADLINE
    while len(list(out.glob(pattern))) < count:
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


def workers_of(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    end = time.time() + DEADLINE
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.time() < end, "the workers live on"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start(out)
    assert process.communicate(timeout=DEADLINE) and process.returncode == 0
    return bytes_in(out)


@pytest.mark.slow
def test_killed_twice_and_started_again_it_gives_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    for pattern, count in ((".scenes.making/*.npy", 4), ("*.tar", 3), ("*.tar", 12)):
        process = start(out)
        wait_for(process, out, pattern, count)
        workers = workers_of(process.pid)
        process.kill()
        process.communicate()
        wait_until_gone(workers)
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert len(kept) < 30
        assert all(undisturbed[path.name] == path.read_bytes() for path in kept)
    process = start(out)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # never written again
    assert bytes_in(out) == undisturbed


@pytest.mark.slow
def test_an_interrupt_is_one_line_and_leaves_no_process(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    process = start(out)
    wait_for(process, out, "*.tar", 2)
    workers = workers_of(process.pid)
    for pid in (process.pid, *workers):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    out_text, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out_text, "Traceback" in err) == (1, "", False)
    assert err.endswith("error: interrupted; whole shards stay, the same command goes on\n")
    wait_until_gone(workers)
    assert all(undisturbed[path.name] == path.read_bytes() for path in out.glob("*.tar"))
    assert list(out.glob(".scenes.making/*.partial")) == []


@pytest.mark.slow
def test_two_at_once_are_one_too_many(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(out)
    wait_for(first, out, ".scenes.making/*.npy", 1)
    second = start(out)
    said = second.communicate(timeout=DEADLINE)
    first.kill()
    first.communicate()
    line = f"error: --out {out}: another process makes scenes-*.tar\n"
    assert (second.returncode, said) == (2, ("", line))
