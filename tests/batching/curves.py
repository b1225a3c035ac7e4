"""Made-up memory: a curve for each phase, a limit, and readings that scatter."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from elip_ds.batching import Outcome, Peaks

GB = 10**9
Curve = Callable[[int], Peaks]


def affine(backward: float, forward: float, states: float = 0.5 * GB) -> Curve:
    """Bytes per sample of two phases; backward starts higher, so that a steeper forward overtakes
    it, and the optimizer's step does not grow.
    """
    return lambda b: Peaks(
        forward=round(states + forward * b),
        backward=round(1.2 * states + backward * b),
        step=round(1.1 * states),
    )


def bent(per_sample: float, at_double: int, states: float = 0.5 * GB) -> Curve:
    """Quadratic: a sample takes per_sample bytes, twice as many when there are at_double."""
    return lambda b: Peaks(*[round(states + per_sample * b * (1 + b / at_double))] * 3)


def stepped(curve: Curve, step_bytes: int) -> Curve:
    """As an allocator sees it that takes whole blocks."""
    return lambda b: Peaks(
        *(-(-y // step_bytes) * step_bytes for y in (curve(b).forward, curve(b).backward)),
        curve(b).step,
    )


def true_maximum(curve: Curve, budget_bytes: int) -> int:
    size = 0
    while curve(size + 1).highest <= budget_bytes:
        size += 1
    return size


@dataclass
class Node:
    """Runs out of memory exactly where the curve says; what it reads scatters by a share of noise.

    outliers: size -> factor by which every reading at that size is wrong.
    """

    curve: Curve
    budget_bytes: int
    noise: float = 0.0
    seed: int = 0
    outliers: dict[int, float] = field(default_factory=dict)
    measured: list[list[int]] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def measure(self, sizes: Sequence[int]) -> list[Outcome]:
        self.measured.append(list(sizes))
        outcomes = []
        for size in sizes:
            outcomes.append(self._try(size, self.outliers.get(size, 1.0)))
            if outcomes[-1].peaks is None:
                break
        return outcomes

    def verify(self, size: int) -> Outcome:
        self.verified.append(size)
        return self._try(size, 1.0)

    def _try(self, size: int, factor: float) -> Outcome:
        true = self.curve(size)
        if true.highest > self.budget_bytes:
            return Outcome(size, None, "rank 1 asked for 2 MiB in backward")
        return Outcome(size, self._read(true, factor))

    def _read(self, true: Peaks, factor: float) -> Peaks:
        # A reading above the limit is one that the limit itself contradicts.
        read = {
            phase: min(
                self.budget_bytes,
                round(
                    getattr(true, phase) * factor * (1 + self._random.uniform(-1, 1) * self.noise)
                ),
            )
            for phase in ("forward", "backward", "step")
        }
        return replace(true, **read)
