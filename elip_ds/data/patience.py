"""Calls with a time limit, for files on a network that may not answer."""

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Patience:
    """Runs functions in a thread of its own; one that takes too long is left behind with it.

    A read from a file system that hangs cannot be interrupted, only abandoned.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "_process": -1}

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args), with what it raises. Raises TimeoutError after self.seconds."""
        if self._process != os.getpid():  # a forked worker has no thread yet
            self._start()
        self._calls.put((function, args))
        try:
            value, error = self._results.get(timeout=self.seconds)
        except BaseException as error:  # an interrupt, too: its answer is not the next call's
            self._leave()
            if not isinstance(error, queue.Empty):
                raise
            raise TimeoutError(f"no answer within {self.seconds:g} s") from None
        if error is not None:
            raise error
        return value

    def _leave(self) -> None:
        """The thread ends as soon as it is done with what it was last asked."""
        if self._process == os.getpid():
            self._calls.put(None)
            self._process = -1

    __del__ = _leave

    def _start(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process = os.getpid()
        threading.Thread(target=_work, args=(self._calls, self._results), daemon=True).start()


def _work(calls: "queue.SimpleQueue[Any]", results: "queue.SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        function, args = call
        try:
            results.put((function(*args), None))
        except BaseException as error:  # raised where it was called
            results.put((None, error))
