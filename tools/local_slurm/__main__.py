"""A throw-away Slurm on this machine, for tests and for people without a cluster.

examples:
  eval "$(python tools/local_slurm up --nodes 2)"    # in seconds; sets SLURM_CONF in this shell
  sbatch slurm/pretrain_4m.sh preset=demo
  python tools/local_slurm status
  python tools/local_slurm down                      # ends its jobs too, and leaves nothing behind

Needs Debian's packages: apt-get install --no-install-recommends slurm-wlm munge. The cluster is for
the user who started it, root or not, and refuses to start beside another one.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from cluster import ask_slurm, conf_of, default_folder, start_cluster, stop_cluster

from elip_ds.errors import UserError, exit_with


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    folder = args.dir.absolute()
    if args.verb == "up":
        started = time.monotonic()
        conf = start_cluster(folder, args.nodes, args.line)
        seconds = time.monotonic() - started
        sys.stderr.write(f"{args.nodes} nodes idle after {seconds:.1f} s\n")
        print(f"export SLURM_CONF={conf}")
    elif args.verb == "down":
        stop_cluster(folder)
    else:
        conf = conf_of(folder)
        print(f"export SLURM_CONF={conf}")
        nodes = ask_slurm(conf, "sinfo", "--Node")
        if not nodes:
            raise UserError(f"--dir {folder}: slurmctld does not answer; `down`, then `up`")
        print(nodes + ask_slurm(conf, "squeue"), end="")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for anything that is not known."""
    parser = _Parser(
        prog="python tools/local_slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--nodes", type=int, default=2, help="of this machine; all CPUs are each's")
    parser.add_argument(
        "--line",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="up: for slurm.conf besides, such as 'PartitionName=low Nodes=ALL'; may be repeated",
    )
    parser.add_argument(
        "--dir", type=Path, default=default_folder(), help="of all it writes; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}: 1 or more")
    return args


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
