"""Files of weights: told apart by content, nothing in them run, one line for what is none."""

import argparse
import gzip
import os
import pickle
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from elip_ds.errors import UserError
from elip_ds.weights.container import read_container

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}


def write(kind: str, path: Path) -> Path:
    """STATE as a file of a kind, under a name that says nothing."""
    ways = {
        "safetensors": lambda: save_file(STATE, path),
        "zip": lambda: torch.save(STATE, path),
        "old pickle": lambda: torch.save(STATE, path, _use_new_zipfile_serialization=False),
        "under model": lambda: torch.save({"model": STATE, "epoch": 3, "optimizer": {}}, path),
        "under state_dict": lambda: torch.save({"state_dict": STATE, "scaler": {}}, path),
        "of ddp": lambda: torch.save(
            {"state_dict": {f"module.{name}": value for name, value in STATE.items()}}, path
        ),
        "with others": lambda: torch.save({**STATE, "step": 3, "name": "x"}, path),
        "parameters": lambda: torch.save(
            {**STATE, "a.weight": torch.nn.Parameter(STATE["a.weight"])}, path
        ),
    }
    ways[kind]()
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "safetensors",
        "zip",
        "old pickle",
        "under model",
        "under state_dict",
        "of ddp",
        "with others",
        "parameters",
    ],
)
def test_the_weights_of_every_container_are_found_by_its_content(tmp_path, kind, packed):
    path = write(kind, tmp_path / "file.bin")
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    tensors = read_container(path).tensors
    assert tensors.keys() == STATE.keys()
    for name, value in STATE.items():
        assert torch.equal(tensors[name], value)
        assert not tensors[name].requires_grad


class Scripted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("context_length", torch.tensor(77))

    def forward(self, x):
        return self.linear(x)


def test_a_torchscript_archive_gives_its_weights(tmp_path):
    module = Scripted().half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(module), tmp_path / "model.pt")
    container = read_container(tmp_path / "model.pt")
    assert container.kind == "torchscript"
    assert torch.equal(container.tensors["linear.weight"], module.linear.weight)
    assert container.tensors["context_length"] == 77


def test_metadata_of_safetensors_is_kept(tmp_path):
    save_file(STATE, tmp_path / "x", metadata={"elip_ds": "{}"})
    assert read_container(tmp_path / "x").metadata["elip_ds"] == "{}"


def test_classes_of_training_frameworks_are_neither_imported_nor_in_the_way(tmp_path):
    """As in a Lightning checkpoint: callbacks by class, settings in classes of its own."""
    module = types.ModuleType("pytorch_lightning.callbacks.gone")
    module.Checkpoint = type("Checkpoint", (), {"__module__": module.__name__})
    module.Settings = type("Settings", (dict,), {"__module__": module.__name__})
    parents = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    modules = {name: types.ModuleType(name) for name in parents} | {module.__name__: module}
    sys.modules |= modules
    try:
        tree = {
            "state_dict": STATE,
            "callbacks": {module.Checkpoint: {"best": 0.5}},
            "hyper_parameters": module.Settings(image_size=288),
            "args": argparse.Namespace(lr=1e-5),
        }
        torch.save(tree, tmp_path / "lightning.ckpt")
    finally:
        for name in modules:
            del sys.modules[name]
    tensors = read_container(tmp_path / "lightning.ckpt").tensors
    assert torch.equal(tensors["a.weight"], STATE["a.weight"])
    assert not modules.keys() & sys.modules.keys()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path, zipped, packed):
    mark = tmp_path / "was-run"
    tree = {"state_dict": STATE, "extra": Payload(mark)}
    torch.save(tree, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    if packed:
        file = tmp_path / "evil.pt"
        file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(UserError, match=r"evil\.pt holds more than weights.*mkdir") as error:
        read_container(tmp_path / "evil.pt")
    assert "\n" not in str(error.value)
    assert not mark.exists()


def test_code_in_a_bare_pickle_is_never_run(tmp_path):
    mark = tmp_path / "was-run"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(mark), protocol=2))
    with pytest.raises(UserError, match=r"evil\.pkl"):
        read_container(tmp_path / "evil.pkl")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Sign in</body>", "is a web page: the download failed"),
        (b"\n  <html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b"step,loss\n1,2\n", "holds no weights: not safetensors"),
        (b"\x1f\x8b\x08\x00garbage", "is cut off or damaged"),
        (b"\x80\x02garbage", "more than weights|cut off or damaged"),
    ],
)
def test_what_is_no_file_of_weights_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"file\.pth.*({message})") as error:
        read_container(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old pickle"])
def test_a_file_that_was_cut_off_is_told_in_one_line(tmp_path, kind, packed, share):
    path = write(kind, tmp_path / "cut.pth")
    whole = path.read_bytes()
    if packed:
        whole = gzip.compress(whole)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"cut\.pth is cut off or damaged") as error:
        read_container(path)
    assert "\n" not in str(error.value)


def test_a_folder_or_nothing_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_container(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_container(tmp_path)


@pytest.mark.parametrize("tree", [{}, {"epoch": 3, "lr": 0.1}, [1, 2], {"model": {}}])
def test_a_pickle_without_tensors_says_what_it_holds(tmp_path, tree):
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth holds no weights: found"):
        read_container(tmp_path / "x.pth")
