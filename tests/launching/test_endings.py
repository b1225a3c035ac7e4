"""What a folder and exit statuses say; real processes: test_local_ranks.py, test_real_steps.py."""

import json
import signal

import pytest

from elip_ds.launching.endings import Ending, classify

BEAT = {"micro_batch_size": 16, "phase": "forward", "step": 0}


def leave(folder, file: str, rank: int, **record) -> None:
    record = BEAT | {"rank": rank, "time": 0.0} | record
    (folder / f"{file}-{rank}.json").write_text(json.dumps(record))


def test_the_first_out_of_memory_is_the_one_that_is_told(tmp_path):
    for rank in (0, 1):
        leave(
            tmp_path,
            "oom",
            rank,
            time=-rank,
            asked_bytes=3 * 2**20,
            in_use_bytes=2**31,
            peak_bytes=2**31 + rank,
        )
    ending = classify(tmp_path, [77, 77], kernel_killed=False)
    assert ending.reason == (
        "rank 1 asked for 3.0 MiB more in forward at micro-batch 16, step 0, with 2.00 GiB in use"
    )


def test_a_kill_while_the_kernel_ended_processes_is_out_of_memory(tmp_path):
    leave(tmp_path, "heartbeat", 1)
    ending = classify(tmp_path, [None, -signal.SIGKILL], kernel_killed=True)
    assert (ending.how, ending.micro_batch_size) == ("out_of_memory", 16)
    assert "rank 1 was killed by the kernel" in ending.reason


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGSEGV, "suspected"), (signal.SIGABRT, "suspected"), (signal.SIGHUP, "failed")],
)
def test_a_death_inside_a_step_is_suspected_by_its_signal(tmp_path, number, how):
    leave(tmp_path, "heartbeat", 0)
    gone = "[pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
    leave(tmp_path, "error", 1, kind="RuntimeError", message=gone, last_line=gone)
    ending = classify(tmp_path, [-number, 78], kernel_killed=False)
    assert ending.how == how
    assert ending.reason.startswith(f"rank 0 died of {number.name} in forward")


def test_a_peer_that_aborts_because_another_failed_is_not_the_cause(tmp_path):
    leave(tmp_path, "heartbeat", 0)
    leave(tmp_path, "error", 1, kind="IndexError", message="9", last_line="IndexError: 9")
    ending = classify(tmp_path, [-signal.SIGABRT, 78], kernel_killed=False)
    assert ending.how == "failed"
    assert ending.reason == "rank 1 failed in forward at micro-batch 16, step 0: IndexError: 9"


def test_status_77_counts_without_a_record(tmp_path):
    leave(tmp_path, "heartbeat", 0)
    ending = classify(tmp_path, [77, None], kernel_killed=False)
    assert (ending.how, ending.micro_batch_size) == ("out_of_memory", 16)


def test_a_rank_that_left_before_its_first_heartbeat_is_told_by_its_last_words(tmp_path):
    (tmp_path / "rank-1.log").write_text("Traceback\nImportError: no elip_ds\n\n")
    ending = classify(tmp_path, [None, 1], kernel_killed=False)
    assert ending == Ending("failed", "rank 1 left with status 1 in start: ImportError: no elip_ds")
