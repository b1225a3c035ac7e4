"""Largest micro-batches by the plan, models by devices, as the table of docs/performance.md.

    python tools/plan_table.py --deepspeed ds_configs/z2.json --ranks 8 preset=albef_4m [...]

Every device of a model asks the same tracer, so that a size is traced once for all of them.
"""

import argparse
import sys
from pathlib import Path

from elip_ds.batching.devices import find_device
from elip_ds.batching.plan import MAX_MICRO_BATCH
from elip_ds.config import load_config
from elip_ds.engine import read_ds_config
from elip_ds.errors import exit_with
from elip_ds.launching.budget import left_free
from elip_ds.launching.forecast import Forecast

DEVICES = ("A5000", "A100-40", "A100-80", "H100", "H200")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="+", metavar="preset=NAME")
    parser.add_argument("--deepspeed", type=Path, default=Path("ds_configs/z2.json"))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--devices", nargs="+", default=DEVICES)
    args = parser.parse_args(argv)
    devices = [find_device(name) for name in args.devices]
    print("| preset |", " | ".join(args.devices), "| MB a sample |")
    print("| --- " * (len(devices) + 2) + "|")
    for preset in args.presets:
        rows = [_row(args, preset, devices, words) for words in ([], ["pruning.stages=[]"])]
        (pruned, slope), (whole, whole_slope) = rows
        cells = [f"{a} / {b} ({a / b:.2f})" for a, b in zip(pruned, whole, strict=True)]
        name = preset.partition("=")[2]
        print(f"| `{name}` |", " | ".join(cells), f"| {slope:.1f} / {whole_slope:.1f} |")


def _row(
    args: argparse.Namespace, preset: str, devices: list, words: list[str]
) -> tuple[list[int], float]:
    config = load_config(["--deepspeed", str(args.deepspeed), preset, *words])
    tree = read_ds_config(str(args.deepspeed))
    forecast = Forecast(config, tree, world_size=args.ranks, device="cuda")
    fitting = []
    for device in devices:
        usable = device.memory_bytes - device.outside_bytes
        budget = (usable - left_free(config.batching, usable, "cuda")) / device.kappa
        fitting.append(forecast.largest(int(budget), range(1, MAX_MICRO_BATCH + 1)) or 0)
    return fitting, (forecast.slope() or 0) / 1e6


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
