"""Micro-batch x accumulation x ranks = global batch, exactly."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, isqrt

from elip_ds.errors import UserError

MAX_MICRO_BATCH = 65_535
"Rows that kernels which index them by a short grid dimension can do."
WASTEFUL = 0.75
"Of what fits: a micro-batch below it, forced by the global batch, is worth a word."
NUM_NEAREST = 3
"Global batches to name."


@dataclass(frozen=True)
class Plan:
    """Samples: micro_batch_size per rank and pass, global_batch_size per optimizer step.

    later: micro-batches of the stretches of a pruning schedule, by their keep ratios; none: the
    same from beginning to end.  unequal: micro-batches of the ranks where they differ; then
    micro_batch_size is the largest.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    later: Mapping[tuple[float, ...], int] = field(default_factory=dict, compare=False)
    unequal: tuple[int, ...] = ()

    def at(self, keep_ratios: Sequence[float]) -> "Plan":
        """The plan of the stretch with these keep ratios; its global batch is the same."""
        micro = self.later.get(tuple(keep_ratios), self.micro_batch_size)
        steps = self.global_batch_size // (micro * self.world_size)
        return replace(self, micro_batch_size=micro, gradient_accumulation_steps=steps)

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Of every rank."""
        return self.unequal or (self.micro_batch_size,) * self.world_size

    @property
    def global_batch_size(self) -> int:
        return sum(self.micro_batches) * self.gradient_accumulation_steps


def plan_batch(
    global_batch_size: int,
    micro_batch_size: int | str,
    *,
    world_size: int,
    min_micro_batch: int = 1,
) -> Plan:
    """micro_batch_size: a number, or 'auto' for a rank's whole share.  min_micro_batch: the fewest
    samples per pass that the objectives can do with.

    Raises UserError, with the nearest batches that would do, unless it divides exactly.
    """
    if micro_batch_size == "auto":
        micro_batch_size = _share(global_batch_size, world_size)
    assert isinstance(micro_batch_size, int)
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        raise UserError(
            f"batching.global_batch_size={global_batch_size} is not a multiple of "
            f"micro_batch_size x world_size = {micro_batch_size} x {world_size} = {per_pass}; "
            f"nearest: {_near(global_batch_size, per_pass)}"
        )
    if micro_batch_size < min_micro_batch:
        raise _too_few(micro_batch_size, min_micro_batch, world_size)
    return Plan(micro_batch_size, global_batch_size // per_pass, world_size)


def micro_batches(
    global_batch_size: int | None,
    *,
    world_size: int,
    multiple_of: int = 1,
    min_micro_batch: int = 1,
    max_global: int | None = None,
) -> list[int]:
    """All micro-batches that a plan may come to, ascending: what a search may answer.

    A fixed global batch: the divisors of a rank's share.  A free one, None: the multiples of
    multiple_of up to max_global over all ranks, and what lies below the first of them.

    Raises UserError when there is none.
    """
    if global_batch_size is not None:
        share = _share(global_batch_size, world_size)
        if share < min_micro_batch:
            raise _too_few(share, min_micro_batch, world_size)
        return [size for size in divisors(share) if size >= min_micro_batch]
    at_most = MAX_MICRO_BATCH if max_global is None else max_global // world_size
    if at_most < min_micro_batch:
        raise UserError(
            f"batching.max_global={max_global} leaves {at_most} samples to each of {world_size} "
            f"ranks, the objectives need at least {min_micro_batch}: {min_micro_batch * world_size}"
        )
    few = range(min_micro_batch, min(multiple_of, at_most + 1))
    first = -(-min_micro_batch // multiple_of) * multiple_of
    return [*few, *range(first, min(at_most, MAX_MICRO_BATCH) + 1, multiple_of)]


def choose_micro_batch(
    largest: int,
    global_batch_size: int | None,
    *,
    world_size: int,
    multiple_of: int = 1,
    min_micro_batch: int = 1,
    max_global: int | None = None,
) -> Plan:
    """The plan that uses most of what fits, largest samples per rank and pass.

    multiple_of is a wish: with a fixed global batch it is met where that costs at most a quarter
    of the micro-batch, with a free one (None) where as many samples fit.  A free global batch is
    one pass of all ranks.

    Raises UserError, with the nearest global batches that would do, when no micro-batch fits.
    """
    sizes = micro_batches(
        global_batch_size,
        world_size=world_size,
        multiple_of=multiple_of,
        min_micro_batch=min_micro_batch,
        max_global=max_global,
    )
    best = _last_within(sizes, largest)
    if best is None:
        raise none_fits(sizes[0], largest, global_batch_size, world_size, min_micro_batch)
    if global_batch_size is None:
        return Plan(best, 1, world_size)
    even = _last_within([size for size in sizes if size % multiple_of == 0], best)
    if even is not None and even >= WASTEFUL * best:
        best = even
    return Plan(best, global_batch_size // (best * world_size), world_size)


def none_fits(
    smallest: int,
    largest: int,
    global_batch_size: int | None,
    world_size: int,
    min_micro_batch: int = 1,
) -> UserError:
    """smallest: micro-batch that the global batch needs, of which only largest samples fit."""
    asked = "auto" if global_batch_size is None else global_batch_size
    near = nearest_batches(
        global_batch_size or 0, largest, world_size=world_size, min_micro_batch=min_micro_batch
    )
    would_do = f"nearest: {', '.join(map(str, near))}" if near else "no other would do"
    return UserError(
        f"batching.global_batch_size={asked} needs micro-batches of {smallest} or more on "
        f"{world_size} ranks, of which {largest} fit; {would_do}"
    )


def better_batches(plan: Plan, largest: int, min_micro_batch: int = 1) -> list[int]:
    """The nearest global batches that would use 3/4 of what fits, where the plan uses less.

    A plan whose ranks do their whole share in one pass uses all that it can.
    """
    if plan.gradient_accumulation_steps == 1 or plan.micro_batch_size >= WASTEFUL * largest:
        return []
    return nearest_batches(
        plan.global_batch_size,
        largest,
        world_size=plan.world_size,
        min_micro_batch=min_micro_batch,
    )


def nearest_batches(
    global_batch_size: int, largest: int, *, world_size: int, min_micro_batch: int = 1
) -> list[int]:
    """Up to three global batches that some micro-batch between 3/4 of largest and largest makes
    exactly, those nearest to the one given, ascending.
    """
    least = max(min_micro_batch, ceil(WASTEFUL * largest), 1)
    exact = {
        batch
        for per_pass in (size * world_size for size in range(least, largest + 1))
        for batch in _around(global_batch_size, per_pass)
    }
    nearest = sorted(exact, key=lambda batch: (abs(batch - global_batch_size), batch))
    return sorted(nearest[:NUM_NEAREST])


def next_smaller(plan: Plan, failed: int, min_micro_batch: int = 1) -> Plan | None:
    """After memory ran out in training: the same global batch from a micro-batch, the same on all
    ranks, of 0.9 of the failed one at most.

    None: there is none.
    """
    share, rest = divmod(plan.global_batch_size, plan.world_size)
    if rest:
        return None
    sizes = [size for size in divisors(share) if size >= min_micro_batch]
    smaller = _last_within(sizes, failed * 9 // 10)
    return None if smaller is None else Plan(smaller, share // smaller, plan.world_size)


def _share(global_batch_size: int, world_size: int) -> int:
    if global_batch_size % world_size:
        raise UserError(
            f"batching.global_batch_size={global_batch_size} does not divide among "
            f"{world_size} ranks; nearest: {_near(global_batch_size, world_size)}"
        )
    return global_batch_size // world_size


def _too_few(micro_batch_size: int, least: int, world_size: int) -> UserError:
    return UserError(
        f"batching.micro_batch_size={micro_batch_size}: the objectives need at least "
        f"{least} samples per rank and pass (hard negatives come from the same "
        f"micro-batch), batching.global_batch_size {least * world_size} or more"
    )


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _last_within(sizes: Sequence[int], at_most: int) -> int | None:
    """sizes: ascending."""
    count = bisect_right(sizes, at_most)
    return sizes[count - 1] if count else None


def _near(value: int, step: int) -> str:
    return ", ".join(map(str, _around(value, step)))


def _around(value: int, step: int) -> list[int]:
    """The multiples of step next to value, which is none of them or one."""
    below = value // step * step
    return [v for v in (below, below + step) if v > 0]
