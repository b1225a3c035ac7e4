"""Run a command that dies when its parent dies, whatever kills that: it then leaves no orphan.

    python tether.py PARENT_PID COMMAND [WORD ...]

The wish is the kernel's to keep (PR_SET_PDEATHSIG), survives the exec and needs nothing of the
command. It is a script of its own because a command may take seconds until it can do anything.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(argv[0]):  # it died before the wish was there
        raise SystemExit(1)
    if "SLURM_STEP_ID" in os.environ:
        # Slurm has bound the rank that probes to its own cores; these ranks are all of the node's.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    os.execvp(argv[1], argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
