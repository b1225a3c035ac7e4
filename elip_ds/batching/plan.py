"""Micro-batch x accumulation x ranks = global batch, exactly."""

from dataclasses import dataclass

from elip_ds.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Samples: micro_batch_size per rank and pass, global_batch_size per optimizer step."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size


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
        if global_batch_size % world_size:
            raise UserError(
                f"batching.global_batch_size={global_batch_size} does not divide among "
                f"{world_size} ranks; nearest: {_near(global_batch_size, world_size)}"
            )
        micro_batch_size = global_batch_size // world_size
    assert isinstance(micro_batch_size, int)
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        raise UserError(
            f"batching.global_batch_size={global_batch_size} is not a multiple of "
            f"micro_batch_size x world_size = {micro_batch_size} x {world_size} = {per_pass}; "
            f"nearest: {_near(global_batch_size, per_pass)}"
        )
    if micro_batch_size < min_micro_batch:
        raise UserError(
            f"batching.micro_batch_size={micro_batch_size}: the objectives need at least "
            f"{min_micro_batch} samples per rank and pass (hard negatives come from the same "
            f"micro-batch), batching.global_batch_size {min_micro_batch * world_size} or more"
        )
    return Plan(micro_batch_size, global_batch_size // per_pass, world_size)


def _near(value: int, step: int) -> str:
    below = value // step * step
    return ", ".join(str(v) for v in (below, below + step) if v > 0)
