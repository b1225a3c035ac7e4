"""UserError: what a person can put right. Entries print it as one line and leave as it says."""

import os
import socket
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Says what was asked, what was found and what would work, with the config key.

    status: what an entry leaves with.
    """

    status = 2


class NodeError(UserError):
    """May be of one node alone, of which rank 0 has not heard: the first rank there says so."""


class PassingError(UserError):
    """May be gone at a later start, as when a file server does not answer. slurm/common.sh starts
    again where it would not for a setting.
    """

    status = 14


class DeviceError(NodeError, PassingError):
    """A node's ranks and GPUs do not match: asked for wrongly, or a GPU is gone."""


def leave(status: int = 0) -> NoReturn:
    """End the process, skipping the interpreter's tear-down.

    gloo's threads now and then abort there ("terminate called without an active exception"), which
    would turn a run that has finished into a failed one, and a refusal into a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_with(main: Callable[[list[str]], None], argv: list[str]) -> NoReturn:
    """Run an entry of ranks: exit_with, and leave."""
    try:
        exit_with(main, argv)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    leave()


def exit_with(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run an entry. A UserError becomes one line on rank 0's stderr and its exit status; a
    NodeError one of each node that it befell.
    """
    try:
        main(argv)
    except UserError as error:
        # srun's tasks have Slurm's word for it until they have read their ranks.
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        if rank == "0":
            sys.stderr.write(f"error: {error}\n")
        elif local_rank == "0" and isinstance(error, NodeError):
            sys.stderr.write(f"error: rank {rank} on {socket.gethostname()}: {error}\n")
        raise SystemExit(error.status) from None
