"""Several processes, one folder: all come to the same, or all say who is missing."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elip_ds.batching.agree import agree_on, smallest
from elip_ds.errors import UserError

NAMES = ["node-a", "node-b", "node-c"]
SIZES = dict(zip(NAMES, (192, 88, 96), strict=True))
ONE_NODE = """
import json, sys
from pathlib import Path
from elip_ds.batching.agree import agree_on
folder, name, size, *names = sys.argv[1:]
answers = agree_on(
    Path(folder), name, {"micro_batch_size": int(size)}, names, token="7.0", timeout_seconds=30
)
print(json.dumps(answers))
"""


def test_processes_end_with_the_same_answers(tmp_path: Path) -> None:
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_NODE, tmp_path, name, str(size), *NAMES],
            stdout=subprocess.PIPE,
        )
        for name, size in SIZES.items()
    ]
    told = [json.loads(node.communicate(timeout=60)[0]) for node in nodes]
    assert told == [{name: {"micro_batch_size": SIZES[name]} for name in NAMES}] * 3
    assert list(told[0]) == NAMES
    assert smallest(told[0]) == "node-b"


def test_who_is_missing_is_named(tmp_path: Path) -> None:
    agree_on(tmp_path, "node-b", {}, ["node-b"], token="7", timeout_seconds=5)
    with pytest.raises(
        UserError, match=r"^no answer from node-a, node-c within 0\.2 s, 1 of 3 nodes"
    ):
        agree_on(tmp_path, "node-b", {}, NAMES, token="7", timeout_seconds=0.2)


def test_an_earlier_attempt_s_answers_do_not_count(tmp_path: Path) -> None:
    for name in NAMES:
        agree_on(tmp_path, name, {}, [name], token="7.0", timeout_seconds=5)
    with pytest.raises(UserError, match="no answer from node-b, node-c"):
        agree_on(tmp_path, "node-a", {}, NAMES, token="7.1", timeout_seconds=0.2)


def test_a_node_that_is_already_in_the_next_attempt_does_not_hold_up_this_one(
    tmp_path: Path,
) -> None:
    first = {"micro_batch_size": 8}
    agree_on(tmp_path, "node-a", first, ["node-a"], token="1", timeout_seconds=5)
    agree_on(tmp_path, "node-a", {}, ["node-a"], token="2", timeout_seconds=5)
    names = ["node-a", "node-b"]
    assert agree_on(tmp_path, "node-b", {}, names, token="1", timeout_seconds=5)["node-a"] == first


def test_one_node_s_failure_stops_all_at_once_with_its_reason(tmp_path: Path) -> None:
    """node-c never comes, and nobody waits for it."""
    answers = {"node-a": {"micro_batch_size": 8}, "node-b": {"failed": "GPU 2 is busy"}}

    def run(name: str) -> str:
        with pytest.raises(UserError) as caught:
            agree_on(tmp_path, name, answers[name], NAMES, token="7", timeout_seconds=60)
        return str(caught.value)

    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(run, answers)) == {"node-b: GPU 2 is busy"}
    assert time.monotonic() - start < 30


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"run/attempt-7/\.node-a\.partial cannot be written: Not"):
        agree_on(tmp_path / "run", "node-a", {}, NAMES, token="7", timeout_seconds=1)


def test_of_equal_answers_the_first_binds() -> None:
    assert smallest({"b": {"micro_batch_size": 4}, "a": {"micro_batch_size": 4}}) == "b"
