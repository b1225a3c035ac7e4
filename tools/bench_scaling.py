"""Weak scaling from 1 to 2 ranks of one thread, and bytes sent against the closed form.

    python tools/bench_scaling.py --json out.json
    python tools/bench_scaling.py --pairs 9 --steps 20 preset=albef_tiny

Two gloo ranks of this machine train on made-up batches by the real engine in fp32. First every ZeRO
stage with two micro-batches: what the closed form of traffic.py says, what the collectives that
reach PyTorch come to by a ring, and what the kernel has sent on the ranks' sockets. Then, in turns,
one rank and two with as many samples each: 1 is the ratio of a machine whose two cores do not
disturb each other and whose loopback is free.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from traffic import Step, sent_bytes, sizes_of

from elip_ds.config import load_config
from elip_ds.engine import read_ds_config
from elip_ds.errors import UserError, exit_with

ROOT = Path(__file__).parents[1]
MODEL = [
    *("preset=albef_tiny", "model.vision.width=256", "model.text.width=256"),
    *("model.vision.heads=4", "model.text.heads=4", "objectives.mlm.alpha=0.4"),
]
"Wide enough that messages outweigh their headers; its twin runs whole."
WORDS = ["engine.precision=fp32", "engine.fused=torch", "model.text.dropout=0.0"]
ACCUMULATION = 2
RINGS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 2.0}
"Times (W - 1) / W of the whole that gloo sends."


def start_ranks(ranks: int, job: dict[str, Any]) -> dict[str, Any]:
    """What the first rank found. Raises UserError when a rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given, out, log = (Path(folder) / name for name in ("job.json", "out.json", "log"))
        given.write_text(json.dumps(job))
        command = [sys.executable, str(ROOT / "tools" / "scaling_rank.py"), str(given), str(out)]
        processes = []
        with log.open("w") as file:
            for rank in range(ranks):
                env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                env |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
                env |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
                text = os.environ | {name: str(value) for name, value in env.items()}
                started = subprocess.Popen(command, env=text, stdout=file, stderr=file)
                processes.append(started)
            codes = [process.wait() for process in processes]
        if any(codes):
            raise UserError(f"a rank ended with {codes}: {log.read_text().strip()[-500:]}")
        return json.loads(out.read_text())


def job_of(args: argparse.Namespace, stage: int, accumulation: int) -> dict[str, Any]:
    tree = read_ds_config(str(ROOT / "ds_configs" / f"z{stage}.json"))
    return {
        "words": [*(args.words or MODEL), *WORDS],
        "deepspeed": tree,
        "batch": args.batch,
        "accumulation": accumulation,
        "steps": args.steps,
    }


def count_stage(args: argparse.Namespace, stage: int) -> dict[str, float]:
    """Bytes that a rank of two sends in a step: closed form, collectives, sockets."""
    found = start_ranks(2, job_of(args, stage, ACCUMULATION))
    unknown = found["whole_bytes"].keys() - RINGS.keys()
    if any(found["whole_bytes"][name] for name in unknown):
        raise UserError(f"ZeRO {stage} sends by {', '.join(sorted(unknown))}, which is not counted")
    step = Step(
        stage,
        2,
        weight_bytes=4,
        accumulation=ACCUMULATION,
        batch=args.batch,
        width=load_config([*(args.words or MODEL), *WORDS]).model.embed_dim,
    )
    form = sum(sent_bytes(sizes_of(found["sizes"]), step, gloo=True).values())
    asked = sum(RINGS[k] * value / 2 for k, value in found["whole_bytes"].items() if k in RINGS)
    return {"closed_form": form, "collectives": asked, "sockets": found["sent_bytes"]}


def scale(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step with one rank and with two, and the ratio of each pair."""
    job = job_of(args, args.stage, 1)
    pairs = [
        tuple(start_ranks(ranks, job)["seconds"] for ranks in ((1, 2) if i % 2 == 0 else (2, 1)))
        for i in range(args.pairs)
    ]
    seconds = [pair if i % 2 == 0 else pair[::-1] for i, pair in enumerate(pairs)]
    ratios = [one / two for one, two in seconds]
    return {"seconds": seconds, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "words": args.words or MODEL,
        "batch": args.batch,
        "bytes": {stage: count_stage(args, stage) for stage in args.stages},
    }
    if args.pairs:
        report["scaling"] = scale(args) | {"stage": args.stage}
    report["load_after"] = os.getloadavg()
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def show(report: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    table = Table("ZeRO", "closed form, MB", "collectives", "sockets", "sockets / closed form")
    for stage, row in report["bytes"].items():
        cells = [f"{row[key] / 1e6:.3f}" for key in ("closed_form", "collectives", "sockets")]
        table.add_row(str(stage), *cells, f"{row['sockets'] / row['closed_form']:.4f}")
    console.print(table)
    if "scaling" in report:
        found = report["scaling"]
        console.print(
            f"1 -> 2 ranks, ZeRO {found['stage']}, {report['batch']} samples a rank: throughput of "
            f"two over twice that of one {found['median_ratio']:.3f} (lowest "
            f"{min(found['ratios']):.3f}, highest {max(found['ratios']):.3f}, "
            f"{len(found['ratios'])} pairs)"
        )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help=f"default {' '.join(MODEL)}")
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--stage", type=int, default=2, help="of the pairs; default 2")
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank; default 8")
    parser.add_argument("--steps", type=int, default=8, help="measured in a start; default 8")
    parser.add_argument("--pairs", type=int, default=7, help="default 7")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
