"""Bad input at the door of train.py: one clear line, exit status 2, before any work starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_words
from end_to_end.jobs import ROOT, TRAIN

from elip_ds import dist, train
from elip_ds.errors import exit_with


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """refuse(*words) -> the one line that train.py says before it leaves with status 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    def run(*words: str, json: str | Path = ROOT / "ds_configs/z2.json") -> str:
        try:
            with pytest.raises(SystemExit) as caught:
                exit_with(train.main, ["--deepspeed", str(json), *tiny_words(*words)])
        finally:
            dist.stop()
        assert caught.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["preset=demmo"], "preset=demmo is not known; did you mean 'demo'?"),
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["optim.lr=fast"], "optim.lr"),
        (["data.train=nowhere/x-{000..003}.tar"], "data.train: shard nowhere/x-000.tar and 3 more"),
        (["data.train=nowhere/*.tar"], "data.train: no file matches nowhere/*.tar"),
        (["pruning.stages=[{layer: 2, lookahead: 2, keep_ratio: 0.5}]"], "the tower's 3 blocks"),
        (["batching.micro_batch_size=3"], "nearest: 6, 9"),
        (["batching.global_batch_size=1"], "at least 2 samples"),
        (["model.init_from=nowhere"], "model.init_from: nowhere cannot be read: No such file"),
        (["data.vocabulary=nowhere.txt"], "data.vocabulary=nowhere.txt"),
        (["engine.precision=fp16"], "needs a GPU"),
    ],
)
def test_bad_settings_are_one_line(refuse, words, says):
    assert says in refuse(*words)


@pytest.mark.parametrize(
    "word", ["data.train=nowhere/*.tar", "data.vocabulary=nowhere.txt", "model.init_from=nowhere"]
)
def test_what_is_not_there_is_said_before_anything_is_measured(refuse, monkeypatch, word):
    settle = sys.modules["elip_ds.launching.settle"]
    monkeypatch.setattr(settle, "answer_for_node", lambda *_: pytest.fail("it was measured"))
    assert "nowhere" in refuse(word)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "zero_optimization": {"stage": 2,}\n}', "line 2, column"),
        ('{"zero_optimizatoin": {}}', "did you mean 'zero_optimization'?"),
        ('{"zero_optimization": {"stage": 4}}', "0, 1, 2 or 3"),
        ('{"train_batch_size": 9}', "contradicts batching.global_batch_size=8"),
        ('{"gradient_accumulation_steps": 3}', "contradicts batching.global_batch_size=8"),
        ('{"train_micro_batch_size_per_gpu": 0}', "a number from 1"),
        ('{"optimizer": {}}', "set optim.* in the configuration"),
        ('{"gradient_clipping": 5}', "contradicts optim.clip_norm"),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "choose one"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', "reduce_bucket_size"),
        ("[]", "one JSON object"),
    ],
)
def test_a_faulty_deepspeed_json_is_one_line(refuse, tmp_path, text, says):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert says in refuse(json=path)


def test_a_missing_deepspeed_json_names_the_path(refuse):
    assert "nothing.json: No such file" in refuse(json="nothing.json")


def test_the_json_batch_is_obeyed_when_the_config_leaves_it_open(refuse, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 3}')
    assert "micro_batch_size x world_size = 3 x 1" in refuse(json=path)


def test_a_folder_of_another_configuration_needs_a_word(refuse, tmp_path):
    from elip_ds.config import dump_config, load_config

    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config(tiny_words("optim.lr=0.5"))))
    (folder / "metrics.jsonl").write_text("")
    line = refuse()
    assert "optim.lr: 0.5 -> 0.001" in line and "run.allow_config_change=true" in line


def test_a_start_that_failed_at_the_door_claims_no_folder(refuse):
    assert "data.train" in refuse("data.train=nowhere/*.tar")
    assert "nearest" in refuse("batching.micro_batch_size=3")  # its own fault, not the folder's


def test_a_folder_that_cannot_be_made_is_named(refuse, tmp_path):
    (tmp_path / "runs").write_text("a file")
    assert "run.dir" in refuse()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optim.lrr=1", "optim.lrr is not a setting"),
        ("data.train=nowhere/*.tar", "data.train: no file matches nowhere/*.tar"),  # rank 0 knows
    ],
)
def test_the_real_command_says_its_line_once_for_all_ranks(tmp_path, word, says):
    """As typed, through DeepSpeed's launcher, on two ranks."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", "2", TRAIN, "--deepspeed", ROOT / "ds_configs/z2.json"]
    done = subprocess.run(
        [*map(str, command), word],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count(f"error: {says}") == 1
    assert "Traceback" not in done.stdout + done.stderr
