"""A rank that neither works nor dies: the others do not wait for it for ever."""

import signal
import time

import pytest

pytestmark = pytest.mark.slow


def test_ranks_give_up_one_that_hangs_and_a_restart_goes_on(start):
    words = ("schedule.length=320 samples", "checkpoint.every=80 samples", "run.on_finish=nothing")
    job = start("hung", *words, "engine.timeout_seconds=5")
    job.wait_for(lambda: len(job.losses()) >= 15, "15 steps")
    job.ranks[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    job.ranks[0].wait(60)
    assert time.monotonic() - stopped < 30
    assert job.ranks[0].returncode != 0
    job.kill(1)
    job.finish(ok=False)
    resumed = start("hung", *words, "engine.timeout_seconds=1800").finish()
    assert len(resumed.losses()) == 40
