"""What torch's CPU allocator gave and took back while something ran, told by the profiler.

Exact bytes, pages touched or not, of the thread that asks; what other threads (gloo's) ask for by
themselves is not seen.
"""

from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

MARK = "mark:"


class Allocations:
    """Counts from its opening on; mark() closes a stretch, whose peak has the mark's name."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "Allocations":
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)

    def mark(self, name: str) -> None:
        with record_function(MARK + name):
            pass

    def peaks(self) -> list[tuple[str, int, int]]:
        """After closing: for each mark in order its name, the most bytes since the mark before, and
        the bytes at the mark.
        """
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        at = sorted(
            (event.start_ns(), i, event.name(), event.nbytes())
            for i, event in enumerate(events)
            if event.name() == "[memory]" or event.name().startswith(MARK)
        )
        stretches, alive, peak = [], 0, 0
        for _, _, name, nbytes in at:
            if name == "[memory]":
                alive += nbytes
                peak = max(peak, alive)
            else:
                stretches.append((name.removeprefix(MARK), peak, alive))
                peak = alive
        return stretches
