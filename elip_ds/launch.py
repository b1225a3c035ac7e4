"""Plan, probe, train: python -m elip_ds.launch plan|probe|run [preset=NAME] [key=value ...]"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from elip_ds.config import load_config
from elip_ds.dist import read_ranks
from elip_ds.engine import json_batch, read_ds_config
from elip_ds.errors import UserError, exit_with
from elip_ds.launching import (
    plan_all,
    probe_as_rank,
    probe_here,
    show_plans,
    supervise,
    training_command,
)
from elip_ds.launching.endings import DoesNotFit
from elip_ds.logs import setup_logging
from elip_ds.run import list_checkpoints

USAGE = """\
usage: python -m elip_ds.launch plan|probe|run [preset=NAME] [key=value ...] --deepspeed JSON [...]

plan    what a step would take, by part, and the largest micro-batch that fits: no device, no data
probe   what fits on this machine, by real steps in processes of their own, or by the plan alone if
        it takes half of the memory at most (batching.probe=always: by steps); it is remembered;
        under srun, with a task for each rank, of all nodes of the job
run     train: by deepspeed on this machine, by srun inside a Slurm allocation; where memory runs
        out, start again with a smaller micro-batch from the last checkpoint

  --deepspeed JSON      such as ds_configs/z2.json
  --device-memory SIZE  of a rank: 24GiB, a device's name (a5000, a100-80, h100, ...), cpu:16GiB
  --ranks N             plan: of the whole job; probe, run: on this machine
  --compare KEY=VALUE   plan: a second plan beside the first, with these settings; may be repeated.
                        deepspeed=JSON is one of them, and attention=eager: without fused kernels
  --json FILE           plan, probe: write all numbers
  --dry-run             run: print the command only

examples:
  python -m elip_ds.launch plan preset=albef_4m --deepspeed ds_configs/z2.json \\
      --device-memory 24GiB --ranks 4 --compare pruning.stages=[]
  python -m elip_ds.launch probe --deepspeed ds_configs/z2.json --device-memory cpu:2GiB --ranks 2
  python -m elip_ds.launch run --deepspeed ds_configs/z2.json run.name=mine
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see python -m elip_ds.launch --help")


def main(argv: list[str]) -> None:
    options = parse_arguments(argv)
    words = [*options.words]
    if options.device_memory is not None:
        words.append(f'batching.device_memory="{options.device_memory}"')
    if options.verb == "plan":
        plans = plan_all(words, options.deepspeed, options.ranks, options.compare)
        _write(options.json, plans)
        sys.stdout.write(show_plans(plans))
        largest = plans[0]["largest"] or 0
        if largest < max(plans[0]["least"], plans[0].get("micro_batch_size", 0)):
            raise SystemExit(DoesNotFit.status)
        if "micro_batch_size" not in plans[0]:
            raise SystemExit(UserError.status)
        return
    setup_logging(0)
    settings = ["--deepspeed", options.deepspeed, *words]
    config = load_config(settings)  # every fault of it shows before anything starts
    tree = read_ds_config(options.deepspeed)
    if options.verb == "probe":
        if read_ranks().world_size > 1:  # srun has started one process for each rank
            record = probe_as_rank(config, tree)
        else:
            record = probe_here(config, tree, options.ranks)
        if record is not None:
            _write(options.json, record)
        return

    def command(micro: int | None, total: int | None) -> Any:
        sizes = {"micro_batch_size": micro, "global_batch_size": total}
        more = [f"batching.{name}={size}" for name, size in sizes.items() if size is not None]
        return training_command([*settings, *more], options.ranks)

    if options.dry_run:
        sys.stdout.write(f"{command(None, None)}\n")
        return
    folder = Path(config.run.dir) / config.run.name
    if options.ranks and not torch.cuda.is_available() and "SLURM_JOB_ID" not in os.environ:
        micro = json_batch(tree, config.batching, options.ranks)[1]
        if micro == "auto" and not list_checkpoints(folder / "ckpt"):
            _probe_apart(settings, options.ranks)
    raise SystemExit(supervise(command, folder, config.batching.oom_retries))


def _probe_apart(settings: list[str], ranks: int) -> None:
    """Before training, which then remembers: on a CPU what planning takes, 25 MiB, would else stay
    in the memory of rank 0. Leaves with the status of a probe that finds nothing.
    """
    words = [sys.executable, "-m", "elip_ds.launch", "probe", *settings, "--ranks", str(ranks)]
    status = subprocess.run(words).returncode
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for anything that is not known."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        raise SystemExit(0 if argv else 2)
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("verb", choices=("plan", "probe", "run"))
    parser.add_argument("words", nargs="*")
    parser.add_argument("--deepspeed", required=True)
    parser.add_argument("--device-memory")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--compare", action="append", nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_intermixed_args(argv)
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: 1 or more")
    return options


def _write(path: Path | None, record: Any) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(record, indent=1))
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from None


if __name__ == "__main__":
    try:
        exit_with(main, sys.argv[1:])
    except KeyboardInterrupt:  # what was started has been ended on the way here
        sys.exit("error: interrupted; no process is left")
