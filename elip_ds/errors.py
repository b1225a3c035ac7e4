"""UserError: what a person can put right. Entries print it as one line and leave with status 2."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Says what was asked, what was found and what would work, with the config key."""


def leave() -> None:
    """End the process with status 0, skipping the interpreter's tear-down.

    gloo's threads now and then abort there ("terminate called without an active exception"), which
    would turn a run that has finished into a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def exit_with(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run an entry. A UserError becomes one line on rank 0's stderr and exit status 2."""
    try:
        main(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
