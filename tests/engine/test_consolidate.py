"""DeepSpeed's own files, of real runs at every stage -> the weights that the run itself wrote."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elip_ds.engine import consolidate
from elip_ds.errors import UserError

pytestmark = pytest.mark.slow

WORDS = ("schedule.length=32 samples", "run.on_finish=nothing", "model.text.dropout=0.1")


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "convert_weights.py"
    spec = importlib.util.spec_from_file_location("convert_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("json", "ranks"), [("z0", 2), ("z1", 2), ("z2", 2), ("z3", 2), ("z2", 1)])
def test_what_deepspeed_wrote_is_what_the_run_wrote_bit_for_bit(start, tmp_path, tool, json, ranks):
    job = start(f"{json}-{ranks}", *WORDS, ranks=ranks, json=json).finish()
    folder = job.newest()
    trained = load_file(folder / "weights.safetensors")
    queues = load_file(folder / "state.safetensors")
    lost = tmp_path / folder.name
    shutil.copytree(folder, lost)
    (lost / "weights.safetensors").unlink()

    out = tmp_path / "out.safetensors"
    tool.main(["--from", "deepspeed", str(lost), "--to", "elip_ds", "--out", str(out)])
    tensors = load_file(out)
    student = {n: v for n, v in trained.items() if not n.startswith("teacher.")}
    assert tensors.keys() == student.keys() | queues.keys()
    for name, value in (student | queues).items():
        assert torch.equal(tensors[name], value), name

    if json == "z3":  # once: such a file starts a run of any kind
        still = ("optim.lr=1e-12", "schedule.min_lr=0", "schedule.warmup_lr=0")
        heir = start(f"heir-{ranks}", *WORDS, *still, f"model.init_from={out}", ranks=1)
        after = load_file(heir.finish().newest() / "weights.safetensors")
        for name, value in student.items():
            torch.testing.assert_close(after[name], value, atol=1e-7, rtol=0)


def test_files_of_a_missing_rank_are_told(start, tmp_path):
    folder = start("z1-2", *WORDS, json="z1").finish().newest()
    lost = tmp_path / folder.name
    shutil.copytree(folder, lost)
    sorted(lost.glob("*_optim_states.pt"))[1].unlink()
    with pytest.raises(UserError, match="cannot be put together: Expected 2 of"):
        consolidate(lost)


def test_code_in_deepspeeds_files_is_never_run(start, tmp_path):
    import os

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    folder = start("z1-2", *WORDS, json="z1").finish().newest()
    lost = tmp_path / folder.name
    shutil.copytree(folder, lost)
    for file in lost.glob("*_states.pt"):
        torch.save({"module": {}, "extra": Payload()}, file)
    with pytest.raises(UserError, match="cannot be put together"):
        consolidate(lost)
    assert not (tmp_path / "was-run").exists()


def test_a_folder_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint of DeepSpeed"):
        consolidate(tmp_path)
