"""Samples a second that one loader process feeds, by stage and against two peers on the same ones.

examples:
  python tools/bench_data.py preset=albef_4m 'data.train=/data/cc3m/train-0000*.tar'
  python tools/bench_data.py preset=albef_4m 'data.train=photos-*.tar' data.rand_augment=null \\
      --images-per-second 900 --json out.json

Peers (tools/data_peers.py): webdataset's plain pipeline on the same shards, and a json list with
image files, as ALBEF's code has it, which are written to a temporary folder. All have one worker,
the same transforms and tokenizer, and take turns: some batches of each, then again. A core's
samples a second are by the worker's CPU time, which other work on the machine changes less than the
clock. The peers hand over normalised floats; ours bytes, which are normalised on the device: what
that would cost on the CPU is named beside. A worker's peak memory has in it what it shares with
this process, torch above all; its own is the rest at the end of a turn. Stages run in this process,
by its CPU time.
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import json
import math
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import simplejpeg
import torch
import webdataset
from bench import cpu_name
from data_peers import json_loader, transforms, webdataset_loader, write_files
from rich.console import Console
from rich.table import Table

import elip_ds
from elip_ds.config import Config, load_config
from elip_ds.data import build_loaders, build_vocabulary, open_sources
from elip_ds.data.augment import keyed_generator, train_image
from elip_ds.data.decode import EncodedImage
from elip_ds.data.order import Place
from elip_ds.data.pairs import Pair, PairDataset
from elip_ds.data.record import BadSample
from elip_ds.dist import Ranks
from elip_ds.errors import UserError, exit_with
from elip_ds.run import Run

STAGES = ("read", "decode", "augment", "tokenize", "collate", "transfer")
WARM = 2
"Batches of a turn that are not timed."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    config = load_config(args.words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, args, Path(folder))
        report = describe(config, args, argv, bench)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in bench.loaders}
        for _ in range(args.pairs):
            for name, open_loader in bench.loaders.items():
                turns[name].append(time_turn(open_loader, args.batches, args.batch))
        report["stages"] = bench.stages()  # last: workers are born with the memory of this process
    report["pipelines"] = summarise(turns, report["stages"]["transfer"])
    report["cores"] = cores(report, args.images_per_second)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="bench_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="preset=NAME and settings")
    numbers = {
        "batch": (32, "samples in a batch"),
        "batches": (20, "timed in a turn"),
        "pairs": (5, "turns of each"),
        "stage_samples": (300, "to time the stages with"),
        "images_per_second": (500, "of one GPU, to be fed"),
    }
    for name, (default, text) in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text}; {default}"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    args = parser.parse_intermixed_args(argv)
    for name in numbers:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: 1 or more")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


class Bench:
    """The samples of a configuration's training shards, and the loaders that compete for them."""

    def __init__(self, config: Config, args: argparse.Namespace, folder: Path) -> None:
        run = Run(Ranks(0, 0, 1, 1, torch.device("cpu")), folder, config.run.seed)
        data = dataclasses.replace(config.data, workers=1, vocabulary="auto", val=config.data.train)
        sources = open_sources(data, run)
        vocabulary = build_vocabulary(data, sources, run, config.model.text.vocab_size)
        self.samples = sum(source.size.samples for source in sources["train"])
        size = config.model.vision.pixels

        def ours() -> Any:
            return build_loaders(
                data,
                sources,
                vocabulary,
                run,
                image_size=size,
                micro_batches=(args.batch,),
                eval_batch_size=args.batch,
                max_eval=None,
            )[0]

        self.dataset: PairDataset = ours().dataset
        self._batch, self._count = args.batch, args.stage_samples
        transform, tokenizer = transforms(data, size), self.dataset.tokenizer
        shards = [Path(path) for source in sources["train"] for path in source.shards]
        listed = write_files(sources["train"], folder)
        self.loaders: dict[str, Callable[[], Any]] = {
            "ours": ours,
            "webdataset": lambda: webdataset_loader(shards, transform, tokenizer, args.batch),
            "json and PIL": lambda: json_loader(listed, transform, tokenizer, args.batch),
        }

    def stages(self) -> dict[str, float]:
        """Seconds a sample, by stage, of the usable ones among the first so many samples."""
        spent: dict[str, float] = defaultdict(float)
        taken = 0
        for first in range(0, self._count, self._batch):
            pairs = []
            for i in range(first, first + self._batch):
                try:
                    pairs.append(self._staged_pair(i % self.samples, spent))
                except BadSample:
                    continue
            taken += len(pairs)
            with _lap(spent, "collate"):
                batch = self.dataset._batch(pairs, [])
            with _lap(spent, "transfer"):
                batch.to(torch.device("cpu"), torch.float32)
        return {stage: spent[stage] / taken for stage in STAGES}

    def _staged_pair(self, i: int, spent: dict[str, float]) -> Pair:
        """What a PairDataset does for a training sample, with a watch in the hand."""
        dataset, config = self.dataset, self.dataset.config
        starts = np.cumsum([0, *(source.size.samples for source in dataset.sources)])
        source = int(np.searchsorted(starts, i, side="right")) - 1
        place = Place(source, i - int(starts[source]), 0)
        with _lap(spent, "read"):
            shard, at = dataset._locate(place.source, place.sample)
            reader = dataset._reader(dataset.sources[place.source], shard)
            record = dataset._patience(reader.read, at)
        with _lap(spent, "augment"):
            image = TimedImage(record.image, max_pixels=config.max_pixels)
            pixels = train_image(image, dataset.image_size, keyed_generator(i), config)
        spent["decode"] += image.seconds
        spent["augment"] -= image.seconds
        with _lap(spent, "tokenize"):
            ids = dataset.tokenizer(record.captions[0])
        return Pair(pixels, ids, i, record.key)


class TimedImage(EncodedImage):
    """seconds: spent on header and pixels so far."""

    def __init__(self, data: bytes, **limits: int) -> None:
        started = time.process_time()
        super().__init__(data, **limits)
        self.seconds = time.process_time() - started

    def pixels(self, shrink: int = 1) -> np.ndarray:
        started = time.process_time()
        pixels = super().pixels(shrink)
        self.seconds += time.process_time() - started
        return pixels


@contextlib.contextmanager
def _lap(spent: dict[str, float], stage: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[stage] += time.process_time() - started


def time_turn(open_loader: Callable[[], Any], batches: int, batch_size: int) -> dict[str, float]:
    """A fresh loader with its worker, warmed up, then timed; memory at its end.

    The worker has always something to do meanwhile: nothing but its speed is waited for.
    """
    before = {child.pid for child in psutil.Process().children()}
    loader = open_loader()
    iterator = iter(loader)
    for _ in range(WARM):
        next(iterator)
    worker = max(
        (child for child in psutil.Process().children() if child.pid not in before),
        key=lambda child: child.memory_info().rss,
    )
    started, busy = time.perf_counter(), _cpu_seconds(worker.pid)
    for _ in range(batches):
        next(iterator)
    samples = batches * batch_size
    turn = {
        "per_second": samples / (time.perf_counter() - started),
        "per_core_second": samples / (_cpu_seconds(worker.pid) - busy),
        "peak_bytes": _kilobytes(worker.pid, "status", "VmHWM") * 1024,
        "own_bytes": 1024
        * sum(
            _kilobytes(worker.pid, "smaps_rollup", f"Private_{kind}") for kind in ("Dirty", "Clean")
        ),
    }
    del iterator, loader
    gc.collect()  # ends the worker
    return turn


def _cpu_seconds(pid: int) -> float:
    """Of all threads, finer than the hundredths of a second that psutil has."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def _kilobytes(pid: int, file: str, name: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def summarise(turns: dict[str, list[dict[str, float]]], normalising: float) -> dict[str, Any]:
    """Medians of each pipeline, and how many times its samples a second ours are, turn by turn.

    normalising: seconds a sample that ours would take for floats, which the peers hand over.
    """
    ours = turns["ours"]
    summary = {}
    for name, taken in turns.items():
        entry: dict[str, Any] = {
            "per_second": statistics.median(turn["per_second"] for turn in taken),
            "per_core_second": statistics.median(turn["per_core_second"] for turn in taken),
            "peak_bytes": max(turn["peak_bytes"] for turn in taken),
            "own_bytes": max(turn["own_bytes"] for turn in taken),
            "turns": taken,
        }
        for rate in ("per_second", "per_core_second"):
            ratios = [a[rate] / b[rate] for a, b in zip(ours, taken, strict=True)]
            floats = [
                1 / (1 / a[rate] + normalising) / b[rate] for a, b in zip(ours, taken, strict=True)
            ]
            entry[f"ours_{rate}"] = {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "normalised_median": statistics.median(floats),
            }
        summary[name] = entry
    return summary


def cores(report: dict[str, Any], images_per_second: int) -> dict[str, float]:
    """Loader cores that a GPU of so many images a second keeps busy, by pipeline."""
    return {"images_per_second": images_per_second} | {
        name: images_per_second / entry["per_core_second"]
        for name, entry in report["pipelines"].items()
    }


# What the numbers depend on, and how they are shown.


def describe(
    config: Config, args: argparse.Namespace, argv: list[str], bench: Bench
) -> dict[str, Any]:
    libraries = (elip_ds, torch, np, PIL, simplejpeg, webdataset)
    return {
        "command": shlex.join(["python", "tools/bench_data.py", *argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_name(),
        "versions": {lib.__name__: lib.__version__ for lib in libraries}
        | {"python": platform.python_version()},
        "samples": bench.samples,
        "image_size": list(config.model.vision.pixels),
        "batch": args.batch,
        "batches": args.batches,
        "pairs": args.pairs,
    }


def print_report(report: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    height, width = report["image_size"]
    console.print(f"{report['device']}; {report['samples']} samples to {width} x {height} pixels")
    stages = Table("stage", title="one process, a sample")
    stages.add_column("ms", justify="right")
    stages.add_column("share", justify="right")
    total = sum(report["stages"].values())
    for stage, seconds in report["stages"].items():
        stages.add_row(stage, f"{seconds * 1e3:.3f}", f"{seconds / total:.0%}")
    stages.add_row("together", f"{total * 1e3:.3f}", f"{1 / total:.0f}/s")
    console.print(stages)
    console.print(pipeline_table(report))
    wanted = report["cores"]["images_per_second"]
    console.print(
        f"A GPU that takes {wanted} images/s keeps {report['cores']['ours']:.2f} cores busy here, "
        f"so data.workers={math.ceil(report['cores']['ours'])} or more for each."
    )


def pipeline_table(report: dict[str, Any]) -> Table:
    table = Table(
        "pipeline, one worker",
        title=f"medians of {report['pairs']} turns of {report['batches']} batches of "
        f"{report['batch']}; in brackets, ours with normalising on the CPU",
    )
    for column in (
        "samples/s",
        "a core",
        "ours, by the clock",
        "ours, by CPU time",
        "peak MB",
        "own MB",
        "cores",
    ):
        table.add_column(column, justify="right")
    for name, entry in report["pipelines"].items():
        table.add_row(
            name,
            f"{entry['per_second']:.0f}",
            f"{entry['per_core_second']:.0f}",
            *(_times(entry[f"ours_{rate}"]) for rate in ("per_second", "per_core_second")),
            f"{entry['peak_bytes'] / 1e6:.0f}",
            f"{entry['own_bytes'] / 1e6:.0f}",
            f"{report['cores'][name]:.2f}",
        )
    return table


def _times(ratio: dict[str, float]) -> str:
    return (
        f"{ratio['median']:.2f} ({ratio['normalised_median']:.2f}), "
        f"{ratio['lowest']:.2f}..{ratio['highest']:.2f}"
    )


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
