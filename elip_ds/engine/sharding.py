"""What of a parameter lies on this rank, at any ZeRO stage.

Stages 0 to 2 keep every parameter whole on every rank. Stage 3 keeps a shard of each (`ds_tensor`,
the last one padded) and, of parameters below the persistence threshold, a whole copy made from the
shards.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from elip_ds import dist


def is_sharded(parameter: Any) -> bool:
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Of all of it, wherever it lies."""
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def local_tensor(parameter: Any) -> Tensor:
    """The tensor that holds the parameter here; refresh() after writing to a sharded one."""
    return parameter.ds_tensor.data if is_sharded(parameter) else parameter.data


def refresh(parameters: Iterable[Any]) -> None:
    """Gather the small parameters that stay whole anew from their shards; collective at stage 3."""
    persistent = [p for p in parameters if is_sharded(p) and getattr(p, "ds_persist", False)]
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def gather_whole(parameter: Any, held: Tensor) -> Tensor:
    """held: what this rank has of the parameter, or of a tensor laid out like it -> all of it.

    A collective when the parameter is sharded.
    """
    if not is_sharded(parameter):
        return held
    flat = dist.gather_rows(held.flatten())
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def shard_of(parameter: Any, whole: Tensor) -> Tensor:
    """The inverse of gather_whole: this rank's part of the whole."""
    if not is_sharded(parameter):
        return whole
    size = parameter.ds_tensor.numel()
    padded = whole.new_zeros(size * dist.world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded[dist.rank() * size : (dist.rank() + 1) * size]
