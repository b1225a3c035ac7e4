"""Unequal micro-batches where ranks differ in memory: each rank's share of a pass.

Shares go by memory alone: a rank that holds twice the samples gets about twice, however fast it is.
"""

from collections.abc import Sequence

from elip_ds.batching.plan import Plan, divisors, nearest_batches, plan_batch
from elip_ds.errors import UserError


def share_out(
    largest: Sequence[int],
    global_batch_size: int | None,
    *,
    multiple_of: int = 1,
    min_micro_batch: int = 1,
    max_global: int | None = None,
) -> Plan:
    """The plan of the fewest passes a step.

    largest: what fits on each rank.  global_batch_size: fixed, or None: as many as fit in one pass
    of all ranks, up to max_global.  multiple_of is a wish, met where it costs no pass.

    Raises UserError, with the nearest global batches that would do, when there is none.
    """
    room = sum(largest)
    if global_batch_size is None:
        most = room if max_global is None else min(room, max_global)
        totals = [most // multiple_of * multiple_of, most]
        passes = 1
    else:
        passes = next((n for n in divisors(global_batch_size) if global_batch_size // n <= room), 0)
        totals = [global_batch_size // passes] if passes else []
    for unit in (multiple_of, 1):
        for total in totals:
            sizes = deal(total, largest, unit, min_micro_batch)
            if sizes is not None:
                return _plan(sizes, passes)
    near = nearest_batches(
        global_batch_size or 0,
        room,
        world_size=1,
        min_micro_batch=min_micro_batch * len(largest),
    )
    would_do = f"nearest: {', '.join(map(str, near))}" if near else "no other would do"
    raise UserError(
        f"batching.global_batch_size={global_batch_size or 'auto'} cannot be shared out: "
        f"{' + '.join(map(str, largest))} samples fit, each rank needs {min_micro_batch} or more "
        f"in every pass; {would_do}"
    )


def deal(total: int, largest: Sequence[int], unit: int, least: int) -> tuple[int, ...] | None:
    """total samples in multiples of unit, least or more for each rank and the rest in proportion to
    what more it could hold; None where that cannot be.
    """
    first = -(-least // unit)
    spare = [size // unit - first for size in largest]
    left, rest = divmod(total, unit)
    left -= first * len(largest)
    if rest or min(spare) < 0 or not 0 <= left <= sum(spare):
        return None
    whole = max(1, sum(spare))
    more = [left * part // whole for part in spare]
    # Who lost most by rounding down is first to get what is left.
    order = sorted(range(len(spare)), key=lambda i: (-(left * spare[i] % whole), i))
    for i in order[: left - sum(more)]:
        more[i] += 1
    return tuple((first + part) * unit for part in more)


def _plan(sizes: tuple[int, ...], passes: int) -> Plan:
    if len(set(sizes)) == 1:
        return plan_batch(sum(sizes) * passes, sizes[0], world_size=len(sizes))
    return Plan(max(sizes), passes, len(sizes), unequal=sizes)
