"""Go on from a checkpoint on another number of ranks, at another ZeRO stage, in another precision.

DeepSpeed's files hold what each rank had: fp32 weights and the optimizer's averages, flat, in an
order that is the stage's. Read here by parameter, whole, and put wherever the new engine keeps
them; no value is rounded or averaged, so that the next step is the one that would have followed.
Nothing is written and no other tool is needed. Layouts are those of DeepSpeed 0.19.

differs from DeepSpeed's universal checkpoints: those need a conversion on disk, know no stage 0 and
go neither from stage 2 to 3 nor back.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elip_ds.config import read_config
from elip_ds.engine.checkpoint import weights_only_classes
from elip_ds.engine.optim import parameter_groups
from elip_ds.engine.places import Place
from elip_ds.engine.sharding import local_tensor, refresh, shard_of, whole_shape
from elip_ds.errors import UserError
from elip_ds.run import CONFIG

MASTER = "master"
AVERAGES = ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"What moves in DeepSpeed's fp16 loss scale."


def differences(meta: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What makes DeepSpeed's own loading impossible, as 'world_size 2 -> 3'."""
    return [f"{key} {meta[key]} -> {value}" for key, value in here.items() if meta[key] != value]


@dataclass(frozen=True)
class Part:
    """Parameters that were stepped as one tensor on each rank.

    shapes: by name, in order.  ranks: of each rank, MASTER and, once a step was taken, AVERAGES,
    flat.  sharded: each rank has a piece of every parameter (ZeRO 3), padded to the same length;
    else the ranks' tensors laid end to end are the parameters laid end to end, and padding.
    """

    shapes: Mapping[str, tuple[int, ...]]
    ranks: Sequence[Mapping[str, Tensor]]
    sharded: bool = False

    def __post_init__(self) -> None:
        sizes = [prod(shape) for shape in self.shapes.values()]
        needed = sum(-(-size // len(self.ranks)) for size in sizes) if self.sharded else sum(sizes)
        for key in self.ranks[0]:
            held = [rank[key].numel() for rank in self.ranks]
            if min(held) < needed if self.sharded else sum(held) < needed:
                raise ValueError(f"{key} of {next(iter(self.shapes))}...: {held} of {needed}")

    @cached_property
    def starts(self) -> dict[str, int]:
        """Where each parameter begins: in every rank's tensor if sharded, else in all of them."""
        starts, at = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = at
            at += -(-prod(shape) // len(self.ranks)) if self.sharded else prod(shape)
        return starts

    def whole(self, name: str, key: str) -> Tensor:
        """A parameter's values, flat."""
        tensors = [rank[key].view(-1) for rank in self.ranks]
        at, size = self.starts[name], prod(self.shapes[name])
        if self.sharded:
            length = -(-size // len(tensors))
            return torch.cat([x[at : at + length] for x in tensors])[:size]
        return _span(tensors, at, at + size)


def _span(tensors: Sequence[Tensor], low: int, high: int) -> Tensor:
    """Elements low to high of tensors laid end to end."""
    found, start = [], 0
    for x in tensors:
        found.append(x[max(low - start, 0) : max(high - start, 0)])
        start += x.numel()
    return torch.cat(found)


@dataclass(frozen=True)
class Saved:
    """All parts of a checkpoint.  step: updates done.  scaler: of SCALER, what there is."""

    parts: Sequence[Part]
    step: int
    scaler: Mapping[str, Any]

    @property
    def names(self) -> set[str]:
        return set(self._part)

    @cached_property
    def _part(self) -> dict[str, Part]:
        return {name: part for part in self.parts for name in part.shapes}

    def whole(self, name: str, key: str) -> Tensor:
        """A parameter's fp32 weights or averages, flat."""
        return self._part[name].whole(name, key)

    @property
    def averaged(self) -> bool:
        """Whether a step was taken before it was saved."""
        return AVERAGES[0] in self.parts[0].ranks[0]


def read_saved(folder: Path, meta: Mapping[str, Any], task: nn.Module) -> Saved:
    """From the files of every rank that wrote the checkpoint; nothing is unpickled but tensors.

    task: its names and shapes are those of the checkpoint. Raises UserError for files that are not
    there, cut, or not what DeepSpeed 0.19 writes.
    """
    try:
        return _read_plain(folder, task) if meta["zero_stage"] == 0 else _read_zero(folder, meta)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder} cannot go on in another form: {reason}") from None


def _load(path: Path) -> dict[str, Any]:
    """On the CPU, read from disk as it is used: a rank needs a part of it only."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    with torch.serialization.safe_globals(weights_only_classes()):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _read_zero(folder: Path, meta: Mapping[str, Any]) -> Saved:
    sharded = meta["zero_stage"] == 3
    first = "zero_pp_rank_0_" if sharded else ""
    shapes = _load(folder / f"{first}mp_rank_00_model_states.pt")["param_shapes"]
    files = {
        int(number[1]): path
        for path in folder.glob("*_optim_states.pt")
        if (number := re.search(r"zero_pp_rank_(\d+)_", path.name))
    }
    missing = sorted(set(range(meta["world_size"])) - files.keys())
    if missing:
        raise FileNotFoundError(f"*zero_pp_rank_{missing[0]}_*_optim_states.pt is missing")
    ranks = [_load(files[rank])["optimizer_state_dict"] for rank in range(meta["world_size"])]
    masters = "fp32_flat_groups" if sharded else "single_partition_of_fp32_groups"
    averages = "optimizer_state_dict" if sharded else "base_optimizer_state"
    states = [_States(rank[averages], rank[masters]) for rank in ranks]
    parts = [
        Part({k: tuple(v) for k, v in shape.items()}, [s.tensors(i) for s in states], sharded)
        for i, shape in enumerate(shapes)
    ]
    scaler = ranks[0].get("loss_scaler")
    return Saved(parts, _agreed_step(states), _of_scaler({} if scaler is None else vars(scaler)))


def _read_plain(folder: Path, task: nn.Module) -> Saved:
    """Stage 0: every rank had all of it, and the first has written it."""
    tree = _load(folder / "mp_rank_00_model_states.pt")
    optimizer, shapes = tree["optimizer"], _order(folder, task)
    averages = optimizer.get("optimizer_state_dict", optimizer)
    if "fp32_groups_flat" in optimizer:  # half precision, by a kernel that steps flat groups
        states = _States(averages, optimizer["fp32_groups_flat"])
    else:
        shapes = [{name: shape} for group in shapes for name, shape in group.items()]
        if "fp32_groups" in optimizer:
            masters = [x for group in optimizer["fp32_groups"] for x in group]
        else:
            masters = [tree["module"][name] for group in shapes for name in group]
        states = _States(averages, masters)
    parts = [Part(group, [states.tensors(i)]) for i, group in enumerate(shapes)]
    return Saved(parts, _agreed_step([states]), _of_scaler(optimizer))


def _order(folder: Path, task: nn.Module) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the optimizer's groups, as the checkpoint's own configuration has made
    them.
    """
    names = {id(p): (name, p) for name, p in task.named_parameters()}
    groups = parameter_groups(task, read_config(folder / CONFIG).optim)
    return [
        {name: whole_shape(p) for name, p in (names[id(p)] for p in group["params"])}
        for group in groups
    ]


class _States:
    """tree: an optimizer's state_dict.  masters: what it stepped, in the order of its groups."""

    def __init__(self, tree: Mapping[str, Any], masters: Sequence[Tensor]) -> None:
        self.masters, self.groups = masters, tree["param_groups"]
        numbers = [number for group in self.groups for number in group["params"]]
        if tree["state"] and len(numbers) != len(masters):
            raise ValueError(f"{len(numbers)} states of {len(masters)} tensors")
        self.states = [tree["state"][number] for number in numbers] if tree["state"] else []

    def tensors(self, index: int) -> dict[str, Tensor]:
        averages = {key: self.states[index][key] for key in AVERAGES} if self.states else {}
        return {MASTER: self.masters[index].detach(), **averages}

    def steps(self) -> set[int]:
        # apex counts by group.
        counted = [state["step"] for state in self.states if "step" in state]
        counted += [group["step"] for group in self.groups if "step" in group and not counted]
        return {int(count) for count in counted}


def _agreed_step(states: Sequence[_States]) -> int:
    steps = set().union(*(part.steps() for part in states))
    if len(steps) > 1:
        raise ValueError(f"its parameters differ in the updates they had: {sorted(steps)}")
    return max(steps, default=0)


def _of_scaler(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tree[key] for key in SCALER if tree.get(key) is not None}


def check_saved(saved: Saved, weights: Mapping[str, Tensor], share: tuple[int, int]) -> None:
    """Raises UserError unless the parts put together are the checkpoint's own whole weights.

    weights: by name, whole.  share: (n, of): every of-th parameter, from n on, as the ranks share
    the work.
    """
    names = sorted(saved.names)
    odd = saved.names ^ {name for name in weights if not name.startswith("teacher.")}
    if odd:
        raise UserError(f"DeepSpeed's files and weights.safetensors differ in {min(odd)}")
    for name in names[share[0] :: share[1]]:
        if not torch.equal(saved.whole(name, MASTER), weights[name].flatten()):
            raise UserError(f"DeepSpeed's files hold other values of {name} than the weights do")


@torch.no_grad()
def put_saved(
    saved: Saved, places: Sequence[Place], optimizer: torch.optim.Optimizer, task: nn.Module
) -> None:
    """Into this rank's fp32 weights, averages and model. Every rank calls it.

    places: of the optimizer that this start has, as find_places gives them.
    """
    held: dict[int, list[tuple[dict[str, Tensor], Any]]] = {}
    for place in places:
        tensors = {MASTER: place.flat.detach().view(-1)}
        if saved.averaged:
            tensors |= _averages(optimizer, place.flat)
            _set_step(optimizer, place.flat, saved.step)
        for piece in place.pieces:
            held.setdefault(id(place.params[piece.owner]), []).append((tensors, piece))
    parameters = dict(task.named_parameters())
    for name, p in parameters.items():
        if name not in saved.names:
            continue
        master = saved.whole(name, MASTER)
        here = local_tensor(p)
        here.copy_(shard_of(p, master.view(whole_shape(p))).view(here.shape))
        for tensors, (start, size, _, offset) in held.get(id(p), []):
            for key, target in tensors.items():
                whole = master if key == MASTER else saved.whole(name, key)
                target[start : start + size].copy_(whole[offset : offset + size])
    refresh(p for p in parameters.values() if p.requires_grad)


def _averages(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[flat]
    for key in AVERAGES:
        if key not in state:
            state[key] = torch.zeros_like(flat)
    return {key: state[key].view(-1) for key in AVERAGES}


def _set_step(optimizer: torch.optim.Optimizer, flat: Tensor, step: int) -> None:
    if type(optimizer).__module__.startswith("apex."):
        for group in optimizer.param_groups:
            group["step"] = step
    elif isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[flat]["step"] = torch.tensor(float(step), device=flat.device)
    else:
        optimizer.state[flat]["step"] = step


def set_scaler(saved: Saved, wrapped: Any) -> None:
    """The fp16 loss scale goes on where it was. wrapped: the engine's optimizer."""
    scaler = getattr(wrapped, "loss_scale_config", None) or wrapped.loss_scaler
    for key, value in saved.scaler.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)
