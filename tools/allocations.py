"""What torch's CPU allocator gave and took back while something ran.

Exact bytes, pages touched or not, in any thread: gloo's threads are often the last to hold a
message, and torch's profiler hears of a release only in the thread that it was opened in. A process
is counted that was started with counting() in its environment.
"""

import ctypes
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def counting(folder: Path) -> dict[str, str]:
    """Builds the counter there. Returns what the environment of a counted process needs."""
    library = folder / "allocations.so"
    command = ["c++", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library)}


class Allocations:
    """Counts from its making on; mark() closes a stretch, whose peak has the mark's name."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        if not hasattr(self._library, "peak_bytes"):
            raise RuntimeError("this process was not started with allocations.counting()")
        self._library.peak_bytes.restype = self._library.alive_bytes.restype = ctypes.c_long
        self._library.peak_bytes()
        self._before = self._library.alive_bytes()
        self._stretches: list[tuple[str, int, int]] = []

    def mark(self, name: str) -> None:
        peak, alive = self._library.peak_bytes(), self._library.alive_bytes()
        self._stretches.append((name, peak - self._before, alive - self._before))

    def peaks(self) -> list[tuple[str, int, int]]:
        """For each mark in order its name, the most bytes since the mark before, and the bytes at
        the mark.
        """
        return list(self._stretches)
