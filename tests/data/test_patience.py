"""A call with a time limit gives what the function gives, or ends in time."""

import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path

import pytest

from elip_ds.data.patience import Patience


def test_results_and_errors_come_through() -> None:
    patience = Patience(5)
    assert [patience(divmod, 7, n) for n in (2, 3)] == [(3, 1), (2, 1)]
    with pytest.raises(ZeroDivisionError):
        patience(divmod, 7, 0)
    assert patience(len, "abc") == 3


def test_a_call_that_hangs_is_left_behind(tmp_path: Path) -> None:
    """Opening a named pipe waits for its other end, and no signal is needed to go on."""
    os.mkfifo(tmp_path / "pipe")
    patience, before = Patience(0.1), set(threading.enumerate())
    with pytest.raises(TimeoutError, match=r"^no answer within 0\.1 s$"):
        patience(os.open, tmp_path / "pipe", os.O_RDONLY)
    (stuck,) = set(threading.enumerate()) - before
    assert patience(len, "abc") == 3
    end = os.open(tmp_path / "pipe", os.O_RDWR)  # now it returns, and its thread ends
    stuck.join(10)
    assert not stuck.is_alive()
    os.close(end)


def test_the_answer_to_an_interrupted_call_is_dropped() -> None:
    patience, go_on = Patience(5), threading.Event()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            patience(lambda: go_on.wait(5))
    finally:
        signal.signal(signal.SIGALRM, before)
    go_on.set()
    assert patience(len, "abc") == 3


def test_the_thread_ends_with_its_owner() -> None:
    patience = Patience(5)
    thread = patience(threading.current_thread)
    del patience
    thread.join(20)
    assert not thread.is_alive()


def _fork(patience: Patience) -> None:
    os._exit(patience(len, "abc"))


def test_a_forked_process_has_a_thread_of_its_own() -> None:
    patience = Patience(5)
    assert patience(len, "ab") == 2
    child = multiprocessing.get_context("fork").Process(target=_fork, args=(patience,))
    child.start()
    child.join(20)
    assert child.exitcode == 3


def test_it_can_be_sent_to_another_process() -> None:
    patience = Patience(5)
    patience(len, "ab")
    assert pickle.loads(pickle.dumps(patience))(len, "abc") == 3
