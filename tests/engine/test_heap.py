"""What is freed goes back to the system at once, in a process of its own: it stays so."""

import subprocess
import sys

import pytest

# A block, above it one that stays, and what is resident when the first is freed.
PROGRAM = """
import sys
import torch
from elip_ds.engine.heap import return_at_once
if sys.argv[1] == "at once":
    return_at_once()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

MIB = 2**20
torch.ones(16 * MIB, dtype=torch.uint8)  # glibc learns from it to keep as much
kept = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(16)]
before = resident()
kept[:-1] = []
print((before - resident()) / MIB)
"""


# Of 60 MiB. Meanwhile a page or two may be touched for the first time.
@pytest.mark.slow
@pytest.mark.parametrize(("how", "least", "most"), [("at once", 59, 61), ("later", -1, 8)])
def test_freed_memory(how, least, most):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    assert least <= float(done.stdout) <= most, done.stderr
