"""Real ranks, real DeepSpeed: peaks that are measured, and every way in which a trial ends."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import tiny_words

from elip_ds.config import load_config
from elip_ds.engine import read_ds_config
from elip_ds.engine.trial_job import TrialJob
from elip_ds.errors import UserError
from elip_ds.launching.endings import RankFailed, RankHung
from elip_ds.launching.local_ranks import Patience
from elip_ds.launching.real_steps import RealSteps

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MIB = 2**20
SMALL, LARGE = 4, 256
WIDER = ["model.vision.image_size=64", "engine.precision=fp32"]
"65 patches: a sample then takes a third of a megabyte and more."


@pytest.fixture
def steps(tmp_path, monkeypatch) -> Callable[..., RealSteps]:
    """make(stage, *words, silent=seconds, **job) -> RealSteps of two ranks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(stage: int = 2, *words: str, silent: float = 120, **job) -> RealSteps:
        config = load_config(tiny_words(*WIDER, *words))
        tree = read_ds_config(str(ROOT / f"ds_configs/z{stage}.json"))
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return RealSteps(TrialJob(config, tree, [], **job), 2, folder, Patience(silent, 240))

    return make


def strike(start: Path, number: signal.Signals, *, phase: str) -> threading.Thread:
    """Sends rank 1 of a start a signal once its heartbeat says that it is in a phase at LARGE."""
    path = start / "heartbeat-1.json"

    def wait() -> None:
        end = time.time() + 120
        while time.time() < end:
            beat = json.loads(path.read_text()) if path.exists() else {}
            if (beat.get("phase"), beat.get("micro_batch_size")) == (phase, LARGE):
                os.kill(beat["pid"], number)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def assert_nothing_is_left(tried: RealSteps) -> None:
    beats = [json.loads(p.read_text()) for p in tried.folder.glob("*/heartbeat-*.json")]
    assert len(beats) == 2 * len(tried.started)
    assert not [beat for beat in beats if psutil.pid_exists(beat["pid"])]
    assert not list(Path("/dev/shm").glob("deepspeed*"))
    assert not list(tried.folder.glob("*/run"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_peaks_are_measured_at_every_size_and_grow_with_it(steps, stage):
    tried = steps(stage, accumulation=2)
    small, large = tried.measure([SMALL, LARGE])
    assert (small.micro_batch_size, large.micro_batch_size) == (SMALL, LARGE)
    for phase in ("forward", "backward"):
        assert getattr(large.peaks, phase) > getattr(small.peaks, phase) + 50 * MIB
    assert large.peaks.step == pytest.approx(small.peaks.step, rel=0.1)
    assert_nothing_is_left(tried)


def test_a_limit_that_a_size_does_not_fit_ends_the_list_and_one_that_it_fits_does_not(steps):
    free = steps().measure([SMALL, LARGE])
    between = (free[0].peaks.highest + free[1].peaks.highest) // 2
    tried = steps(limit_bytes=between)
    small, large = tried.measure([SMALL, LARGE])
    assert small.peaks is not None
    assert (large.micro_batch_size, large.peaks) == (LARGE, None)
    assert "for want of memory" in large.reason or "MiB more in" in large.reason
    assert_nothing_is_left(tried)
    above = steps(limit_bytes=int(1.02 * free[1].peaks.highest))
    verified = above.verify(LARGE)
    assert verified.peaks.highest == pytest.approx(free[1].peaks.highest, rel=0.02)
    assert_nothing_is_left(above)


def test_a_limit_below_what_the_engine_takes_is_an_answer_too(steps):
    (outcome,) = steps(limit_bytes=100 * MIB).measure([SMALL, LARGE])
    assert (outcome.micro_batch_size, outcome.peaks) == (SMALL, None)
    assert "ran out of memory in limit at micro-batch 4" in outcome.reason


def test_a_killed_rank_is_out_of_memory_once_and_a_failure_when_it_happens_again(steps):
    tried = steps()
    thread = strike(tried.folder / "00-measure", signal.SIGKILL, phase="backward")
    small, large = tried.measure([SMALL, LARGE])
    thread.join()
    assert small.peaks is not None and large.peaks is None
    assert large.reason.startswith("rank 1 died of SIGKILL in backward at micro-batch 256")
    thread = strike(tried.folder / "01-verify", signal.SIGKILL, phase="forward")
    with pytest.raises(RankFailed, match="rank 1 died of SIGKILL in forward"):
        tried.verify(LARGE)
    thread.join()


def test_a_stopped_rank_hangs_within_the_time_limit(steps):
    tried = steps(silent=30)
    thread = strike(tried.folder / "00-measure", signal.SIGSTOP, phase="forward")
    with pytest.raises(RankHung, match=r"silent for 30 s in forward at micro-batch 256"):
        tried.measure([SMALL, LARGE])
    thread.join()
    assert_nothing_is_left(tried)


def test_a_failure_that_is_not_memory_is_told_in_one_line(steps):
    with pytest.raises(RankFailed, match=r"rank \d failed in start: ValueError: zip\(\)") as caught:
        steps(keep_ratios=[0.5]).measure([SMALL])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"vocab_size=64: .* has 514 entries"):
        steps(2, "data.tokenizer=clip").measure([SMALL])
