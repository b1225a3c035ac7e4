"""Starting again after memory ran out, with programs that behave as training does."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from elip_ds.batching.cache import Cache, default_folder
from elip_ds.engine.out_of_memory import OOM_FOLDER
from elip_ds.launching.handover import Command
from elip_ds.launching.supervise import RetriesUsedUp, newest_oom, supervise

# Runs out of memory above a micro-batch that it is given, as a rank of the engine leaves.
TRAINING = """
import json, os, sys, time
folder, fits, micro, world, total = sys.argv[1], *map(int, sys.argv[2:])
open(f"{folder}/tried", "a").write(f"{micro}\\n")
open(f"{folder}/told", "a").write(os.environ["ELIP_DS_OUT_OF_MEMORY_RETRIES"] + "\\n")
if micro > fits:
    os.makedirs(f"{folder}/memory", exist_ok=True)
    for rank in (1, 0):
        record = {"rank": rank, "micro_batch_size": micro, "step": 3, "min_micro_batch": 2,
                  "gradient_accumulation_steps": total // (micro * world),
                  "micro_batches": [micro] * world,
                  "asked_bytes": 2**20, "time": time.time()}
        json.dump(record, open(f"{folder}/memory/oom-{rank}.json", "w"))
    sys.exit(77)
"""


def command_for(folder: Path, fits: int, first: int = 32, total: int = 64):
    script = folder / "training.py"
    script.write_text(TRAINING)

    def make(micro: int | None) -> Command:
        words = [str(folder), str(fits), str(micro or first), "2", str(total)]
        return Command((sys.executable, str(script), *words))

    return make


def tried(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "tried").read_text().split()]


def test_a_run_that_fits_is_started_once_and_its_status_is_handed_on(tmp_path):
    assert supervise(command_for(tmp_path, fits=32), tmp_path, retries=2) == 0
    assert tried(tmp_path) == [32]
    fails = Command((sys.executable, "-c", "raise SystemExit(3)"))
    assert supervise(lambda micro: fails, tmp_path, retries=2) == 3
    killed = Command((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert supervise(lambda micro: killed, tmp_path, retries=2) == 137


def test_after_memory_ran_out_the_next_smaller_divisor_is_tried(tmp_path):
    assert supervise(command_for(tmp_path, fits=9), tmp_path, retries=2) == 0
    assert tried(tmp_path) == [32, 16, 8]
    assert (tmp_path / "told").read_text().split() == ["0", "1", "2"]  # which the metrics show


def test_the_answer_that_ran_out_of_memory_is_forgotten_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = Cache(default_folder())
    for key in ("first", "later", "other"):
        cache.write(key, {"largest": 32})
    node = {"fingerprint": "first", "later": [{"fingerprint": "later"}]}
    (tmp_path / "plan.json").write_text(json.dumps({"nodes": {"a": node, "b": {"largest": 4}}}))
    assert supervise(command_for(tmp_path, fits=32), tmp_path, retries=2) == 0
    assert cache.read("first") == {"largest": 32}
    assert supervise(command_for(tmp_path, fits=16), tmp_path, retries=2) == 0
    assert (cache.read("first"), cache.read("later")) == (None, None)
    assert cache.read("other") == {"largest": 32}


def test_it_gives_up_after_the_retries_and_names_what_was_tried(tmp_path):
    with pytest.raises(
        RetriesUsedUp, match=r"micro-batch 32, 16; last: rank 1 ran out .*=8"
    ) as told:
        supervise(command_for(tmp_path, fits=1), tmp_path, retries=1)
    assert told.value.status == 20 and tried(tmp_path) == [32, 16]


def test_it_gives_up_where_the_objectives_need_as_many_samples(tmp_path):
    with pytest.raises(RetriesUsedUp, match="no smaller divisor"):
        supervise(command_for(tmp_path, fits=1, first=2, total=4), tmp_path, retries=5)


def test_a_record_of_an_earlier_start_is_not_taken_for_this_one(tmp_path):
    (tmp_path / OOM_FOLDER).mkdir()
    old = tmp_path / OOM_FOLDER / "oom-0.json"
    old.write_text(json.dumps({"rank": 0, "time": 1.0}))
    os.utime(old, (1.0, 1.0))
    assert newest_oom(tmp_path, since=time.time() - 60) is None
    assert supervise(command_for(tmp_path, fits=32), tmp_path, retries=0) == 0


LAUNCHER = """
import os, signal, subprocess, sys
# As DeepSpeed's: it would die of the signal; its rank is to hear of it.
rank = subprocess.Popen([sys.executable, sys.argv[1]], env=os.environ | {"RANK": "0"})
sys.exit(rank.wait())
"""
RANK = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").write_text("")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").write_text("")
time.sleep(60)
"""
SUPERVISOR = """
import sys
from pathlib import Path
from elip_ds.launching.handover import Command
from elip_ds.launching.supervise import supervise
sys.exit(supervise(lambda _: Command((sys.executable, "launcher.py", "rank.py")), Path("."), 0))
"""


def test_a_stop_signal_reaches_the_ranks_and_not_their_launcher(tmp_path):
    for name, text in (("launcher", LAUNCHER), ("rank", RANK), ("supervisor", SUPERVISOR)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "RANK": "0"}  # inherited
    supervisor = subprocess.Popen([sys.executable, "supervisor.py"], cwd=tmp_path, env=env)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=30) == 0 and (tmp_path / "saved").exists()
