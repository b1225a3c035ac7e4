"""What an entry says of a person's mistake, and who says it."""

import subprocess
import sys

import pytest

from elip_ds.errors import NodeError, UserError, exit_with


@pytest.mark.parametrize(
    ("kind", "rank", "local_rank", "says"),
    [
        (UserError, 0, 0, "error: no such thing\n"),
        (UserError, 8, 0, ""),
        (NodeError, 0, 0, "error: no such thing\n"),
        (NodeError, 8, 0, "error: rank 8 on "),
        (NodeError, 9, 1, ""),
    ],
)
def test_a_line_is_said_once_and_what_may_be_of_one_node_on_each(
    kind, rank, local_rank, says, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    def main(argv):
        raise kind("no such thing")

    with pytest.raises(SystemExit) as caught:
        exit_with(main, [])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith(says) if says else not said


RANK = """
import atexit, sys
from elip_ds.errors import UserError, leave_with

def main(argv):
    print("said")
    if argv[0] == "refused":
        raise UserError("no such thing")
    if argv[0] != "done":
        raise SystemExit(int(argv[0]))

atexit.register(print, "torn down")
leave_with(main, sys.argv[1:])
"""


@pytest.mark.parametrize(("ending", "status"), [("done", 0), ("refused", 2), ("1", 1)])
def test_a_rank_leaves_with_its_status_and_tears_nothing_down(ending, status):
    words = [sys.executable, "-c", RANK, ending]
    rank = subprocess.run(words, capture_output=True, text=True)
    assert (rank.returncode, rank.stdout) == (status, "said\n"), rank.stderr
    assert ("error: no such thing" in rank.stderr) == (ending == "refused")
