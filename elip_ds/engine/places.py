"""Which elements of which parameters lie where in the tensors that DeepSpeed's optimizers step.

ZeRO 1 and 2 step this rank's equal slice of all parameters of a group, laid end to end; ZeRO 3
steps this rank's shards of a sub-group's parameters, one after the other; without ZeRO a tensor is
a parameter. As of DeepSpeed 0.19; values prove it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elip_ds import dist
from elip_ds.engine.sharding import is_sharded
from elip_ds.errors import UserError


class Piece(NamedTuple):
    """start, size: where it is in the tensor.  owner: number of its parameter among the place's.
    offset: of its first element in that parameter.
    """

    start: int
    size: int
    owner: int
    offset: int


@dataclass(frozen=True)
class Place:
    """flat: a tensor of fp32 weights that the optimizer steps on this rank.  params: those of which
    the ranks' tensors of this place hold pieces.  pieces: in order; what none covers is padding.
    """

    flat: Tensor
    params: Sequence[Any]
    pieces: Sequence[Piece]

    def fault(self) -> str | None:
        """What is not as it is taken to be. Masters begin as copies of the model's weights, so that
        equal values prove the places.
        """
        if self.flat.dtype != torch.float32:
            return f"weights are kept in {self.flat.dtype}, not in fp32"
        end = max((piece.start + piece.size for piece in self.pieces), default=0)
        if end > self.flat.numel():
            return f"{end} elements expected, {self.flat.numel()} found"
        flat = self.flat.detach().view(-1)
        for start, size, owner, offset in self.pieces:
            p = self.params[owner]
            whole = p.ds_tensor if is_sharded(p) else p
            model = whole.detach().flatten()[0 if is_sharded(p) else offset :][:size]
            if not torch.equal(flat[start : start + size].to(model.device, model.dtype), model):
                return "the values are others"
        return None


def find_places(optimizer: torch.optim.Optimizer, wrapped: Any) -> list[Place]:
    """wrapped: the engine's optimizer, as deepspeed.initialize made it around ours, no step taken
    yet. Every rank calls it. Raises UserError, on all ranks, when a layout is another.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    places: list[Place]
    if wrapped is optimizer:
        places = [_whole(p, p) for group in optimizer.param_groups for p in group["params"]]
    elif isinstance(wrapped, FP16_UnfusedOptimizer):
        pairs = zip(wrapped.fp32_groups, wrapped.fp16_groups, strict=True)
        places = [_whole(m, p) for group in pairs for m, p in zip(*group, strict=True)]
    elif isinstance(wrapped, FP16_Optimizer):
        flats = zip(wrapped.fp32_groups_flat, wrapped.fp16_groups, strict=True)
        places = [sliced(flat, group, _ends(group), first=0) for flat, group in flats]
    elif isinstance(wrapped, DeepSpeedZeroOptimizer_Stage3):
        flats = zip(wrapped.fp32_partitioned_groups_flat, wrapped.fp16_groups, strict=True)
        places = [_sharded(flat, group) for flat, group in flats]
    elif isinstance(wrapped, DeepSpeedZeroOptimizer):
        groups = wrapped.round_robin_bit16_groups
        offsets = wrapped.round_robin_bit16_offsets
        slices = zip(wrapped.single_partition_of_fp32_groups, groups, offsets, strict=True)
        places = [sliced(*place) for place in slices]
    elif isinstance(wrapped, BF16_Optimizer):
        flats = zip(wrapped.fp32_groups_flat_partition, wrapped.bf16_groups, strict=True)
        places = [sliced(flat, group, _ends(group)) for flat, group in flats]
    else:
        raise UserError(
            f"where DeepSpeed's {type(wrapped).__name__} keeps the weights is not known; ZeRO 0 to "
            "3 of the shipped ds_configs work"
        )
    fault = next(filter(None, (place.fault() for place in places)), None)
    faults = [f for f in dist.gather_objects(fault) if f]
    if faults:
        raise UserError(
            f"which weights lie where in DeepSpeed's flat tensors cannot be told "
            f"({type(wrapped).__name__}: {faults[0]}); ZeRO 0 to 3 of the shipped ds_configs work"
        )
    return places


def _whole(master: Tensor, p: Tensor) -> Place:
    return Place(master, [p], [Piece(0, p.numel(), 0, 0)])


def _ends(params: Sequence[Tensor]) -> list[int]:
    """Where each of consecutive parameters begins."""
    offsets, at = [], 0
    for p in params:
        offsets.append(at)
        at += p.numel()
    return offsets


def sliced(
    flat: Tensor, params: Sequence[Tensor], offsets: Sequence[int], first: int | None = None
) -> Place:
    """flat: the elements from first on of parameters laid end to end, each at its offset.

    first: None: the ranks hold equal slices.
    """
    start = dist.rank() * flat.numel() if first is None else first
    end = start + flat.numel()
    pieces = []
    for owner, (p, offset) in enumerate(zip(params, offsets, strict=True)):
        low, high = max(start, offset), min(end, offset + p.numel())
        if low < high:
            pieces.append(Piece(low - start, high - low, owner, low - offset))
    return Place(flat, params, sorted(pieces))


def _sharded(flat: Tensor, params: Sequence[Any]) -> Place:
    """ZeRO 3: a shard of each, padded to the same length on all ranks with whatever the memory
    held.
    """
    at, pieces = 0, []
    for owner, p in enumerate(params):
        length = p.partition_numel()
        offset = dist.rank() * length
        real = max(0, min(length, p.ds_numel - offset))
        if real:
            pieces.append(Piece(at, real, owner, offset))
        at += length
    return Place(flat, params, pieces)
