"""Killed at any moment, a run goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_words
from end_to_end.jobs import ROOT, TRAIN, Job, free_port

pytestmark = pytest.mark.slow

Z2 = str(ROOT / "ds_configs/z2.json")
LONG = (
    "schedule.length=320 samples",  # 40 steps
    "checkpoint.every=80 samples",
    "run.on_finish=nothing",
    "model.text.dropout=0.1",  # so that the random generators of all ranks matter
    "data.workers=1",
)


@pytest.fixture(scope="module")
def whole(start):
    """An uninterrupted run of 40 steps."""
    return start("whole", *LONG).finish()


def test_the_same_run_twice_gives_the_same_losses_bit_for_bit(whole, start):
    assert start("twice", *LONG).finish().losses() == whole.losses()


def test_a_killed_rank_ends_the_job_and_a_restart_repeats_the_rest_bit_for_bit(whole, start):
    job = start("killed", *LONG)
    job.wait_for(lambda: len(job.losses()) >= 15, "15 steps")
    job.kill(1)
    job.finish(ok=False)  # rank 0 does not hang
    assert job.codes[1] == -signal.SIGKILL and job.codes[0] != 0
    resumed = start("killed", *LONG).finish()
    assert "resumed" in resumed.output[0]
    assert len(resumed.losses()) == 40
    assert resumed.losses() == whole.losses()


@pytest.mark.parametrize("json", ["z0", "z3"])
def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(start, json):
    whole = start(f"whole-{json}", *LONG, json=json).finish()
    name = f"cut-{json}"
    job = start(name, *LONG, json=json)
    folder = job.dir / "ckpt"
    job.wait_for((folder / "step-00000010").is_dir, "the first checkpoint")
    job.wait_for((folder / ".step-00000020.partial").is_dir, "the second one being written")
    job.kill()
    job.finish(ok=False)
    assert not (folder / "step-00000020").exists()
    assert (folder / ".step-00000020.partial").is_dir()  # it really was cut
    resumed = start(name, *LONG, json=json).finish()
    assert "step 10, 80 samples seen" in resumed.output[0]
    assert resumed.losses() == whole.losses()
    assert not list(folder.glob(".step-*"))


def test_ctrl_c_saves_under_deepspeeds_launcher(tmp_path, shared_scenes):
    """The terminal signals all at once; the launcher then ends all that the ranks have started."""
    words = [*tiny_words(*LONG), f"data.builtin.dir={shared_scenes}", f"run.dir={tmp_path}"]
    words = [f"--master_port={free_port()}", str(TRAIN), "--deepspeed", Z2, *words, "run.name=it"]
    program = str(Path(sys.executable).parent / "deepspeed")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    launcher = subprocess.Popen(
        [program, "--num_accelerators", "2", *words, "schedule.length=3200 samples"],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "2"},  # a worker has threads, too
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, as a shell gives it
    )
    job = Job(tmp_path / "it", [launcher])
    job.wait_for(lambda: len(job.losses()) >= 12, "12 steps")
    os.killpg(launcher.pid, signal.SIGINT)
    job.finish(ok=False)  # reads until the last of all processes has ended
    assert json.loads((job.dir / "summary.json").read_text())["state"] == "stopped", job.output[0]
    assert job.newest().name == f"step-{len(job.losses()):08d}"


def test_a_signal_saves_after_the_step_and_the_next_start_goes_on(whole, start):
    job = start("asked", *LONG)
    job.wait_for(lambda: len(job.losses()) >= 12, "12 steps")
    job.ranks[1].send_signal(signal.SIGUSR1)  # one rank hears of it, all stop
    job.finish()
    stopped = len(job.losses())
    assert 12 <= stopped < 40
    assert json.loads((job.dir / "summary.json").read_text())["state"] == "stopped"
    assert job.newest().name == f"step-{stopped:08d}"
    assert start("asked", *LONG).finish().losses() == whole.losses()


def test_only_the_newest_checkpoints_stay_and_latest_names_one(whole):
    folder = whole.dir / "ckpt"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000030", "step-00000040"]
    assert (folder / "latest").read_text() == "step-00000040"


def test_a_finished_run_is_not_trained_again(whole, start):
    before = whole.losses()
    assert start("whole", *LONG).finish().losses() == before


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(start, tmp_path):
    """A small real file system that fills up between two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        job = start("full", *LONG, f"run.dir={disk}", ranks=1)
        folder = disk / "full" / "ckpt"
        job.wait_for((folder / "step-00000010").is_dir, "the first checkpoint")
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"x" * max(0, free - 200_000))
        job.finish(ok=False)
        assert job.codes == [1]
        assert "checkpoint NOT saved" in job.output[0]
        assert " 0.0 MB free there" in job.output[0] or " 0.1 MB free there" in job.output[0]
        whole_ones = [p.name for p in folder.glob("step-*")]
        assert "step-00000010" in whole_ones
        assert not list(folder.glob(".step-*"))
        (disk / "ballast").unlink()
        resumed = start("full", *LONG, f"run.dir={disk}", ranks=1).finish()
        assert "resumed" in resumed.output[0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_weights_of_another_run_start_a_new_one(whole, start):
    words = (*LONG, f"model.init_from={whole.dir}", "schedule.length=8 samples", "optim.lr=1e-9")
    for stage in ("z0", "z3"):
        heir = start(f"heir-{stage}", *words, json=stage).finish()
        # The trained weights guess better than fresh ones did at their first step.
        assert heir.losses()[1]["mlm"] < whole.losses()[1]["mlm"] - 0.1


def test_weights_of_another_model_are_refused_in_one_line(whole, start):
    words = (f"model.init_from={whole.dir}", "model.embed_dim=8", "objectives.itc.queue_size=16")
    job = start("other", *LONG, *words).finish(ok=False)
    assert job.codes == [2, 2]
    assert "another model: model.embed_dim is 16 there, 8 here" in job.output[0].splitlines()[-1]
