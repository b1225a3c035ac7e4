"""What one rank's memory did while a micro-batch was tried: measured, predicted or made up."""

from dataclasses import astuple, dataclass

PHASES = ("forward", "backward", "step")
"Of an optimizer step. Each has a peak of its own, and each grows with the micro-batch as a line."


@dataclass(frozen=True)
class Peaks:
    """The most bytes in use at once while each phase ran, model and optimizer included."""

    forward: int
    backward: int
    step: int

    @property
    def highest(self) -> int:
        return max(astuple(self))


@dataclass(frozen=True)
class Outcome:
    """A micro-batch that was tried: the highest peaks over the ranks, or None where the memory of
    one of them ran out.

    reason: then in one line which rank, in which phase, and what was asked for.
    reached_bytes: then the most that had been in use, where that is known.
    """

    micro_batch_size: int
    peaks: Peaks | None
    reason: str = ""
    reached_bytes: int | None = None
