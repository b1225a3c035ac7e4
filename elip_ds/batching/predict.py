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


SECOND = 16
"Tried after 1: where the highest phase is most often that of large micro-batches already."


@dataclass(frozen=True)
class Prediction:
    """Bytes on one rank's device.  parts: of the highest peak, by name; they add up to it."""

    micro_batch_size: int
    peaks: Peaks
    parts: dict[str, int]


def predict(traced: Traced, states: dict[str, int]) -> Prediction:
    """states: bytes by part that are there before a step and after it."""
    held = sum(states.values())
    made = traced.peaks
    peaks = Peaks(held + made.forward, held + made.backward, held + made.step)
    parts = {**states, **{f"activations, {name}": n for name, n in traced.kept.items()}}
    parts[AT_WORK] = peaks.highest - sum(parts.values())
    return Prediction(traced.micro_batch_size, peaks, parts)


def largest_fitting(
    predict_at: Callable[[int], Prediction],
    budget_bytes: int,
    *,
    at_most: int,
    max_traces: int = 6,
) -> tuple[Prediction | None, list[Prediction]]:
    """The largest micro-batch whose peak is within the budget, and all predictions on the way.

    Peaks grow with the micro-batch as the highest of a few lines: a secant between what fits and
    what does not leads to the edge. Exact, unless max_traces run out before; then the largest that
    was seen to fit. None: not even one sample does.
    """
    seen: dict[int, Prediction] = {}

    def excess(size: int) -> int:
        if size not in seen:
            seen[size] = predict_at(size)
        return seen[size].peaks.highest - budget_bytes

    low, high = 1, None
    if excess(1) > 0:
        return None, list(seen.values())
    size = min(SECOND, at_most)
    while len(seen) < max_traces and high != low + 1 and low < at_most:
        over = excess(size)
        if over > 0:
            high = size
        else:
            low = size
        size = _next(seen, budget_bytes, low, high, at_most)
    return seen[low], list(seen.values())


def _next(
    seen: dict[int, Prediction], budget_bytes: int, low: int, high: int | None, at_most: int
) -> int:
    """Where the line through two of the sizes seen meets the budget, between low and high."""
    below = max((size for size in seen if size < low), default=low)
    left, right = (low, high) if high is not None else (below, low)
    if left == right:
        return min(2 * low, at_most)
    y_left, y_right = (seen[x].peaks.highest for x in (left, right))
    slope = (y_right - y_left) / (right - left)
    meets = left + int((budget_bytes - y_left) / slope) if slope > 0 else at_most
    top = at_most if high is None else high - 1
    return max(low + 1, min(meets, top)) if low < top else top
