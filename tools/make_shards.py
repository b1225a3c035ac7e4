"""Make tar shards of a raw data set: for data.train and data.val of a run.

examples:
  python tools/make_shards.py karpathy file=dataset_coco.json images=coco --out shards/coco \\
      --prefix train --resize 384 --workers 16
  python tools/make_shards.py img2dataset folder=cc3m --out shards/cc3m --dedup --workers 16
  python tools/make_shards.py scenes split=val count=1000 --out data/scenes --prefix val

Shards are written whole or not at all. The same command again, after a kill or a full disk, makes
those that are missing. What was left out, and why, is in FOLDER/skipped.jsonl; counts, checksums
and statistics are in FOLDER/index.json.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elip_ds import registry
from elip_ds.data.making import Job, Made, list_items, make_shards
from elip_ds.data.raw import open_raw, settings
from elip_ds.errors import UserError, exit_with


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")

    def format_help(self) -> str:
        kinds = {name: registry.resolve(registry.SOURCES, name, "") for name in registry.SOURCES}
        lines = [
            f"  {name:14} {settings(kind)}\n{'':17}{kind.__doc__}\n" for name, kind in kinds.items()
        ]
        return super().format_help() + "\nkinds:\n" + "".join(lines)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    source = open_raw(args.kind, args.words)
    job = Job(
        kind=args.kind,
        config=source.config,
        folder=args.out,
        prefix=args.prefix or args.kind,
        per_shard=args.per_shard,
        short_side=args.resize,
        quality=args.quality,
        check=args.check,
        dedup=args.dedup,
        max_bad_share=args.max_bad_share,
    )
    if args.plan:
        print_plan(job)
        return
    began = time.monotonic()
    made = make_shards(job, args.workers)
    if args.json:
        print(json.dumps({"out": str(args.out), "prefix": job.prefix, **vars(made)}))
    else:
        print_made(job, made, time.monotonic() - began)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="make_shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("kind", metavar="KIND", help="of the raw data set; see below")
    parser.add_argument("words", nargs="*", metavar="key=value", help="where it is; see below")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made if missing")
    parser.add_argument("--prefix", metavar="P", help="shards are P-000000.tar, ...; default KIND")
    parser.add_argument(
        "--per-shard", type=positive, default=1000, metavar="N", help="samples; default 1000"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="K",
        help="processes; default one a core, 0 is none beside this one",
    )  # fmt: skip
    parser.add_argument(
        "--resize", type=positive, metavar="S",
        help="pixels that a short side is brought down to; smaller images stay as they are",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of JPEGs made anew; default 90"
    )
    parser.add_argument(
        "--dedup", action="store_true", help="keep one of images with the same bytes, the first"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not decode what is only copied"
    )
    parser.add_argument(
        "--max-bad-share", type=float, default=0.9, metavar="X",
        help="of a shard's samples; more unusable ones than that stop; default 0.9",
    )  # fmt: skip
    parser.add_argument(
        "--plan", "--dry-run", action="store_true", help="only say what would be made"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    args = parser.parse_intermixed_args(argv)
    if args.prefix is not None and not re.fullmatch(r"[A-Za-z0-9_=+.-]+", args.prefix):
        raise UserError(f"--prefix {args.prefix!r}: letters, digits and _=+.-")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: 1 to 100")
    if not 0 <= args.max_bad_share <= 1:
        raise UserError(f"--max-bad-share {args.max_bad_share}: 0 to 1")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: 0 or more")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; 1 or more")
    return number


def print_plan(job: Job) -> None:
    listing = list_items(job.open_source())
    shards = -(-listing.samples // job.per_shard)
    print(f"{listing.samples:,} samples in {shards:,} shards of up to {job.per_shard:,}")
    if shards:
        print(f"from {job.shard(0)} to {job.shard(shards - 1)}")
    if listing.renamed:
        print(f"{len(listing.renamed):,} keys come twice and would get a number")


def print_made(job: Job, made: Made, seconds: float) -> None:
    table = Table(title=f"{job.kind} in {job.folder}/{job.prefix}-*.tar")
    for name in ("shards", "samples", "captions", "bytes"):
        table.add_column(name, justify="right")
    table.add_row(
        *(f"{getattr(made, name):,}" for name in ("shards", "samples", "captions", "bytes"))
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{made.new_shards:,} shards made now, in {seconds:.1f} s")
    for reason, count in made.skipped.most_common():
        console.print(f"skipped {count:,} of {made.listed:,}: {reason}")
    if made.skipped:
        console.print(f"which ones: {job.folder}/skipped.jsonl")
    if made.renamed:
        more = f" to {made.renamed[-1]}" if len(made.renamed) > 1 else ""
        console.print(
            f"{len(made.renamed):,} keys came twice and got a number, {made.renamed[0]}{more}"
        )


if __name__ == "__main__":
    try:
        exit_with(main, sys.argv[1:])
    except KeyboardInterrupt:  # the workers have been ended on the way here
        sys.exit("error: interrupted; whole shards stay, the same command goes on")
