"""Convert weights: published files and DeepSpeed's to ours, ours to published ones.

examples:
  python tools/convert_weights.py --from albef ALBEF_4M.pth --to elip_ds --out albef.safetensors
  python tools/convert_weights.py --from elip_ds runs/my_run --to albef --out mine.pth
  python tools/convert_weights.py --from deepspeed runs/my_run --to elip_ds --out whole.safetensors

Shows what became of every name. A name that is missing or left over is an error, and nothing is
written. OUT is safetensors if it is called so, else a file of torch.save.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from elip_ds.errors import UserError, exit_with
from elip_ds.run import META, find_checkpoint
from elip_ds.weights import FROM, TO, Source, open_file, open_own, save_own, save_published


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if (args.source == "elip_ds") == (args.to == "elip_ds"):
        raise UserError(f"--from {args.source} --to {args.to}: one of the two must be elip_ds")
    width = None if sys.stdout.isatty() else 240  # in a file no name is broken
    console = Console(highlight=False, width=width)
    source = open_any(args)
    if args.source != "elip_ds":
        console.print(source.report.table())
        source.report.check()
        save_own(source, args.out)
    else:
        console.print(save_published(source, args.to, args.out).table())
    console.print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB", soft_wrap=True)


def open_any(args: argparse.Namespace) -> Source:
    if args.source == "deepspeed":
        return open_deepspeed(args.file)
    return open_file(args.source, args.file, args.head_width, args.activation)


def open_deepspeed(path: Path) -> Source:
    """A run, a checkpoint of one, or any folder that DeepSpeed wrote."""
    folder = path if list(path.glob("*_states.pt")) else find_checkpoint(path)
    if (folder / META).is_file() and (folder / "weights.safetensors").is_file():
        return open_own(folder)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's logger
        from elip_ds.engine import consolidate
    return open_own(folder, consolidate(folder))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="convert_weights.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sources, targets = [*FROM, "deepspeed"], ["elip_ds", *TO]
    parser.add_argument("--from", dest="source", choices=sources, required=True, help="what it is")
    parser.add_argument("file", type=Path, help="a file; of elip_ds and deepspeed also a folder")
    parser.add_argument("--to", choices=targets, required=True, help="what to make of it")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--head-width", type=int, default=64, metavar="N", help="of an attention head; default 64"
    )
    parser.add_argument(
        "--activation",
        choices=("gelu", "quick_gelu"),
        help="of CLIP's towers; as OpenAI (clip) or open_clip trained if not given",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
