"""Look at tar shards: checksums, structure, statistics, and a sheet of pictures with captions.

examples:
  python tools/inspect_shards.py 'shards/coco/train-*.tar'
  python tools/inspect_shards.py 'shards/cc3m/{000000..000331}.tar' --decode --workers 16
  python tools/inspect_shards.py 'shards/coco/train-*.tar' --sheet coco.html --number 60

Leaves with status 1 and one line for each problem if there is any.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elip_ds.data.contact_sheet import draw_samples, write_sheet
from elip_ds.data.inspecting import Contents, inspect_shards, mean, quantile
from elip_ds.data.making import Showing
from elip_ds.data.shards import expand_files, read_index
from elip_ds.errors import UserError, exit_with

SPREADS = {
    "short side, pixels": "short_sides",
    "long side, pixels": "long_sides",
    "width / height": "aspects",
    "words a caption": "words",
    "captions an image": "captions_per_image",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.sheet and args.sheet.suffix not in (".html", ".png"):
        raise UserError(f"--sheet {args.sheet}: a name that ends in .html or .png")
    paths = expand_files(args.pattern, "shards")
    with closing(Showing("inspecting", expected(paths))) as shown:
        contents = inspect_shards(
            paths, decode=args.decode, workers=args.workers, advance=shown.advance
        )
    if args.json:
        print(json.dumps(summary(contents, len(paths))))
    else:
        print_summary(contents, args.pattern, len(paths))
    for problem in contents.problems:
        sys.stderr.write(f"problem: {problem}\n")
    if args.sheet:
        write_sheet(draw_samples(paths, args.number, args.seed), args.sheet, args.pattern)
    if contents.problems:
        raise SystemExit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="inspect_shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("pattern", help="path, glob or brace pattern; several with :: between")
    parser.add_argument("--decode", action="store_true", help="images in full, not their headers")
    parser.add_argument("--workers", type=int, default=0, metavar="K", help="processes; default 0")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help=".html or .png")
    parser.add_argument(
        "--number", type=int, default=40, metavar="N", help="of the sheet's samples"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one draws other samples")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: 0 or more")
    if args.number < 1:
        raise UserError(f"--number {args.number}: 1 or more")
    return args


def expected(paths: list[Path]) -> int:
    """Samples as far as the indexes know."""
    indexes = {folder: read_index(folder) for folder in {path.parent for path in paths}}
    entries = [indexes[path.parent].get(path.name) for path in paths]
    return sum(entry.get("samples", 0) for entry in entries if isinstance(entry, dict))


def spread(counts: Counter[Any]) -> dict[str, Any]:
    shares = {"least": 0.0, "median": 0.5, "p95": 0.95, "most": 1.0}
    return {"mean": round(mean(counts), 2)} | {k: quantile(counts, v) for k, v in shares.items()}


def summary(contents: Contents, shards: int) -> dict[str, Any]:
    return {
        "shards": shards,
        "samples": contents.samples,
        "bytes": contents.bytes,
        "captions": contents.words.total(),
        "repeated_images": contents.repeated_images,
        "formats": dict(contents.formats),
        "problems": contents.problems,
    } | {name: spread(getattr(contents, name)) for name in SPREADS.values()}


def print_summary(contents: Contents, pattern: str, shards: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{pattern}: {shards:,} shards, {contents.samples:,} samples, {contents.words.total():,} "
        f"captions, {contents.bytes:,} bytes"
    )
    table = Table()
    for name in ("", "mean", "least", "median", "95 %", "most"):
        table.add_column(name, justify="right" if name else "left")
    for title, name in SPREADS.items():
        table.add_row(title, *map(str, spread(getattr(contents, name)).values()))
    console.print(table)
    formats = ", ".join(f"{count:,} {name}" for name, count in contents.formats.most_common())
    console.print(f"{formats}; {contents.repeated_images:,} images have the bytes of another")


if __name__ == "__main__":
    try:
        exit_with(main, sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
