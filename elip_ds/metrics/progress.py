"""A rich progress bar in a terminal; nothing elsewhere, where one plain line per interval is
better."""

import sys

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    def __init__(self, total_samples: int) -> None:
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.percentage:>3.0f}%"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} samples"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=total_samples, text="")

    def advance(self, samples_seen: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=samples_seen)

    def show(self, losses: str, images_per_second: float) -> bool:
        """Put the interval beside the bar. False where there is none."""
        if self._bar is None:
            return False
        self._bar.update(self._task, text=f"{losses}  {images_per_second:.0f} images/s")
        return True

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
