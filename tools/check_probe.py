"""Hold the probe to the truth: the largest micro-batch that runs, found by bisection.

    python tools/check_probe.py --budgets 1100MiB 1300MiB 1600MiB --stages 1 2 3
    python tools/check_probe.py --budgets 1300MiB --long 200   # and then run the choice for long

On this machine's CPU, two ranks unless said otherwise. A budget is of a rank, all that it takes
included. Every try is a fresh group of ranks under a hard limit, the long run too, which has the
choice with the default headroom and captions of random lengths. Exits with 1 where a choice is
above the truth, below 97 % of it without headroom or 90 % with the default, or failed for long.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elip_ds.batching.cache import Cache
from elip_ds.batching.sizes import parse_bytes
from elip_ds.config import Config, load_config
from elip_ds.engine.trial_job import TrialJob
from elip_ds.errors import exit_with
from elip_ds.launching.local_ranks import Patience
from elip_ds.launching.node import Node, answer_for_node
from elip_ds.launching.real_steps import RealSteps

LEAST = {"none": 0.97, "default": 0.90}
"Of the true maximum, by headroom."
MODELS = {"pruned": [], "unpruned": ["pruning.stages=[]"]}


@dataclass
class Row:
    """One budget, stage and model. chosen, seconds: by headroom.  long_passed: with the default."""

    budget: str
    stage: int
    model: str
    chosen: dict[str, int]
    seconds: dict[str, float]
    truth: int
    long_steps: int = 0
    long_passed: bool | None = None

    @property
    def missed(self) -> list[str]:
        shares = {name: size / self.truth for name, size in self.chosen.items()}
        wrong = [name for name, share in shares.items() if not LEAST[name] <= share <= 1]
        return wrong + (["long"] if self.long_passed is False else [])


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    rows = []
    for budget in args.budgets:
        for stage in args.stages:
            for model in args.models:
                with tempfile.TemporaryDirectory(prefix="elip_probe_") as folder:
                    rows.append(check(args, budget, stage, model, Path(folder)))
                print_rows(rows[-1:])
                if args.json is not None:  # a long table is kept as far as it went
                    args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print_rows(rows)
    if any(row.missed for row in rows):
        raise SystemExit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--budgets", nargs="+", default=["1100MiB", "1300MiB", "1600MiB"])
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--long", type=int, default=0, help="steps that the choice then has to run")
    parser.add_argument("--json", type=Path)
    return parser.parse_intermixed_args(argv)


def check(args: argparse.Namespace, budget: str, stage: int, model: str, folder: Path) -> Row:
    words = [*args.words, *MODELS[model], f"batching.device_memory=cpu:{budget}"]
    words += ["batching.probe=always", "batching.multiple_of=1"]
    words += ["batching.global_batch_size=auto"]
    tree: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    chosen, seconds = {}, {}
    for name, share in (("default", "auto"), ("none", "0")):
        config = load_config([*words, f"batching.headroom={share}"])
        started = time.perf_counter()
        node = Node(config, tree, ("auto", "auto"), args.ranks, args.ranks, "cpu", folder / name)
        chosen[name] = answer_for_node(node, Cache(folder / f"cache-{name}"))["largest"]
        seconds[name] = time.perf_counter() - started
    truth = bisect(config, tree, parse_bytes(budget, "--budgets"), args.ranks, chosen, folder)
    row = Row(budget, stage, model, chosen, seconds, truth)
    if args.long:
        row.long_steps = args.long
        limit = parse_bytes(budget, "--budgets")
        steps = _steps(config, tree, limit, args.ranks, folder / "long")
        steps = replace(steps, verify_steps=args.long, captions="random")
        row.long_passed = _fits(steps, chosen["default"], limit)
    return row


def bisect(
    config: Config,
    tree: dict[str, Any],
    budget_bytes: int,
    ranks: int,
    chosen: dict[str, int],
    folder: Path,
) -> int:
    """The largest micro-batch that passes six steps; a start for every try."""
    steps = _steps(config, tree, budget_bytes, ranks, folder / "truth")
    passed, failed = 0, None
    size = chosen["none"]
    stride = max(1, size // 32)
    while failed is None or failed - passed > 1:
        if _fits(steps, size, budget_bytes):
            passed = size
        else:
            failed = size
        size = passed + stride if failed is None else (passed + failed) // 2
        stride *= 2
    return passed


def _steps(config: Config, tree: dict[str, Any], limit: int, ranks: int, folder: Path) -> RealSteps:
    job = TrialJob(config, tree, sizes=[], limit_bytes=limit)
    return RealSteps(job, ranks, folder, Patience(total_seconds=3600))


def _fits(steps: RealSteps, size: int, budget_bytes: int) -> bool:
    peaks = steps.verify(size).peaks
    return peaks is not None and peaks.highest <= budget_bytes


def print_rows(rows: list[Row]) -> None:
    table = Table()
    for name in (
        "budget",
        "stage",
        "model",
        "truth",
        "no headroom",
        "default",
        "seconds",
        "long",
        "missed",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        shares = [f"{n} ({n / row.truth:.2f})" for n in (row.chosen["none"], row.chosen["default"])]
        times = "/".join(f"{row.seconds[name]:.0f}" for name in ("none", "default"))
        long = {None: "", True: f"{row.long_steps} passed", False: "failed"}[row.long_passed]
        cells = [row.budget, str(row.stage), row.model, str(row.truth), *shares, times, long]
        table.add_row(*cells, ", ".join(row.missed))
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
