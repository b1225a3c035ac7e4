"""The launcher as a person types it: plan, probe, and a run that outlives memory running out."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import tiny_words
from jobs import DEADLINE, ROOT, free_port

pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, "-m", "elip_ds.launch"]
Z2 = str(ROOT / "ds_configs/z2.json")


@pytest.fixture
def words(tmp_path, shared_scenes):
    """tiny_words with folders of this test."""

    def make(*more: str) -> list[str]:
        return [
            *tiny_words(*more),
            f"data.builtin.dir={shared_scenes}",
            f"run.dir={tmp_path}",
            "run.name=it",
        ]

    return make


def launch(*argv: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    done = subprocess.run(
        [*LAUNCH, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=DEADLINE
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_plan_says_what_fits_and_what_pruning_buys(tmp_path, words):
    out = tmp_path / "plan.json"
    told = launch(
        "plan", *words("batching.global_batch_size=auto"), "--deepspeed", Z2,
        "--device-memory", "cpu:64MiB", "--ranks", "2", "--json", str(out),
        "--compare", "pruning.stages=[]", "--compare", f"deepspeed={ROOT / 'ds_configs/z0.json'}",
        cwd=tmp_path,
    ).stdout  # fmt: skip
    pruned, whole, z0 = json.loads(out.read_text())
    assert pruned["largest"] > 1.05 * whole["largest"] > 0 and z0["largest"] > 0
    assert pruned["micro_batch_size"] == pruned["largest"] // 8 * 8
    assert pruned["global_batch_size"] == 2 * pruned["micro_batch_size"]
    for name in ("largest micro-batch", "activations, vision", "peak learning rate", "left free"):
        assert name in told
    used = pruned["peaks"]
    budget = 0.95 * 64 * 2**20
    assert 0.8 * budget < max(used.values()) <= budget


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        (["batching.global_batch_size=9"], 2, "does not divide among 2 ranks; nearest: 8, 10"),
        (
            ["batching.micro_batch_size=4096", "batching.global_batch_size=8192"],
            10,
            r"micro-batch 4096 is asked for and does not fit: \d+ would",
        ),
    ],
)
def test_a_plan_of_what_cannot_be_done_is_shown_and_leaves_as_a_run_would(
    tmp_path, words, changes, status, says
):
    given = ["--deepspeed", Z2, "--device-memory", "cpu:64MiB", "--ranks", "2"]
    done = launch("plan", *words(*changes), *given, cwd=tmp_path, ok=False)
    assert done.returncode == status
    told = " ".join(done.stdout.split())
    assert re.search(says, told) and "largest micro-batch" in told


def test_a_plan_that_nothing_fits_says_so(tmp_path, words):
    done = launch(
        "plan", *words(), "--deepspeed", Z2, "--device-memory", "cpu:1MiB", cwd=tmp_path, ok=False
    )
    assert done.returncode == 10
    told = " ".join(done.stdout.split())
    needs = r"with it a rank takes ([0-9.]+) MiB, ([0-9.]+) MiB with what is left free"
    found = re.search(f"not even one sample fits: {needs}", told)
    assert found and 1 < float(found[1]) < float(found[2])
    assert re.search("what would help most, by the plan: model.vision.image_size=24", told)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plan", "--deepspeed", Z2], "add --device-memory"),
        (["plan", "--deepspeed", Z2, "--device-memory", "a6"], "is no device that is known"),
        (["run", "--deepspeed", "no.json"], "no.json: No such file"),
        (["fly", "--deepspeed", Z2], "invalid choice: 'fly'"),
        (["probe", "--deepspeed", Z2, "--ranks", "0"], "--ranks 0: 1 or more"),
        (["run", "--deepspeed", Z2, "optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_a_fault_of_the_command_is_one_line(tmp_path, argv, says):
    done = launch(*argv, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("error:") == 1


def test_a_probe_measures_and_a_second_one_remembers(tmp_path, words):
    out = tmp_path / "probe.json"
    given = words("batching.global_batch_size=64", "batching.probe=always")
    argv = ["probe", *given, "--deepspeed", Z2, "--ranks", "2", "--device-memory", "cpu:4GiB"]
    launch(*argv, "--json", str(out), cwd=tmp_path)
    first = json.loads(out.read_text())
    (answer,) = first["nodes"].values()
    assert (answer["source"], answer["verified"]) == ("probe", True)
    assert first["micro_batch_size"] == 32 and first["global_batch_size"] == 64
    assert answer["points"][-1]["peaks"]["forward"] < 4 * 2**30
    before = len(list((tmp_path / "it" / "probe").iterdir()))
    launch(*argv, "--json", str(out), cwd=tmp_path)
    (again,) = json.loads(out.read_text())["nodes"].values()
    assert again["source"] == "cache" and again["largest"] == 32
    assert len(list((tmp_path / "it" / "probe").iterdir())) == before


def test_a_memory_too_small_says_what_would_do_and_what_helps(tmp_path, words):
    done = launch(
        "probe", *words("batching.probe=always"), "--deepspeed", Z2, "--device-memory", "cpu:64MiB",
        cwd=tmp_path, ok=False,
    )  # fmt: skip
    assert done.returncode == 10
    line = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "64.0 MiB as given" in line
    needed, helped = (
        float(re.search(f"{before}([0-9.]+) MiB", line)[1])
        for before in ("micro-batch 2 needs at least ", r"ZeRO stage 3 \(")
    )
    # What a rank took before there was a limit, and nothing that helps can do without most of it.
    assert 400 < 0.9 * needed < helped <= needed < 2000


@pytest.mark.parametrize("entry", ["deepspeed", "launch"])
def test_training_probes_first_on_the_same_terms(tmp_path, words, entry):
    """By itself, or `launch run` before it, whose answer it then remembers."""
    given = words(
        "batching.global_batch_size=auto", "batching.max_global=32", "batching.probe=always",
        "batching.device_memory=4GiB", "schedule.length=64 samples", "run.on_finish=nothing",
    )  # fmt: skip
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    train = ["--master_port", str(free_port()), str(ROOT / "elip_ds" / "train.py")]
    command = {"deepspeed": [*deepspeed, *train], "launch": [*LAUNCH, "run", "--ranks", "2"]}
    done = subprocess.run(
        [*command[entry], "--deepspeed", Z2, *given],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    plan = json.loads((tmp_path / "it" / "plan.json").read_text())
    (answer,) = plan["nodes"].values()
    assert answer["source"] == {"deepspeed": "probe", "launch": "cache"}[entry]
    assert answer["verified"] and plan["micro_batch_size"] == 16
    used = json.loads((tmp_path / "it" / "ds_config.json").read_text())
    assert used["train_batch_size"] == 32 and used["train_micro_batch_size_per_gpu"] == 16
    config = (tmp_path / "it" / "config.yaml").read_text()
    assert "global_batch_size: 32" in config and "micro_batch_size: 16" in config


def test_a_run_goes_on_with_a_smaller_micro_batch_when_memory_runs_out(tmp_path, words):
    """The limit comes after the first checkpoint, where no plan and no probe has seen it."""
    given = words(
        "batching.global_batch_size=512", "batching.micro_batch_size=256", "batching.probe=never",
        "schedule.length=4096 samples", "checkpoint.every=512 samples", "run.on_finish=nothing",
        "metrics.every=512 samples",
    )  # fmt: skip
    process = subprocess.Popen(
        [*LAUNCH, "run", *given, "--deepspeed", Z2, "--ranks", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        tighten_after_checkpoint(process, tmp_path / "it" / "ckpt")
        output = process.communicate(timeout=DEADLINE)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]
    assert "micro-batch 256 -> 128, accumulation 1 -> 2, global batch 512 as before" in output
    lines = map(json.loads, (tmp_path / "it" / "metrics.jsonl").read_text().splitlines())
    seen = [line["samples_seen"] for line in lines if "losses" in line]
    assert seen == sorted(set(seen)) and seen[-1] == 4096 and all(n % 512 == 0 for n in seen)
    plan = json.loads((tmp_path / "it" / "plan.json").read_text())
    assert (plan["micro_batch_size"], plan["gradient_accumulation_steps"]) == (128, 2)


def tighten_after_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    """Leave no rank more memory to map than it has, once a checkpoint is there."""
    end = time.monotonic() + DEADLINE
    while not list(folder.glob("step-*/meta.json")):
        assert time.monotonic() < end and process.poll() is None, "no checkpoint"
        time.sleep(0.01)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "train.py" in " ".join(child.cmdline()) and "--local_rank" in " ".join(child.cmdline())
        and "launcher" not in " ".join(child.cmdline())
    ]  # fmt: skip
    assert len(ranks) == 2
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    for rank in ranks:
        mapped = rank.memory_info().data
        resource.prlimit(rank.pid, resource.RLIMIT_DATA, (mapped // 2, resource.RLIM_INFINITY))
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
