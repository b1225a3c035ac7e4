"""What of a parameter lies on this rank, at any ZeRO stage.

Stages 0 to 2 keep every parameter whole on every rank. Stage 3 keeps a shard of each (`ds_tensor`, the
last one padded) and, for parameters below the persistence threshold, the whole data as well.
"""

from torch import Tensor, nn

from elip_ds import dist


def is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def local_tensors(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors that hold the parameter here; an elementwise update must touch all of them."""
    if not is_sharded(parameter):
        return [parameter.data]
    shard = parameter.ds_tensor.data
    return [shard, parameter.data] if getattr(parameter, "ds_persist", False) else [shard]


def gather_whole(parameter: nn.Parameter, held: Tensor) -> Tensor:
    """held: what this rank has of the parameter, or of a tensor laid out like it -> all of it.

    A collective when the parameter is sharded.
    """
    if not is_sharded(parameter):
        return held
    flat = dist.gather_rows(held.flatten())
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def shard_of(parameter: nn.Parameter, whole: Tensor) -> list[Tensor]:
    """The inverse of gather_whole, one tensor for each of local_tensors."""
    if not is_sharded(parameter):
        return [whole]
    size = parameter.ds_tensor.numel()
    padded = whole.new_zeros(size * dist.world_size())
    padded[: whole.numel()] = whole.flatten()
    shard = padded[dist.rank() * size : (dist.rank() + 1) * size]
    return [shard, whole] if len(local_tensors(parameter)) == 2 else [shard]
