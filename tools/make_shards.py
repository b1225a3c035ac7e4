"""Write a built-in source as tar shards, which data.train and data.val then name.

example: python tools/make_shards.py scenes --out data/big --train 50000 --image-size 96
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from elip_ds import registry
from elip_ds.data.shards import write_shards
from elip_ds.errors import UserError, exit_with


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    source = registry.resolve(registry.SOURCES, args.source, "source")
    refuse_leftovers(args.out, args.source)
    splits = {}
    for split, count in (("train", args.train), ("val", args.val)):
        prefix = f"{args.source}-{split}"
        try:
            records = source(split, count, image_size=args.image_size)
            shown = track(
                records,
                f"{prefix}:",
                count,
                console=Console(stderr=True),
                disable=not sys.stderr.isatty(),
            )
            shards = write_shards(shown, args.out, prefix)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}") from None
        except ValueError as error:  # the source's own: it cannot do what the options ask for
            raise UserError(str(error)) from None
        splits[split] = {
            "shards": len(shards),
            "samples": count,
            "bytes": sum(path.stat().st_size for path in shards),
        }
    if args.json:
        print(json.dumps({"source": args.source, "out": str(args.out), "splits": splits}))
    else:
        print_table(args, splits)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="make_shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help=f"one of: {', '.join(registry.SOURCES)}")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made if missing")
    parser.add_argument("--train", type=samples, default=12000, metavar="N", help="default 12000")
    parser.add_argument("--val", type=samples, default=1000, metavar="N", help="default 1000")
    parser.add_argument(
        "--image-size", type=int, default=64, metavar="S", help="pixels, default 64"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return parser.parse_args(argv)


def samples(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} samples are no split; 1 or more")
    return number


def refuse_leftovers(folder: Path, source: str) -> None:
    """Raises UserError if the folder holds shards that a pattern would mix with the new ones."""
    found = sorted(folder.glob(f"{source}-*.tar"))
    if found:
        raise UserError(f"--out {folder} holds {found[0].name} already; name another folder")


def print_table(args: argparse.Namespace, splits: dict[str, dict[str, int]]) -> None:
    table = Table(title=f"{args.source} in {args.out}")
    table.add_column("split")
    for name in ("shards", "samples", "bytes"):
        table.add_column(name, justify="right")
    for split, numbers in splits.items():
        table.add_row(split, *(f"{number:,}" for number in numbers.values()))
    Console(highlight=False, soft_wrap=True).print(table)


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
