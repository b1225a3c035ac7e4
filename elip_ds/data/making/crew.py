"""Tasks shared among worker processes that end with the one who asked, however that ends."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from typing import Any, TypeVar

from elip_ds.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], None]

TELL_SECONDS = 0.5


def run_tasks(
    work: Callable[[T, Advance], R], tasks: Sequence[T], workers: int, advance: Advance
) -> Generator[R, None, None]:
    """What work(task, advance) returns, in the order in which tasks are done.

    workers: processes, 0 for none but this. work is pickled and calls advance(n) often: that is
    passed on here, and an orphan ends there. A UserError in a worker is raised here; closing the
    iterator ends the workers.
    """
    if workers == 0:
        for task in tasks:
            yield work(task, advance)
        return
    crew: dict[Any, Any] = {}
    try:
        _start(crew, work, min(workers, len(tasks)))
        yield from _share_out(crew, tasks, advance)
    finally:
        for process in crew.values():
            process.terminate()
        for pipe, process in crew.items():
            process.join()
            pipe.close()


def _start(crew: dict[Any, Any], work: Any, workers: int) -> None:
    """Fills crew with pipe -> process. Forking would copy the threads' locks of this process."""
    context = get_context("spawn")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it; Ctrl-C is for us
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            crew[ours] = process
    finally:
        signal.signal(signal.SIGINT, before)


def _share_out(crew: dict[Any, Any], tasks: Sequence[Any], advance: Advance) -> Iterator[Any]:
    waiting = iter(tasks)
    busy = set(crew)
    for pipe in crew:
        _send(pipe, next(waiting))
    while busy:
        for pipe in connection.wait(busy):
            what, value = _receive(crew, pipe)
            if what == "advance":
                advance(value)
                continue
            if what == "refused":
                raise UserError(value)
            if what == "failed":
                raise RuntimeError(f"in a worker process:\n{value}")
            task = next(waiting, None)
            if task is None:
                busy.discard(pipe)
            else:
                _send(pipe, task)
            yield value


def _send(pipe: Any, task: Any) -> None:
    with suppress(OSError):  # _receive says what became of the worker
        pipe.send(task)


def _receive(crew: dict[Any, Any], pipe: Any) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        crew[pipe].join()
        code = crew[pipe].exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"left with status {code}"
        raise UserError(
            f"a worker process {how}; what is whole stays, run the same command again, with fewer "
            "--workers if memory ran out"
        ) from None


def _serve(pipe: Any, work: Any) -> None:
    """A worker's life: tasks from the pipe until it closes."""
    tell = _Teller(pipe)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = "done", work(task, tell)
        except UserError as error:
            answer = "refused", str(error)
        except Exception:
            answer = "failed", traceback.format_exc()
        tell.flush()
        pipe.send(answer)


class _Teller:
    """Passes on what is advanced, now and then."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._parent = pipe, os.getppid()
        self._count, self._told = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        if os.getppid() != self._parent:
            os._exit(1)  # another start may be at work on the same shard
        self._count += count
        if time.monotonic() - self._told > TELL_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._pipe.send(("advance", self._count))
        self._count, self._told = 0, time.monotonic()
