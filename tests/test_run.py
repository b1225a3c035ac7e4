"""A run's folder, its stop flag and its notes, with one rank."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import tiny_words

from elip_ds import dist
from elip_ds.config import dump_config, load_config
from elip_ds.errors import NodeError, UserError
from elip_ds.run import (
    CONFIG,
    Run,
    _claim_folder,
    _watch_signals,
    hold_folder,
    seed_everything,
    tell_job,
)


def make_run(folder, rank: int = 0) -> Run:
    return Run(dist.Ranks(rank, rank, 2, 2, torch.device("cpu")), folder, seed=0)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture
def signals():
    """Puts back the handlers that a test replaces."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config_with(*words: str):
    return load_config(tiny_words(*words))


def keep(run: Run, config, *, trained: bool = True) -> None:
    (run.dir / CONFIG).write_text(dump_config(config))
    if trained:
        (run.dir / "metrics.jsonl").write_text("")


HOLDER = """
import sys, pathlib
from elip_ds.run import hold_folder
hold_folder(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_held_by_one_start_until_its_process_ends(tmp_path, monkeypatch):
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr("elip_ds.run.LOCK_SECONDS", 0.1)
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
            hold_folder(tmp_path)
        holder.kill()
    monkeypatch.setattr("elip_ds.run.LOCK_SECONDS", 10)
    hold_folder(tmp_path)
    hold_folder(tmp_path)  # its own is no other


def test_an_earlier_start_of_the_same_job_that_never_ends_is_no_other(tmp_path, monkeypatch):
    """On a node that is lost a lock may stay; a second step of the same start is another run."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    env = os.environ | {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "0"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as holder:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr("elip_ds.run.LOCK_SECONDS", 0.1)
        for job, start in (("42", "0"), ("4", "1"), ("142", "1")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", start)
            with pytest.raises(UserError, match=r"in use by .*, job 42, start 0; choose another"):
                hold_folder(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        hold_folder(tmp_path)
        holder.kill()


def test_a_fresh_folder_is_made_with_its_parents(tmp_path):
    run = make_run(tmp_path / "a" / "b")
    assert _claim_folder(run, config_with()) is None
    assert run.dir.is_dir()


def test_the_same_configuration_may_have_its_folder_again(run):
    keep(run, config_with())
    assert _claim_folder(run, config_with()) is None


def test_another_configuration_may_not(run):
    keep(run, config_with("optim.lr=0.5"))
    problem = _claim_folder(run, config_with())
    assert "optim.lr: 0.5 -> 0.001" in problem and "run.allow_config_change" in problem


def test_a_start_that_never_trained_claims_no_folder(run):
    keep(run, config_with("optim.lr=0.5"), trained=False)
    (run.dir / "tokenizer.json").write_text("of other captions")
    assert _claim_folder(run, config_with()) is None
    assert not (run.dir / "tokenizer.json").exists()


def test_another_configuration_may_with_a_word(run):
    keep(run, config_with("optim.lr=0.5"))
    assert _claim_folder(run, config_with("run.allow_config_change=true")) is None


def test_of_many_changes_three_are_named_and_the_rest_counted(run):
    words = ("optim.lr=1", "optim.eps=1", "optim.weight_decay=1", "run.seed=9")
    keep(run, config_with(*words, "teacher.momentum=0.5"))
    problem = _claim_folder(run, config_with())
    assert problem.count(" -> ") == 3 and "and 2 more" in problem


def test_a_folder_that_cannot_be_made_is_a_problem_and_no_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NodeError, match="cannot be made"):
        _claim_folder(make_run(tmp_path / "file" / "run"), config_with())


def test_a_run_stops_once_the_ranks_have_agreed(run):
    run.stop_asked = True
    assert not run.stopping
    run.agree_to_stop()
    assert run.stopping


def test_nobody_stops_unasked(run):
    run.agree_to_stop()
    assert not run.stopping


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_asks_and_interrupts_nothing(run, signals, name):
    _watch_signals(run)
    os.kill(os.getpid(), getattr(signal, name))
    assert run.stop_asked and not run.stopping


def test_a_second_interrupt_from_the_keyboard_is_obeyed_at_once(run, signals):
    _watch_signals(run)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)  # schedulers repeat themselves; only a person insists
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_skipped_sample_is_one_line_of_json(run):
    run.note_skipped("a.tar", 'odd "key"\n', "no image")
    run.note_skipped("b.tar", "k2", "caption is empty")
    lines = (run.dir / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"shard": "a.tar", "key": 'odd "key"\n', "reason": "no image"},
        {"shard": "b.tar", "key": "k2", "reason": "caption is empty"},
    ]


def test_a_small_file_is_replaced_whole(run):
    path = run.dir / "summary.json"
    for text in ("first", "second \N{SNOWMAN}"):
        run.write_text(path, text)
    assert path.read_text(encoding="utf-8") == "second \N{SNOWMAN}"
    assert os.listdir(run.dir) == ["summary.json"]


def test_the_first_rank_of_all_and_of_a_node_know_it(tmp_path):
    first, second = make_run(tmp_path, 0), make_run(tmp_path, 1)
    assert first.first and first.first_on_node
    assert not second.first and not second.first_on_node
    ranks = dataclasses.replace(second.ranks, local_rank=0)
    assert not Run(ranks, tmp_path, 0).first and Run(ranks, tmp_path, 0).first_on_node


def test_a_seed_gives_the_same_numbers_again():
    draws = []
    for _ in range(2):
        seed_everything(2**32 + 3)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_a_file_asks_to_stop_at_the_next_agreement(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ELIP_STOP_FILE", str(tmp_path / "stop"))
    monkeypatch.setattr("elip_ds.run.time.monotonic", lambda: 0.0)
    for step in (10, 11):
        run.agree_to_stop(step)
    assert not run.stopping
    (tmp_path / "stop").touch()
    run.agree_to_stop(20)
    assert not run.stopping
    run.agree_to_stop(21)
    assert run.stopping


@pytest.mark.parametrize(
    ("seconds", "agreements"),
    [
        (0.01, [1, 2, 12, 22, 32]),
        (1, [1, 2, 12, 22, 32]),
        (3, [1, 2, 5, 8, 11]),
        (60, [1, 2, 3, 4]),
    ],
)
def test_the_ranks_agree_every_ten_steps_or_seconds(run, monkeypatch, seconds, agreements):
    """The first step says nothing of the others: it compiles and warms up."""
    now, seen = 0.0, []
    monkeypatch.setattr("elip_ds.run.time.monotonic", lambda: now)
    monkeypatch.setattr(run, "_look_around", lambda: seen.append(run.step))
    for step in range(1, agreements[-1] + 1):
        now += 100 if step == 1 else seconds
        run.agree_to_stop(step)
    assert seen == agreements


def test_the_clock_asks_to_save_at_the_next_agreement_and_only_there(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("elip_ds.run.time.monotonic", lambda: now)
    run = dataclasses.replace(make_run(tmp_path), save_every_seconds=60)
    asked = []
    for step in range(1, 201):
        run.agree_to_stop(step)
        asked += [step] if run.saving else []
        now += 0.7
    # The clock starts with the first step; 60 s are over at step 87, and again 86 after that save.
    assert asked == [92, 182]
    assert not run.stopping


def test_without_an_interval_the_clock_asks_for_nothing(run):
    run.agree_to_stop(10)
    assert not run.saving


def test_a_batch_script_is_told_the_folder_and_sees_every_step(run, tmp_path, monkeypatch):
    beat = tmp_path / "beat"
    monkeypatch.setenv("ELIP_BEAT_FILE", str(beat))
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    for rank in ("0", "1"):  # of whom the first speaks
        monkeypatch.setenv("RANK", rank)
        tell_job("runs/a", "none")
        tell_job("done")
    assert beat.read_text() == "runs/a\nnone\ndone\n"
    os.utime(beat, (1, 1))
    run.agree_to_stop(1)
    assert beat.stat().st_mtime > 1
    beat.unlink()  # with the script
    run.agree_to_stop(2)
    assert not beat.exists()


def test_a_rank_whose_step_daemon_is_gone_asks_to_stop(run, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    run.agree_to_stop(10)
    assert not run.stopping
    monkeypatch.setattr("os.getppid", lambda: 1)
    run.agree_to_stop(30)
    assert run.stopping


def test_a_process_that_slurm_did_not_start_may_lose_its_parent(run, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setattr("os.getppid", lambda: 1)
    run.agree_to_stop(10)
    assert not run.stopping
