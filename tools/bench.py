"""Operations, bytes and time of a training step, by part, against the plain step.

examples:
  python tools/bench.py preset=albef_4m --no-time
  python tools/bench.py preset=albef_4m --device cuda --dtype bf16 --batch 64 --against both \\
      --json out.json --picture out.svg
  python tools/bench.py preset=albef_4m --variants '0.4:pruning.stages=[{layer: 2, lookahead: 2,
      keep_ratio: 0.4}]'

The model has the preset's size, with random weights, images and full-length captions; it needs no
shards and no vocabulary. Operations are two a multiply-add, of matrix products, convolutions and
attention as plain products. Bytes are what the forward leaves alive for the backward: the slope
between half the batch and all of it, and what does not grow with the batch by the step. "needed" is
the closed form of tools/floors.py. Variants are timed in turns: a step of each, then again. Kernels
differ by device and precision, and the bytes with them: count on the device that is to train.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from counts import Counts, count_step
from floors import floor
from stopwatch import (
    BareLoop,
    DeepSpeedLoop,
    autocast,
    matmul_peak,
    summarise,
    time_step,
    weight_dtype,
)
from telling import draw, print_report
from torch import nn
from workload import PROGRESS, NaiveTask, build_task, held, part_of

import elip_ds
from elip_ds.config import Config, load_config
from elip_ds.data import Batch, Vocabulary
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.errors import UserError, exit_with
from elip_ds.launching.parts import PARTS, marked_parts
from elip_ds.objectives import StepContext
from elip_ds.objectives.mlm import mask_words
from elip_ds.tasks import min_micro_batch

DTYPES = ("fp32", "bf16", "autocast")


@dataclasses.dataclass(frozen=True)
class Variant:
    """words: beside those of the command line.  plain: by the naive step."""

    name: str
    config: Config
    words: tuple[str, ...] = ()
    plain: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    variants = plan_variants(args)
    check(args, variants)
    torch.set_num_threads(args.threads)
    report = describe(args, argv)
    report["variants"] = {v.name: count_variant(v, args) for v in variants}
    if not args.no_time:
        add_times(report, variants, args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)
    if args.picture:
        draw(report, args.picture)


# What is asked.


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="preset=NAME and settings")
    parser.add_argument("--deepspeed", metavar="JSON", help="time through DeepSpeed, on one rank")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="bf16 rounds the weights, as DeepSpeed does; autocast does not",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="to time; default 8")
    parser.add_argument(
        "--count-batch", type=int, default=8, metavar="N", help="to count; even, default 8"
    )
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="timed rounds; default 5")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the CPU; default 2")
    parser.add_argument(
        "--against",
        choices=("naive", "unpruned", "both", "none"),
        default="both",
        help="default both",
    )
    parser.add_argument(
        "--variants", nargs="+", default=[], metavar="NAME:key=value,...", help="more of ours"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="time with compiled blocks (the naive step stays as it is)",
    )
    parser.add_argument("--no-time", action="store_true", help="only count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the counts")
    return parser.parse_intermixed_args(argv)


def plan_variants(args: argparse.Namespace) -> list[Variant]:
    """Ours first; the others are compared with it."""
    config = load_config(args.words)
    variants = [Variant("ours", config)]
    if args.against in ("unpruned", "both") and config.pruning.stages:
        plain_vit = "pruning.stages=[]"
        unpruned = load_config([*args.words, plain_vit])
        variants.append(Variant("ours unpruned", unpruned, (plain_vit,)))
    if args.against in ("naive", "both"):
        variants.append(Variant("naive", config, plain=True))
    for entry in args.variants:
        name, colon, rest = entry.partition(":")
        if not (name and colon and rest):
            raise UserError(f"--variants {entry!r}: NAME:key=value,key=value")
        if name in [variant.name for variant in variants]:
            raise UserError(f"--variants {entry!r}: there is a variant {name!r} already")
        words = tuple(split_words(rest))
        variants.append(Variant(name, load_config([*args.words, *words]), words))
    return variants


def split_words(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return words


def check(args: argparse.Namespace, variants: Sequence[Variant]) -> None:
    """Raises UserError for what would fail later."""
    for option in ("batch", "count_batch", "pairs", "threads"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: 1 or more")
    fewest = max(min_micro_batch(variant.config) for variant in variants)
    if args.count_batch % 2 or args.count_batch < 2 * fewest:
        raise UserError(
            f"--count-batch {args.count_batch}: an even number from {2 * fewest}, because half of "
            f"it is counted as well and the objectives need {fewest}"
        )
    if args.batch < fewest:
        raise UserError(f"--batch {args.batch}: the objectives need at least {fewest}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    if args.deepspeed and args.dtype == "autocast":
        raise UserError("--dtype autocast does not go with --deepspeed; use bf16 or fp32")
    for option in ("json", "picture"):
        path = getattr(args, option)
        if path is not None and not path.parent.is_dir():
            raise UserError(f"--{option} {path}: there is no folder {path.parent}")
    if args.picture:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--picture needs matplotlib: pip install 'elip_ds[tools]'") from None


def describe(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """What the numbers depend on."""
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_name()}, {args.threads} threads"
    return {
        "command": shlex.join(["python", "tools/bench.py", *argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "dtype": args.dtype,
        "fp32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {
            "elip_ds": elip_ds.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "count_batch": args.count_batch,
        "batch": args.batch,
        "pairs": args.pairs,
        "compiled": args.compile,
        "deepspeed": args.deepspeed,
        "parts": list(PARTS),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "CPU")


# Counting.


def count_variant(variant: Variant, args: argparse.Namespace) -> dict[str, Any]:
    """Of one image, by part and in total."""
    device, rows = torch.device(args.device), args.count_batch
    task = build_task(variant.config, plain=variant.plain)
    task.to(device, weight_dtype(args.dtype))
    batch = random_batch(variant.config, made_up_vocabulary(variant.config), rows)
    half, whole = (
        count_rows(task, part_of(batch, n), args, backward=n == rows) for n in (rows // 2, rows)
    )
    needed = floor(
        variant.config,
        batch=rows,
        words=batch.input_ids.shape[1],
        guessed=guessed_words(variant.config, made_up_vocabulary(variant.config), batch),
    )
    parts = {}
    for part in PARTS:
        entry = {
            "forward": whole.forward[part] / rows,
            "backward": whole.backward[part] / rows,
            "needed_forward": needed.forward.get(part, 0.0),
            "needed_backward": needed.backward.get(part, 0.0),
        }
        for kind in ("kept", "saved"):
            many, few = getattr(whole, kind)[part], getattr(half, kind)[part]
            entry[f"{kind}_bytes"] = (many - few) / (rows - rows // 2)
            entry[f"{kind}_bytes_per_step"] = many - entry[f"{kind}_bytes"] * rows
        parts[part] = entry
    total = {key: sum(entry[key] for entry in parts.values()) for key in parts[PARTS[0]]}
    return {
        "words": list(variant.words),
        "naive": variant.plain,
        "parts": parts,
        "total": total,
    }


def count_rows(
    task: nn.Module, batch: Batch, args: argparse.Namespace, *, backward: bool
) -> Counts:
    device = torch.device(args.device)
    batch = batch.to(device, weight_dtype(args.dtype))
    fields = (batch.images, batch.input_ids, batch.attention_mask, batch.sample_key)

    def forward() -> Any:
        with autocast(device, args.dtype):
            return task(batch, PROGRESS)

    marks = marked_parts(task.task if isinstance(task, NaiveTask) else task)
    torch.manual_seed(0)
    with marks:
        counts = count_step(
            forward, lambda loss: loss.total, inputs=[*held(task), *fields], backward=backward
        )
    task.zero_grad(set_to_none=True)
    task.drop_carries()  # type: ignore[operator]
    return counts


def guessed_words(config: Config, vocabulary: Vocabulary, batch: Batch) -> float:
    """Of a caption, by MLM as the step draws them, or by LM."""
    ids = batch.input_ids
    if "mlm" not in config.objectives:
        return ids.shape[1] - 1
    noise = StepContext(batch, {}, PROGRESS, seed=config.run.seed).noise
    _, selected = mask_words(
        ids,
        noise("mlm", 3 * ids.shape[1]),
        config.objectives["mlm"].probability,
        vocab_size=len(vocabulary),
        special_ids=vocabulary.special_ids,
    )
    return selected.sum().item() / len(batch)


# Timing.


def add_times(
    report: dict[str, Any], variants: Sequence[Variant], args: argparse.Namespace
) -> None:
    """Puts each variant's times, and the device's peak, into the report."""
    device, dtype = torch.device(args.device), weight_dtype(args.dtype)
    peak = matmul_peak(device, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    loops = build_loops(variants, args)
    batches = {}
    for variant in variants:
        batch = random_batch(variant.config, made_up_vocabulary(variant.config), args.batch)
        batches[variant.name] = batch.pin_memory() if device.type == "cuda" else batch
    steps: dict[str, list[Any]] = {variant.name: [] for variant in variants}
    for turn in range(1 + args.pairs):
        for name, loop in loops.items():
            taken = time_step(loop, batches[name], device, dtype)
            if turn:  # the first one warms up
                steps[name].append(taken)
    operations = {
        name: (
            entry["total"]["forward"] + entry["total"]["backward"],
            entry["total"]["needed_forward"] + entry["total"]["needed_backward"],
        )
        for name, entry in report["variants"].items()
    }
    times = summarise(steps, batch_size=args.batch, operations=operations, peak=peak)
    report["matmul_peak"] = peak
    for name, entry in times.items():
        report["variants"][name]["time"] = entry


def build_loops(variants: Sequence[Variant], args: argparse.Namespace) -> dict[str, Any]:
    """A loop for each variant. Without DeepSpeed those of one shape share weights and optimizer, so
    that one's memory is not the other's.
    """
    device = torch.device(args.device)
    common: dict[str, Any] = {"device": device, "dtype": args.dtype, "compiled": args.compile}
    loops: dict[str, Any] = {}
    first: Any = None
    for variant in variants:
        like = None if args.deepspeed else first and first.task
        task = build_task(variant.config, plain=variant.plain, like=like)
        if args.deepspeed:
            task.to(device)
            more = {"json": args.deepspeed, "batch_size": args.batch}
            loops[variant.name] = DeepSpeedLoop(task, variant.config, **common, **more)
            continue
        task.to(device, weight_dtype(args.dtype))
        shared = first is not None and next(task.parameters()) is next(first.task.parameters())
        optimizer = first.optimizer if shared else None
        loop = BareLoop(task, variant.config, **common, optimizer=optimizer)
        loops[variant.name] = loop
        first = first or loop
    return loops


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
