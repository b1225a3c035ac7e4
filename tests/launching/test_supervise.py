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

MODULE = sys.modules[supervise.__module__]

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
                  "micro_batches": [micro] * world, "keep_ratios": [], "follows_schedule": False,
                  "asked_bytes": 2**20, "time": time.time()}
        json.dump(record, open(f"{folder}/memory/oom-{rank}.json", "w"))
    sys.exit(77)
"""


def command_for(folder: Path, fits: int, first: int = 32, total: int = 64):
    script = folder / "training.py"
    script.write_text(TRAINING)

    def make(micro: int | None, batch: int | None) -> Command:
        assert batch == (None if micro is None else total)
        words = [str(folder), str(fits), str(micro or first), "2", str(total)]
        return Command((sys.executable, str(script), *words))

    return make


def tried(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "tried").read_text().split()]


def test_a_run_that_fits_is_started_once_and_its_status_is_handed_on(tmp_path):
    assert supervise(command_for(tmp_path, fits=32), tmp_path, retries=2) == 0
    assert tried(tmp_path) == [32]
    fails = Command((sys.executable, "-c", "raise SystemExit(3)"))
    assert supervise(lambda *_: fails, tmp_path, retries=2) == 3
    killed = Command((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert supervise(lambda *_: killed, tmp_path, retries=2) == 137


def test_after_memory_ran_out_the_next_smaller_divisor_is_tried(tmp_path):
    assert supervise(command_for(tmp_path, fits=9), tmp_path, retries=2) == 0
    assert tried(tmp_path) == [32, 16, 8]
    assert (tmp_path / "told").read_text().split() == ["0", "1", "2"]  # which the metrics show


def test_the_answer_that_ran_out_of_memory_is_forgotten_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = Cache(default_folder())
    for key in ("first", "other"):
        cache.write(key, {"largest": 32})
    node = {"fingerprint": "first", "keep_ratios": []}
    (tmp_path / "plan.json").write_text(json.dumps({"nodes": {"a": node, "b": {"largest": 4}}}))
    assert supervise(command_for(tmp_path, fits=32), tmp_path, retries=2) == 0
    assert cache.read("first") == {"largest": 32}
    assert supervise(command_for(tmp_path, fits=16), tmp_path, retries=2) == 0
    assert (cache.read("first"), cache.read("other")) == (None, {"largest": 32})


# Follows a schedule: the sizes of its stretches are its own to find, below what has run out.
STRETCHED = """
import json, os, sys, time
folder, given = sys.argv[1:]
open(f"{folder}/tried", "a").write(given + "\\n")
if not os.path.exists(f"{folder}/memory/oom-0.json"):
    os.makedirs(f"{folder}/memory", exist_ok=True)
    record = {"rank": 0, "micro_batch_size": 32, "step": 3, "min_micro_batch": 2,
              "gradient_accumulation_steps": 1, "micro_batches": [32, 32],
              "keep_ratios": [0.5, 0.125], "follows_schedule": True, "asked_bytes": 1,
              "time": time.time()}
    json.dump(record, open(f"{folder}/memory/oom-0.json", "w"))
    sys.exit(77)
"""


def test_a_stretch_that_ran_out_leaves_the_others_their_answers(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = Cache(default_folder())
    for key in ("first", "later"):
        cache.write(key, {"largest": 32})
    later = {"keep_ratios": [0.5, 0.125], "fingerprint": "later"}
    node = {"keep_ratios": [0.5, 0.25], "fingerprint": "first", "later": [later]}
    (tmp_path / "plan.json").write_text(json.dumps({"nodes": {"a": node}}))
    script = tmp_path / "training.py"
    script.write_text(STRETCHED)

    def make(micro: int | None, total: int | None) -> Command:
        words = [str(tmp_path), f"{micro}x{total}"]
        return Command((sys.executable, str(script), *words))

    assert supervise(make, tmp_path, retries=1) == 0
    assert (tmp_path / "tried").read_text().split() == ["NonexNone", "Nonex64"]
    assert (cache.read("first"), cache.read("later")) == ({"largest": 32}, None)
    assert "micro-batch 32 -> at most 16" in caplog.text


# Ends as the kernel ends it: no record, and one kill more in the cgroup.
KILLED = """
import json, os, sys
folder, micro, device = sys.argv[1:]
open(f"{folder}/tried", "a").write(micro + "\\n")
plan = {"micro_batch_size": int(micro), "gradient_accumulation_steps": 64 // int(micro) // 2,
        "world_size": 2, "unequal": [], "later": [], "min_micro_batch": 2, "device": device,
        "oom_kills": os.path.getsize(f"{folder}/kills"),
        "nodes": {"a": {"failure_key": "this"}}}
json.dump(plan, open(f"{folder}/plan.json", "w"))
if int(micro) > 8:
    open(f"{folder}/kills", "a").write("x")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("device", "status", "sizes"), [("cpu", 0, [32, 16, 8]), ("cuda", 137, [32])]
)
def test_a_rank_that_the_kernel_ended_ran_out_of_the_memory_of_the_host(
    tmp_path, monkeypatch, caplog, device, status, sizes
):
    script, kills = tmp_path / "training.py", tmp_path / "kills"
    script.write_text(KILLED)
    kills.touch()
    monkeypatch.setattr(MODULE, "count_oom_kills", lambda: kills.stat().st_size)

    def make(micro: int | None, total: int | None) -> Command:
        return Command((sys.executable, str(script), str(tmp_path), str(micro or 32), device))

    assert supervise(make, tmp_path, retries=2) == status
    assert tried(tmp_path) == sizes
    assert ("want of host memory" if device == "cuda" else "the kernel ended a rank") in caplog.text
    if device == "cpu":  # and whoever starts the run next knows of it
        record = json.loads((tmp_path / OOM_FOLDER / "oom-host.json").read_text())
        assert (record["micro_batch_size"], record["fingerprints"]) == (16, ["this"])


@pytest.mark.parametrize(("settled", "status"), [(False, 3), (True, 3), (True, 2)])
def test_what_the_kernel_ended_before_the_batch_was_settled_says_nothing_of_it(
    tmp_path, monkeypatch, settled, status
):
    """A rank of the probe, for one. Nor is a start tried again that was refused."""
    monkeypatch.setattr(MODULE, "count_oom_kills", lambda: 1 if status == 3 else 2)
    plan = tmp_path / "plan.json"
    write = f"open({str(plan)!r}, 'w').write('{{\"oom_kills\": 1}}')" if settled else "pass"
    fails = Command((sys.executable, "-c", f"{write}; raise SystemExit({status})"))
    assert supervise(lambda *_: fails, tmp_path, retries=2) == status


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
sys.exit(supervise(lambda *_: Command((sys.executable, "launcher.py", "rank.py")), Path("."), 0))
"""


@pytest.mark.slow
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
