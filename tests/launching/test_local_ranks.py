"""Groups of small made-up ranks: how they end is told, and nothing of them is left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from elip_ds.launching import local_ranks
from elip_ds.launching.endings import Ending, RankHung
from elip_ds.launching.local_ranks import Patience, run_ranks

PATIENT = Patience(silent_seconds=60, total_seconds=60)
START = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def write(file, **record):
    path = folder / f"{file}-{rank}.json"
    part = folder / f".{file}-{rank}"
    part.write_text(json.dumps({"rank": rank, "time": time.time(), **record}))
    os.replace(part, path)

def beat(phase, size=8):
    write("heartbeat", micro_batch_size=size, phase=phase, step=1, pid=os.getpid())

def until(path):
    while not (folder / path).exists():
        time.sleep(0.005)

beat("forward")
until("heartbeat-0.json")
until("heartbeat-1.json")
"""
OUT = (
    "write('oom', micro_batch_size=8, phase='forward', step=1, asked_bytes=2**30, in_use_bytes=0, "
    "peak_bytes=0)"
    "; os._exit(77)"
)
GONE = "peer gone"


def error(last_line: str, kind: str = "E") -> str:
    record = f"kind={kind!r}, message='x', last_line={last_line!r}"
    return f"write('error', micro_batch_size=8, phase='forward', step=1, {record}); os._exit(78)"


def run(folder: Path, body: str, patience: Patience = PATIENT) -> Ending:
    script = folder / "rank.py"
    script.write_text(START + body)
    command = [sys.executable, "-S", str(script), str(folder)]
    return run_ranks(command, ranks=2, folder=folder, patience=patience)


def groups(folder: Path) -> list[int]:
    """Process groups of the ranks that got as far as a heartbeat."""
    return [json.loads(path.read_text())["pid"] for path in folder.glob("heartbeat-*.json")]


def living(folder: Path) -> list[psutil.Process]:
    """Of the ranks' groups; one that is dead and that nobody has fetched yet does not live."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            dead = process.status() == psutil.STATUS_ZOMBIE
            if not dead and os.getpgid(process.pid) in groups(folder):
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ranks, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(local_ranks, "GRACE_SECONDS", 0.2)
    yield
    assert len(groups(tmp_path)) == 2
    assert not living(tmp_path)


def test_ranks_that_all_leave_with_0_are_done(tmp_path):
    body = 'print(*(os.environ[n] for n in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))'
    assert run(tmp_path, body) == Ending("done")
    assert [(tmp_path / f"rank-{r}.log").read_text() for r in (0, 1)] == ["0 2 2\n", "1 2 2\n"]


def test_the_first_to_fail_ends_the_others_and_is_named(tmp_path):
    ending = run(tmp_path, "if rank: sys.exit('no such thing')\ntime.sleep(60)")
    assert ending.how == "failed"
    assert ending.reason == (
        "rank 1 left with status 1 in forward at micro-batch 8, step 1: no such thing"
    )


def test_of_two_errors_the_earlier_is_the_cause(tmp_path):
    first = error("ValueError: a")
    ending = run(tmp_path, f"if rank: {first}\nuntil('error-1.json'); {error(GONE)}")
    assert ending.how == "failed"
    assert ending.reason == "rank 1 failed in forward at micro-batch 8, step 1: ValueError: a"


def test_memory_that_ran_out_is_the_cause_of_what_its_peers_say(tmp_path):
    ending = run(tmp_path, f"if rank: {OUT}\nuntil('oom-1.json'); {error(GONE)}")
    assert (ending.how, ending.micro_batch_size) == ("out_of_memory", 8)
    assert ending.reason.startswith("rank 1 asked for 1.00 GiB more in forward at micro-batch 8")


def test_a_peer_that_waits_for_one_out_of_memory_is_ended_at_once(tmp_path):
    started = time.time()
    assert run(tmp_path, f"if rank: {OUT}\ntime.sleep(60)").how == "out_of_memory"
    assert time.time() - started < 10


@pytest.mark.parametrize(("phase", "how"), [("backward", "suspected"), ("start", "failed")])
def test_a_rank_that_is_killed_may_have_been_out_of_memory_inside_a_step(tmp_path, phase, how):
    body = f"beat('{phase}')\nif rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    ending = run(tmp_path, body)
    assert ending.how == how
    assert ending.reason.startswith(f"rank 1 died of SIGKILL in {phase} at micro-batch 8")


@pytest.mark.slow
@pytest.mark.parametrize("asleep", ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_silent_rank_hangs_and_its_place_is_told(tmp_path, asleep):
    body = f"""
if rank:
    beat("backward", 64)
    {asleep}
while True:
    time.sleep(0.01)
    beat("step", 64)
"""
    match = r"rank 1 silent for \d+ s in backward at micro-batch 64, step 1; 2 ranks were ended"
    with pytest.raises(RankHung, match=match):
        run(tmp_path, body, Patience(silent_seconds=3, total_seconds=60))


@pytest.mark.slow
def test_ranks_that_go_on_for_too_long_are_ended(tmp_path):
    body = "while True: beat('step'); time.sleep(0.01)"
    with pytest.raises(RankHung, match="not done within 3 s: rank"):
        run(tmp_path, body, Patience(silent_seconds=60, total_seconds=3))


def test_children_and_those_deaf_to_the_polite_signal_are_ended_too(tmp_path):
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not rank:
    subprocess.Popen(["sleep", "60"])
    (folder / "ready").write_text("")
    os._exit(3)
until("ready")
time.sleep(60)
"""
    assert run(tmp_path, body).reason.startswith("rank 0 left with status 3")


def test_a_failed_refusal_of_the_configuration_is_told_as_one(tmp_path):
    assert run(tmp_path, error("x", kind="UserError")) == Ending("refused", "x", 8)


def test_shared_memory_of_killed_ranks_is_cleared_and_that_of_others_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ranks, "SHARED_MEMORY", tmp_path)
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_"
    (tmp_path / f"{name}1_0").write_text("")
    body = f"(folder / ('{name}' + os.environ['MASTER_PORT'] + f'_{{rank}}')).write_text('')"
    run(tmp_path, f"{body}\nos._exit(rank)")
    assert [path.name for path in tmp_path.glob("deepspeed*")] == [f"{name}1_0"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_launcher_however_it_ends(tmp_path, number):
    (tmp_path / "rank.py").write_text(f"{START}time.sleep(600)")
    call = f"""
import sys
from pathlib import Path
from elip_ds.launching.local_ranks import Patience, run_ranks
folder = Path({str(tmp_path)!r})
command = [sys.executable, "-S", str(folder / "rank.py"), str(folder)]
run_ranks(command, ranks=2, folder=folder, patience=Patience())
"""
    launcher = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(groups(tmp_path)) < 2 and time.time() < deadline:
        time.sleep(0.05)
    launcher.send_signal(number)
    code = launcher.wait(timeout=30)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: -2, signal.SIGKILL: -9}[number]
    while living(tmp_path) and time.time() < deadline:
        time.sleep(0.05)
