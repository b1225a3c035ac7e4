"""Weights to disk: what safetensors reads back, and what a full disk leaves."""

import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from elip_ds.errors import UserError
from elip_ds.weights.store import write_weights
from elip_ds.weights.table import Weight, plain

STATE = {
    "b.odd": torch.randn(3),
    "at": torch.tensor(7),
    "a.weight": torch.randn(5, 3),
    "rows": torch.randn(4, 6).T,
    "none": torch.zeros(0, 4),
}


def test_a_streamed_file_is_what_the_library_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    write_weights(path, plain(STATE), {"elip_ds": "said"}, None)
    tensors = load_file(path)
    assert tensors.keys() == STATE.keys()
    for name, value in STATE.items():
        assert torch.equal(tensors[name], value), name
        assert tensors[name].dtype == value.dtype
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "elip_ds": "said"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_any_other_ending_is_a_file_of_torch_save_under_its_key(tmp_path):
    for name, wrap in (("x.pth", "model"), ("y.bin", None)):
        write_weights(tmp_path / name, plain(STATE), {}, wrap)
        tree = torch.load(tmp_path / name, weights_only=True)
        assert torch.equal((tree[wrap] if wrap else tree)["rows"], STATE["rows"])


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_failure_half_way_leaves_the_file_before_and_nothing_else(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(b"before")

    def fail() -> torch.Tensor:
        raise UserError("a and b differ")

    weights = plain(STATE) | {"zz": Weight((2,), torch.float32, fail)}
    with pytest.raises(UserError, match="a and b differ"):
        write_weights(path, weights, {}, None)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, ending):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        big = {"big": torch.zeros(500_000)}
        with pytest.raises(UserError, match=r"cannot be written: .+") as error:
            write_weights(disk / f"x.{ending}", plain(big), {}, None)
        assert "\n" not in str(error.value)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone/x\.safetensors cannot be written: No such file"):
        write_weights(tmp_path / "gone" / "x.safetensors", plain(STATE), {}, None)
