"""Two nodes without Slurm: torchrun on each, here both on this machine."""

import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_words
from end_to_end.jobs import DEADLINE, ROOT, TRAIN, free_port

pytestmark = pytest.mark.slow


def test_two_nodes_of_torchrun_probe_and_train_as_one_run(tmp_path, shared_scenes):
    words = [
        *tiny_words("schedule.length=16 samples", "batching.probe=always"),
        f"data.builtin.dir={shared_scenes}",
    ]
    words += [f"run.dir={tmp_path}", "run.name=two", "run.on_finish=nothing"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node"]
    agent += ["1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    json_of = ["--deepspeed", str(ROOT / "ds_configs/z2.json")]
    nodes = [
        subprocess.Popen(
            [*agent, "--node-rank", str(node), str(TRAIN), *json_of, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [node.communicate(timeout=DEADLINE)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["world_size"] == 2
    assert (tmp_path / "two/ckpt/step-00000002/meta.json").exists()
