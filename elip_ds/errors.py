"""UserError: what a person can put right. Entries print it as one line and leave as it says."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Says what was asked, what was found and what would work, with the config key.

    status: what an entry leaves with.
    """

    status = 2


def leave() -> None:
    """End the process with status 0, skipping the interpreter's tear-down.

    gloo's threads now and then abort there ("terminate called without an active exception"), which
    would turn a run that has finished into a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def exit_with(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run an entry. A UserError becomes one line on rank 0's stderr and its exit status."""
    try:
        main(argv)
    except UserError as error:
        # srun's tasks have Slurm's word for it until they have read their ranks.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.status) from None
