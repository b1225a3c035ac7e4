"""Memory over the micro-batch: a line for each phase, whose maximum is the peak.

One line through the overall peak is wrong by a quarter at eight times the largest size tried, since
another phase takes over; a line for each phase is not. Where a plan is at hand its own curve takes
the place of the straight line, and the fit finds what the plan does not count (offset) and how far
it is off (slope).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from elip_ds.batching.memory import PHASES, Outcome, Peaks

Shape = Callable[[int], Peaks]
"What a plan predicts for a micro-batch. Asked often: it should cost microseconds."

MAX_RESIDUAL = 0.01
"Of a measured peak: farther from its line, and the line is not believed."
PLAN_SLOPES = (0.9, 1.25)
"Bytes measured for each that the plan predicts, both of what grows: outside, it is another curve."
MIN_POINTS = 3
"Sizes that make a line checkable; two lie on one line whatever the curve."


@dataclass(frozen=True)
class Line:
    """bytes = offset + slope * x, x the micro-batch or what the plan predicts for it.

    residual: the largest distance of a measured peak from it, as a share of that peak.
    left_out: whether one measured peak was far off all others and is not in it.
    """

    offset: float
    slope: float
    residual: float
    left_out: bool = False


@dataclass(frozen=True)
class Fit:
    """What micro-batches not yet tried will take; made by fit_peaks.

    lines: by phase.  num_sizes: how many different micro-batches they rest on.
    """

    lines: Mapping[str, Line]
    shape: Shape | None
    num_sizes: int

    def predict(self, micro_batch_size: int) -> Peaks:
        peaks = {
            phase: round(line.offset + line.slope * _x(self.shape, phase, micro_batch_size))
            for phase, line in self.lines.items()
        }
        return Peaks(**peaks)

    @property
    def residual(self) -> dict[str, float]:
        return {phase: line.residual for phase, line in self.lines.items()}

    @property
    def doubt(self) -> str:
        """Why not to believe it, in one line; empty when it is to be trusted."""
        if self.num_sizes < MIN_POINTS:
            return f"{self.num_sizes} sizes tried are too few to check a line by"
        low, high = PLAN_SLOPES
        for phase, line in self.lines.items():
            if line.residual >= MAX_RESIDUAL:
                return f"{phase} is {line.residual:.1%} off a line"
            if line.left_out:
                return f"one peak of {phase} is far off the line of the others"
            if self.shape is not None and not low < line.slope < high:
                return f"{phase} grows {line.slope:.2f} times as fast as planned"
        return ""

    @property
    def trusted(self) -> bool:
        return not self.doubt

    def largest(self, budget_bytes: int, at_most: int) -> int:
        """The largest micro-batch up to at_most that is predicted to fit; 0: none."""
        fits, fails = 0, at_most + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self.predict(middle).highest <= budget_bytes:
                fits = middle
            else:
                fails = middle
        return fits


def fit_peaks(points: Sequence[Outcome], shape: Shape | None = None) -> Fit:
    """By least squares; outcomes that ran out of memory have no peaks and are passed over.

    A single size gives the plan's own growth or, without a plan, the line through zero, which is
    the steepest that memory can have. Raises ValueError when no outcome has peaks.
    """
    measured = [(p.micro_batch_size, p.peaks) for p in points if p.peaks is not None]
    if not measured:
        raise ValueError("no micro-batch was measured")
    lines = {}
    for phase in PHASES:
        xs = [_x(shape, phase, size) for size, _ in measured]
        ys = [float(getattr(peaks, phase)) for _, peaks in measured]
        lines[phase] = _robust_line(xs, ys, planned=shape is not None)
    return Fit(lines, shape, len({size for size, _ in measured}))


def _x(shape: Shape | None, phase: str, micro_batch_size: int) -> float:
    return micro_batch_size if shape is None else getattr(shape(micro_batch_size), phase)


def _robust_line(xs: Sequence[float], ys: Sequence[float], planned: bool) -> Line:
    """Of all points or, where these are no line and one fewer is, of all but that one.

    The largest size always stays: without it a curve that bends upwards looks straight.
    """
    line = _line(xs, ys, planned)
    if line.residual < MAX_RESIDUAL or len(xs) <= MIN_POINTS:
        return line
    largest = max(range(len(xs)), key=lambda i: xs[i])
    fewer = [
        _line([*xs[:i], *xs[i + 1 :]], [*ys[:i], *ys[i + 1 :]], planned)
        for i in range(len(xs))
        if i != largest
    ]
    best = min(fewer, key=lambda candidate: candidate.residual)
    if best.residual >= MAX_RESIDUAL:
        return line
    return Line(best.offset, best.slope, best.residual, left_out=True)


def _line(xs: Sequence[float], ys: Sequence[float], planned: bool) -> Line:
    slope = _slope(xs, ys, planned)
    offset = sum(ys) / len(ys) - slope * sum(xs) / len(xs)
    residual = max(abs(offset + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    return Line(offset, slope, residual)


def _slope(xs: Sequence[float], ys: Sequence[float], planned: bool) -> float:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = max(xs) - min(xs)
    if planned and spread <= MAX_RESIDUAL * mean_y:
        return 1.0  # what noise would decide: the plan says that these sizes hardly differ
    if spread == 0:
        return mean_y / mean_x
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return max(0.0, products / sum((x - mean_x) ** 2 for x in xs))  # memory never falls
