"""Worker processes."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from elip_ds.data.making.crew import run_tasks
from elip_ds.errors import UserError


def square(task: int, advance: Callable[[int], None]) -> int:
    advance(task)
    return task * task


def misbehave(task: str, advance: Callable[[int], None]) -> int:
    if task == "refuse":
        raise UserError("one line")
    if task == "break":
        raise ZeroDivisionError("a fault of ours")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "sleep":
        time.sleep(600)
    return os.getpid()


def test_without_workers_tasks_are_done_in_order_here() -> None:
    told: list[int] = []
    assert list(run_tasks(square, [3, 1, 2], 0, told.append)) == [9, 1, 4]
    assert told == [3, 1, 2]


def test_no_task_is_no_work() -> None:
    assert list(run_tasks(square, [], 2, lambda count: None)) == []


@pytest.mark.slow
def test_workers_do_all_tasks_and_tell_how_far_they_are() -> None:
    told: list[int] = []
    assert sorted(run_tasks(square, range(20), 2, told.append)) == [i * i for i in range(20)]
    assert sum(told) == sum(range(20))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind", "line"),
    [
        ("refuse", UserError, "^one line$"),
        ("break", RuntimeError, "ZeroDivisionError: a fault of ours"),
        ("die", UserError, "^a worker process was killed by signal 9; what is whole stays"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_said_here(
    task: str, kind: type[Exception], line: str
) -> None:
    with pytest.raises(kind, match=line):
        list(run_tasks(misbehave, [task, "sleep"], 2, lambda count: None))


@pytest.mark.slow
def test_no_worker_outlives_the_iterator() -> None:
    results = run_tasks(misbehave, ["", "sleep", ""], 1, lambda count: None)
    pid = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
