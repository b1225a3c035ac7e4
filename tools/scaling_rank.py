"""One rank of tools/bench_scaling.py: real optimizer steps, their times and what they send.

What is sent is counted twice. By what PyTorch is asked for: every collective that reaches c10d,
DeepSpeed's and ours, with the bytes that a ring sends for it. And by the kernel: the bytes that it
has sent on this process's TCP sockets (Linux), headers of gloo's messages included.
"""

import contextlib
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elip_ds import dist
from elip_ds.batching import Plan
from elip_ds.config import load_config
from elip_ds.data import Batch
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.engine import Engine
from elip_ds.run import Run, seed_everything
from elip_ds.tasks import build_pretrain

WARM_UP = 3
"Steps before any counts: the first ones make states, and teach ZeRO-3 the order of modules."
BYTES_SENT = 200
"Where struct tcp_info holds tcpi_bytes_sent."
KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}


class Collectives(TorchDispatchMode):
    """called: bytes of the whole tensors, by kind, and how many calls; others than KINDS by name.

    The whole of a gather is its result, of a scatter its input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            kind = KINDS.get(name, name)
            whole = args[1] if kind == "reduce_scatter" else args[0]
            tensors = [x for x in tree_leaves(whole) if isinstance(x, Tensor)]
            self.whole_bytes[kind] += sum(x.numel() * x.element_size() for x in tensors)
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def bytes_sent() -> int:
    """On all TCP connections of this process, since each began."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        # Suppressed: it is gone, or no socket, or no TCP.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 8)
            total += struct.unpack_from("Q", info, BYTES_SENT)[0]
    return total


class Repeated:
    """In place of a TrainLoader: one batch for ever."""

    samples_per_epoch, bad = 10**6, 0

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __iter__(self) -> "Repeated":
        return self

    def __next__(self) -> Batch:
        return self._batch


def work(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """job: as bench_scaling.py makes it."""
    config = load_config(job["words"])
    ranks = dist.read_ranks()
    dist.meet(ranks)
    dist.start(ranks)
    run = Run(ranks, folder, config.run.seed)
    seed_everything(run.seed)
    vocabulary = made_up_vocabulary(config)
    task = build_pretrain(config, vocabulary)
    plan = Plan(job["batch"], job["accumulation"], ranks.world_size)
    sizes = [(p.numel(), p.requires_grad) for p in task.parameters()]
    engine = Engine(config, job["deepspeed"], task, plan, run)
    stream: Any = Repeated(random_batch(config, vocabulary, job["batch"]))
    for _ in range(WARM_UP):
        engine.train_step(stream)
    dist.barrier()
    seconds, before = [], bytes_sent()
    for _ in range(job["steps"]):
        started = time.perf_counter()
        engine.train_step(stream)
        seconds.append(time.perf_counter() - started)
    sent = (bytes_sent() - before) / job["steps"]
    with Collectives() as collectives:
        engine.train_step(stream)
    return {
        "seconds": statistics.median(seconds),
        "sent_bytes": sent,
        "whole_bytes": dict(collectives.whole_bytes),
        "calls": dict(collectives.calls),
        "sizes": sizes,
    }


if __name__ == "__main__":
    given, out = (Path(word) for word in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        found = work(json.loads(given.read_text()), Path(folder))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(found))
    dist.stop()
