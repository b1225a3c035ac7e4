"""How far a job is: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0


class Showing:
    """One stretch of work over `total` samples, shown on stderr: share, rate and time left.

    total: 0 where nobody knows.
    """

    def __init__(self, what: str, total: int, every_seconds: float = LINE_SECONDS) -> None:
        self._what, self._total, self._every = what, total, every_seconds
        self._count, self._skipped = 0, 0
        self._began = self._told = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description} {task.percentage:>3.0f}%"),
                BarColumn(),
                TextColumn("{task.completed:,.0f} of {task.fields[all]} samples"),
                TextColumn("{task.fields[rate]:,.0f}/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                what, total=total or None, rate=0.0, all=f"{total:,}" if total else "?"
            )

    def skip(self, count: int) -> None:
        """Samples that an earlier start has done, which say nothing of the rate."""
        self._skipped += count
        self.advance(count)

    def advance(self, count: int) -> None:
        self._count += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._count, rate=self.rate)
        elif time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            sys.stderr.write(self.line() + "\n")
            sys.stderr.flush()

    @property
    def rate(self) -> float:
        """Samples per second."""
        return (self._count - self._skipped) / max(time.monotonic() - self._began, 1e-6)

    def line(self) -> str:
        if not self._total:
            return f"{self._what}: {self._count:,} samples, {self.rate:,.0f}/s"
        share = self._count / self._total
        left = "?"
        if self._count > self._skipped:
            left = _duration((self._total - self._count) / self.rate)
        return (
            f"{self._what}: {self._count:,} of {self._total:,} samples ({100 * share:.0f} %), "
            f"{self.rate:,.0f}/s, {left} left"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
