"""The memory of a micro-batch, told without a device: a traced step and ZeRO's states.

Nothing is extrapolated: a step costs the same to trace at any size, so that the answer itself is
traced.
"""

from collections.abc import Callable
from dataclasses import dataclass

from elip_ds.batching.memory import Peaks
from elip_ds.batching.trace import Traced

AT_WORK = "working memory"
"Part: buckets, gathered weights and temporary tensors, beyond what lies there before a backward."


FIRST = 64
"Tried first. As most of what a step makes grows with its samples, the next is near the answer."
NEARLY = 0.99
"Of a line: the margin by which a peak may grow less than one (scored words grow by a root, too)."


@dataclass(frozen=True)
class Prediction:
    """Bytes on one rank's device.  held_bytes: there before a step and after it.  parts: of the
    highest peak, by name; they add up to it.
    """

    micro_batch_size: int
    peaks: Peaks
    held_bytes: int
    parts: dict[str, int]


def predict(traced: Traced, states: dict[str, int]) -> Prediction:
    """states: bytes by part that are there before a step and after it."""
    held = sum(states.values())
    made = traced.peaks
    peaks = Peaks(held + made.forward, held + made.backward, held + made.step)
    parts = {**states, **{_told(name): n for name, n in traced.kept.items()}}
    parts[AT_WORK] = peaks.highest - sum(parts.values())
    return Prediction(traced.micro_batch_size, peaks, held, parts)


def _told(part: str) -> str:
    return "logits and heads" if part == "heads" else f"activations, {part}"


def largest_fitting(
    predict_at: Callable[[int], Prediction],
    budget_bytes: int,
    *,
    at_most: int,
    first: int = FIRST,
    max_traces: int = 6,
) -> tuple[Prediction | None, list[Prediction]]:
    """The largest micro-batch whose peak is within the budget, and all predictions on the way.

    Peaks grow with the micro-batch as the highest of a few lines: a line through what fits and what
    does not leads to the edge, and where a sample more would not fit by the slope so far, it does
    not. Exact, unless max_traces run out before; then the largest that was seen to fit. None: not
    even one sample does.
    """
    seen: dict[int, Prediction] = {}
    low, high, size = 0, at_most + 1, min(first, at_most)
    while high - low > 1 and len(seen) < max_traces and not _is_full(seen, budget_bytes, low):
        if len(seen) == max_traces - 1 and low == 0:
            size = 1
        seen[size] = predict_at(size)
        if seen[size].peaks.highest <= budget_bytes:
            low = size
        else:
            high = size
        size = _next(seen, budget_bytes, low, high)
    return seen.get(low), list(seen.values())


def _is_full(seen: dict[int, Prediction], budget_bytes: int, low: int) -> bool:
    """Whether one sample beyond low is too much, as peaks only grow faster than they did."""
    below = [size for size in seen if size < low]
    if not below:
        return False
    grown = seen[low].peaks.highest - seen[max(below)].peaks.highest
    slope = grown / (low - max(below))
    return budget_bytes - seen[low].peaks.highest < NEARLY * slope


def _next(seen: dict[int, Prediction], budget_bytes: int, low: int, high: int) -> int:
    """Where the line through two sizes meets the budget, between low and high: those two, or where
    nothing was too large yet, the two largest. Of no sample at all, what is held is known.
    """
    points = {0: next(iter(seen.values())).held_bytes}
    points |= {size: prediction.peaks.highest for size, prediction in seen.items()}
    right = high if high in points else low
    left = max(size for size in points if size < right and size <= low)
    slope = (points[right] - points[left]) / (right - left)
    meets = left + int((budget_bytes - points[left]) / slope) if slope > 0 else high - 1
    return max(low + 1, min(meets, high - 1))
