"""The only file that calls torch.distributed: start, agree, gather, sum.

With one rank every function is the identity, so nothing above asks how many ranks there are.
Row order everywhere: rank 0's rows first, then rank 1's, ...
"""

import datetime
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor
from torch.distributed import distributed_c10d

from elip_ds.errors import DeviceError, NodeError


@dataclass(frozen=True)
class Ranks:
    """rank, local_rank: 0-based.  world_size: ranks of the job.  local_world_size: on this node."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device


def read_ranks() -> Ranks:
    """Who this process is, from the launcher's variables (deepspeed, torchrun), else Slurm's.

    A process that nobody launched is the only rank. Starts nothing. Raises DeviceError where
    ranks and GPUs do not match.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env["LOCAL_WORLD_SIZE"] = _tasks_of_node(
            env.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(env.get("SLURM_NODEID", 0))
        )
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank = int(env.get("LOCAL_RANK", 0))
    local_world = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1)))
    return Ranks(rank, local_rank, world_size, local_world, _device_of(local_rank, local_world))


def _device_of(local_rank: int, local_world: int) -> torch.device:
    """A GPU of its own for each rank of a node, or the CPU for all where there is none."""
    env = os.environ
    if torch.cuda.is_available():
        seen = torch.cuda.device_count()
        if local_world > seen:
            raise DeviceError(
                f"{local_world} ranks on this node and torch sees {seen} of its GPUs; start as "
                "many ranks as GPUs (Slurm: --ntasks-per-node as --gpus-per-node, and no "
                "--gpus-per-task or --gpu-bind, which show each rank one alone)"
            )
        return torch.device("cuda", local_rank)
    given = env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS")
    if given and env.get("CUDA_VISIBLE_DEVICES", given):
        raise DeviceError(
            f"Slurm gives this node's ranks GPUs ({given}) and torch sees none: look at nvidia-smi "
            f"there; torch {torch.__version__} wants a driver for CUDA {torch.version.cuda}, a "
            "container --nv. To train on CPUs all the same: CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cpu")


def _tasks_of_node(per_node: str, node: int) -> str:
    """per_node: as Slurm writes it; "2(x3),1" is 2 tasks on each of three nodes, then 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
    tasks = [number for number, times in found for _ in range(int(times or 1))]
    return tasks[node] if node < len(tasks) else tasks[0]


def node_name() -> str:
    """Slurm's, where there is one: several of its nodes may be one host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


_store: Any = None
_notes: dict[str, str] = {}
"Where ranks leave notes for each other before they join; with one rank, the second."


def meet(ranks: Ranks, timeout_seconds: float = 1800) -> None:
    """Open the store of notes at the launcher's address. No device is touched, so that a rank's
    children have all of its memory to measure with.
    """
    global _store
    if _store is not None or ranks.world_size == 1:
        return
    env = os.environ
    assert "MASTER_PORT" in env, "a launcher of several ranks sets MASTER_PORT"
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's has one already
    address, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env["MASTER_PORT"])
    try:
        _store = td.TCPStore(
            address,
            port,
            ranks.world_size,
            is_master=ranks.rank == 0 and not agent,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
    except td.DistNetworkError as error:
        why = "is in use by another program" if "EADDRINUSE" in str(error) else "cannot be reached"
        raise NodeError(
            f"MASTER_PORT={port}: that port of {address} {why}; choose another, as in "
            "deepspeed --master_port 29511"
        ) from None


def leave_note(name: str, value: object) -> None:
    """For all ranks to read; value: what JSON can hold."""
    if _store is None:
        _notes[name] = json.dumps(value)
    else:
        _store.set(f"elip/{name}", json.dumps(value))


def read_note(name: str, timeout_seconds: float) -> Any:
    """What some rank left, waiting for it. Raises TimeoutError."""
    if _store is None:
        return json.loads(_notes[name])
    try:
        _store.wait([f"elip/{name}"], datetime.timedelta(seconds=timeout_seconds))
    except td.DistStoreError:
        raise TimeoutError(f"no rank left a note {name!r} in {timeout_seconds:g} s") from None
    except td.DistNetworkError:
        raise TimeoutError("rank 0 has ended, see its log") from None
    return json.loads(_store.get(f"elip/{name}"))


def start(ranks: Ranks, timeout_seconds: float = 1800) -> None:
    """Join the process group: NCCL for CUDA tensors, gloo for CPU tensors.

    timeout_seconds: a rank that waits longer for the others ends with an error.
    """
    if td.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # DeepSpeed makes groups of its own, and how long those wait is torch's default.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        assert ranks.world_size == 1, "a launcher of several ranks sets MASTER_PORT"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    for name in ("rank", "local_rank", "world_size"):
        os.environ.setdefault(name.upper(), str(getattr(ranks, name)))
    if ranks.world_size > 1:
        _time_collectives()
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.device)
    td.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=None if _store is None else td.PrefixStore("group", _store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=ranks.device if cuda else None,
    )


_collective_seconds = 0.0
_COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "barrier"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_gather_object", "all_to_all_single"),
)


def collective_seconds() -> float:
    """How long collectives have held up this process since it joined, waiting for others included,
    DeepSpeed's among them. One that runs in the background, as all do on a GPU, hardly counts.
    """
    return _collective_seconds


def _time_collectives() -> None:
    """Whoever calls them by torch.distributed's names; they come once at most, as no two nest."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            global _collective_seconds
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _collective_seconds += time.perf_counter() - start

        return call

    for name in _COLLECTIVES:
        function = getattr(td, name)
        if not hasattr(function, "__wrapped_for_time__"):
            wrapped = timed(function)
            wrapped.__wrapped_for_time__ = True  # type: ignore[attr-defined]
            setattr(td, name, wrapped)


def stop() -> None:
    """Leave the process group, if one was joined."""
    if td.is_initialized():
        td.destroy_process_group()


_pretended = 0


@contextmanager
def pretended_ranks(world_size: int) -> Iterator[None]:
    """As if this were the first of so many ranks, and without a word to any: results have the right
    shapes, and whatever values.
    """
    global _pretended
    before, _pretended = _pretended, world_size
    try:
        yield
    finally:
        _pretended = before


def world_size() -> int:
    return _pretended or (td.get_world_size() if td.is_initialized() else 1)


def rank() -> int:
    return td.get_rank() if td.is_initialized() and not _pretended else 0


def barrier() -> None:
    if world_size() > 1:
        td.barrier()


_deal: tuple[int, ...] = ()


def deal_samples(micro_batches: Sequence[int]) -> None:
    """Say how many samples of a pass each rank has, where that is not the same on all of them."""
    global _deal
    _deal = () if len(set(micro_batches)) == 1 else tuple(micro_batches)


def sample_weight() -> float:
    """What makes this rank's mean its part of the mean over all ranks' samples: 1 where all have
    as many.
    """
    return world_size() * _deal[rank()] / sum(_deal) if _deal and not _pretended else 1.0


def _counts(own: int) -> list[int]:
    """Samples of each rank, of which this one has so many."""
    if not _deal or _pretended:
        return [own] * world_size()
    return [own * size // _deal[rank()] for size in _deal]


def samples_before(own: int) -> int:
    """The place of this rank's first sample among those of all ranks, of which it has so many."""
    return sum(_counts(own)[: rank()])


def gather_samples(x: Tensor) -> Tensor:
    """x: (B, ...), B whole micro-batches of this rank -> those of all ranks, rank by rank. No
    gradient.
    """
    counts = _counts(len(x))
    if min(counts) == max(counts):
        return gather_rows(x)
    wide = x.new_zeros((max(counts), *x.shape[1:]))
    wide[: len(x)] = x.detach()
    parts = gather_rows(wide).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_rows(x: Tensor) -> Tensor:
    """x: (B, ...), equal B on every rank -> (world_size * B, ...), rank by rank. No gradient."""
    if world_size() == 1:
        return x.detach()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    own = x.detach().contiguous()
    if not _pretended:
        td.all_gather_into_tensor(out, own)
    return out


class _GatherSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.counts = _counts(len(x))
        return gather_samples(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        most = max(ctx.counts)
        own = grad.new_empty((most, *grad.shape[1:]))
        whole = grad.contiguous()
        if min(ctx.counts) < most:
            whole = grad.new_zeros((len(ctx.counts), *own.shape))
            for row, part in zip(whole, grad.split(ctx.counts), strict=True):
                row[: len(part)] = part
            whole = whole.flatten(0, 1)
        if not _pretended:
            td.reduce_scatter_tensor(own, whole)
        return own[: ctx.counts[rank()]]


def gather_samples_with_grad(x: Tensor) -> Tensor:
    """As gather_samples; the gradient of x is the sum of what all ranks have for x's rows.

    Every rank goes backward through it, or none does.
    """
    return _GatherSamples.apply(x) if world_size() > 1 else x


def sum_over_ranks(x: Tensor) -> Tensor:
    """A new tensor: the elementwise sum over ranks. No gradient."""
    x = x.detach().clone()
    if world_size() > 1 and not _pretended:
        td.all_reduce(x)
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    """A new tensor: the elementwise maximum over ranks. No gradient."""
    x = x.detach().clone()
    if world_size() > 1 and not _pretended:
        td.all_reduce(x, op=td.ReduceOp.MAX)
    return x


def gather_objects(value: object) -> list:
    """One picklable value per rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    td.all_gather_object(values, value)
    return values
