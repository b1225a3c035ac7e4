"""How a rank on a CPU gives back what it has freed."""

import ctypes

M_MMAP_THRESHOLD, THRESHOLD_BYTES = -3, 128 * 1024
"Of glibc's mallopt; the number that it begins with, before it adapts."


def return_at_once() -> None:
    """From now on every larger block that is freed goes back to the system.

    Else it stays in a heap with holes: a rank takes a quarter more for its activations, and more
    and more for hundreds of steps, which no short trial foresees. Fresh pages cost time instead, a
    step of the demo 1.6 times as much, so that it is for where memory is short. Elsewhere than on
    Linux with glibc nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)
