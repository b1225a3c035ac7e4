"""The throw-away Slurm itself: what it refuses, and what it leaves behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.clusters import ROOT, Cluster, local_slurm, need_slurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def processes_that_mention(folder: Path) -> list[str]:
    """All that have the folder among their words or in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
            environ = (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in words + environ:
            found.append(f"{process.name} {words!r}")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a cluster that a test may start; whatever it did, none is left."""
    need_slurm()
    yield tmp_path / "c"
    if (tmp_path / "c").exists():
        local_slurm("down", tmp_path / "c")


def test_down_ends_every_process_and_leaves_no_folder(folder: Path, tmp_path: Path):
    assert local_slurm("up", folder).returncode == 0
    cluster = Cluster(folder)
    lasting = "trap '' TERM; setsid sleep 300 & touch started; wait"
    cluster.submit("-N1", "--overcommit", f"--wrap={lasting}", cwd=tmp_path)
    step = subprocess.Popen(["srun", "-N1", "sleep", "300"], env=cluster.env, cwd=tmp_path)
    wait_until((tmp_path / "started").exists, "job")
    assert processes_that_mention(folder)
    ended = local_slurm("down", folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    step.wait(timeout=10)
    assert not processes_that_mention(folder)
    assert not folder.exists()


def test_up_beside_a_running_one_is_refused_in_one_line(folder: Path, tmp_path: Path):
    assert local_slurm("up", folder, "--nodes", "1").returncode == 0
    for where, says in ((folder, "exists already"), (tmp_path / "other", "is running here")):
        refused = local_slurm("up", where)
        assert refused.returncode == 2
        assert says in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()
    assert Cluster(folder).ask("sinfo", "-h", "-o", "%D %T") == "1 idle\n"


def test_a_daemon_that_does_not_start_is_named_and_none_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = tmp_path / "bin" / "slurmd"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho no such node >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    failed = local_slurm("up", folder)
    assert (failed.returncode, failed.stderr) == (
        2,
        f"error: {fake} does not start: no such node\n",
    )
    assert not processes_that_mention(folder)
    assert not folder.exists()


def test_down_removes_no_folder_but_its_own(tmp_path: Path):
    (tmp_path / "slurm.conf").write_text("ClusterName=theirs\n")
    refused = local_slurm("down", tmp_path)
    assert refused.returncode == 2 and "no cluster of tools/local_slurm" in refused.stderr
    assert (tmp_path / "slurm.conf").exists()


def test_where_slurm_is_missing_up_says_what_to_install(tmp_path: Path):
    code = (
        "import runpy, shutil, sys; shutil.which = lambda *_, **__: None; tool = sys.argv.pop(1);"
        "sys.path.insert(0, tool); runpy.run_path(tool, run_name='__main__')"
    )
    words = [sys.executable, "-c", code, str(ROOT / "tools" / "local_slurm")]
    done = subprocess.run(
        [*words, "up", "--dir", str(tmp_path / "c")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "apt-get install --no-install-recommends slurm-wlm munge" in done.stderr
    assert not (tmp_path / "c").exists()
