"""Which command trains where."""

import sys
from pathlib import Path

import pytest

from elip_ds.errors import UserError
from elip_ds.launching import handover
from elip_ds.launching.handover import TRAIN, training_command

SETTINGS = ["--deepspeed", "ds_configs/z2.json", "preset=demo"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A bin folder with programs as a machine of Slurm has them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("srun", "exit 0"),
        ("scontrol", 'if [ "$2" = hostnames ]; then echo n1; echo n2; else\n'
                     'echo "NodeName=$3 Arch=x86_64 NodeAddr=10.0.0.7 State=IDLE"; fi'),
    ):  # fmt: skip
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_on_one_machine_it_is_deepspeed_with_a_port_of_its_own():
    first, second = (training_command(SETTINGS, 2, {}) for _ in range(2))
    assert Path(first.words[0]).name == "deepspeed" and first.environ == {}
    assert first.words[1:3] == ("--num_gpus", "2")
    assert first.words[5:] == (str(TRAIN), *SETTINGS) and TRAIN.exists()
    assert first.words[4] != second.words[4]


def test_a_port_that_is_asked_for_is_used():
    words = training_command(SETTINGS, None, {"MASTER_PORT": "29511"}).words
    assert words[1:4] == ("--master_port", "29511", str(TRAIN))


def test_inside_an_allocation_it_is_srun_at_the_first_nodes_address(programs):
    env = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "3"}
    command = training_command(SETTINGS, 4, env)
    assert command.words[0] == str(programs / "srun")
    assert command.words[1:6] == (
        "--kill-on-bad-exit=1", "--cpus-per-task", "3", "--ntasks-per-node", "4"
    )  # fmt: skip
    assert command.words[6:] == (sys.executable, str(TRAIN), *SETTINGS)
    assert command.environ == {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20012"}
    again = training_command(SETTINGS, 4, env | {"SLURM_RESTART_COUNT": "1"})
    assert again.environ["MASTER_PORT"] != "20012"


@pytest.mark.parametrize("step", ["batch", "4294967290", "4294967291"])
def test_a_shell_under_salloc_is_the_allocation_and_no_step_of_ranks(programs, step):
    env = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_STEP_ID": step}
    assert training_command(SETTINGS, None, env).words[0] == str(programs / "srun")


def test_inside_a_step_of_its_own_it_starts_ranks_on_this_node():
    env = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}
    assert Path(training_command(SETTINGS, 2, env).words[0]).name == "deepspeed"


def test_a_launcher_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(handover.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="the program deepspeed is not found beside"):
        training_command(SETTINGS, 1, {})
