"""tools/convert_weights.py as a person calls it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_task
from safetensors.torch import load_file, save_file

from elip_ds.config import dump_config, load_config
from elip_ds.errors import UserError
from elip_ds.weights.start import saved_name

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_weights.py"
spec = importlib.util.spec_from_file_location("convert_weights", TOOL)
assert spec and spec.loader
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of an ALBEF run with one checkpoint."""
    from conftest import tiny_words

    folder = tmp_path / "run" / "ckpt" / "step-00000008"
    folder.mkdir(parents=True)
    task = tiny_task()
    weights = {saved_name(n): p.detach().clone() for n, p in task.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    save_file(task.state(), folder / "state.safetensors")
    (folder / "config.yaml").write_text(dump_config(load_config(tiny_words())))
    (folder / "meta.json").write_text("{}")
    return tmp_path / "run"


def convert(*words: object) -> None:
    tool.main([str(word) for word in words])


def test_a_run_becomes_a_published_file_and_that_one_of_ours(run, tmp_path, capsys):
    published, own = tmp_path / "albef.pth", tmp_path / "own.safetensors"
    convert("--from", "elip_ds", run, "--to", "albef", "--out", published)
    shown = capsys.readouterr().out
    assert "to ALBEF" in shown and "albef.pth: 0." in shown and "MB" in shown
    assert "text_encoder.bert.encoder.layer.{i}.attention.self.{query,key,value}.weight" in shown
    convert("--from", "albef", published, "--to", "elip_ds", "--out", own, "--head-width", 16)
    shown = capsys.readouterr().out
    assert "from ALBEF" in shown and "(32, 32) -> (96, 32)" in shown
    folder = run / "ckpt" / "step-00000008"
    expected = load_file(folder / "weights.safetensors") | load_file(folder / "state.safetensors")
    tensors = load_file(own)
    assert tensors.keys() == expected.keys() - {"teacher.temperature.temperature"}
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


def test_a_wrong_word_is_one_line_and_status_two(run, tmp_path):
    words = [
        "--from",
        "blip",
        str(run),
        "--to",
        "elip_ds",
        "--out",
        str(tmp_path / "x.safetensors"),
    ]
    result = subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.rstrip().endswith(
        "this looks like elip_ds: it is a folder of this project"
    )
    assert len(result.stderr.splitlines()) == 1


def test_an_incomplete_file_is_shown_then_refused_and_nothing_written(run, tmp_path, capsys):
    published, own = tmp_path / "albef.pth", tmp_path / "own.safetensors"
    convert("--from", "elip_ds", run, "--to", "albef", "--out", published)
    state = torch.load(published, weights_only=True)["model"]
    del state["visual_encoder.norm.weight"]
    torch.save({"model": state | {"surprise": torch.ones(1)}}, published)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"missing: visual_encoder\.norm\.weight"):
        convert("--from", "albef", published, "--to", "elip_ds", "--out", own, "--head-width", 16)
    shown = capsys.readouterr().out
    assert "MISSING" in shown and "visual_encoder.norm.weight" in shown
    assert "LEFT OVER" in shown and "surprise" in shown
    assert not own.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "albef", "x", "--to", "blip", "--out", "y"], "one of the two must be elip_ds"),
        (["--from", "elip_ds", "x", "--to", "elip_ds", "--out", "y"], "one of the two must be"),
        (["--from", "albert", "x", "--to", "elip_ds", "--out", "y"], "invalid choice: 'albert'"),
        (["--from", "albef", "nothing", "--to", "elip_ds", "--out", "y"], "nothing cannot be read"),
        (
            ["--from", "deepspeed", "nothing", "--to", "elip_ds", "--out", "y"],
            "neither a checkpoint",
        ),
        (["--from", "elip_ds", "nothing", "--to", "albef", "--out", "y"], "nothing cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(words, message):
    with pytest.raises(UserError, match=message):
        convert(*words)


def test_converted_weights_are_safetensors(run, tmp_path):
    convert("--from", "elip_ds", run, "--to", "albef", "--out", tmp_path / "a.pth")
    words = ["--from", "albef", tmp_path / "a.pth", "--to", "elip_ds", "--head-width", 16]
    with pytest.raises(UserError, match=r"converted weights are a \.safetensors file"):
        convert(*words, "--out", tmp_path / "x.pth")


def test_deepspeed_means_the_whole_weights_where_they_are(run, tmp_path):
    own = tmp_path / "own.safetensors"
    convert("--from", "deepspeed", run, "--to", "elip_ds", "--out", own)
    expected = load_file(run / "ckpt" / "step-00000008" / "weights.safetensors")
    tensors = load_file(own)
    assert all(torch.equal(value, tensors[name]) for name, value in expected.items())
    assert "itc.image_queue" in tensors
