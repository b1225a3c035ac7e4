"""Files that hold weights: told apart by their content, read without running anything in them.

safetensors, PyTorch's zip and older pickles, TorchScript archives, any of them under gzip; the
weights at the root, or under `model` or `state_dict`. What can be is mapped into memory instead of
read.
"""

import gzip
import pickle
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from elip_ds.errors import UserError

DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError, TypeError),
    *(KeyError, IndexError, AssertionError),
)
"What reading a pickle raises where the file is cut off or bent, by Python's version."

# Whose classes are left in checkpoints beside the weights. None is imported; OrderedDict, which
# takes whatever a pickle puts into it, stands in for all.
BYSTANDERS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "argparse")


class Container(NamedTuple):
    """kind: safetensors, pickle, or torchscript.  metadata: of a safetensors file."""

    tensors: dict[str, Tensor]
    kind: str
    metadata: dict[str, str]


def read_container(path: Path) -> Container:
    """Raises UserError, one line, for anything that is not a whole file of weights."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
        return _read(path, path, head)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or _short(error)}") from None


def _read(path: Path, named: Path, head: bytes) -> Container:
    """named: the path to speak of."""
    start = head.lstrip()[:64].lower()
    if not head:
        raise UserError(f"{named} is empty")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{named} is a web page: the download failed; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{named} is a pointer of Git LFS; fetch the file itself with git lfs pull")
    if head.startswith(b"\x1f\x8b"):
        return _read_gzip(path, named)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, named)
    if head[8:9] == b"{":
        return _read_safetensors(path, named)
    if head.startswith(b"\x80"):
        return Container(_state(_unpickle(path, named), named), "pickle", {})
    raise UserError(f"{named} holds no weights: not safetensors, nor a file of torch.save")


def _read_gzip(path: Path, named: Path) -> Container:
    with tempfile.NamedTemporaryFile() as plain:  # what is mapped from it outlives its name
        try:
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (EOFError, gzip.BadGzipFile) as error:
            raise _damaged(named, error) from None
        plain.flush()
        plain.seek(0)
        return _read(Path(plain.name), named, plain.read(512))


def _read_safetensors(path: Path, named: Path) -> Container:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return Container(load_file(path), "safetensors", metadata)
    except SafetensorError as error:
        raise _damaged(named, error) from None


def _read_zip(path: Path, named: Path) -> Container:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _damaged(named, error) from None
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{named} holds no weights: a zip archive without a pickle of torch.save")
    if any(name.endswith("constants.pkl") for name in names):
        return Container(_state(_read_script(path, named), named), "torchscript", {})
    return Container(_state(_unpickle_zip(path, named), named), "pickle", {})


def _read_script(path: Path, named: Path) -> dict[str, Tensor]:
    """Its code is loaded, but none of it is called."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
        try:
            return torch.jit.load(str(path), map_location="cpu").state_dict()
        except RuntimeError as error:
            raise _damaged(named, error) from None


def _unpickle_zip(path: Path, named: Path) -> Any:
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
    except DAMAGED as error:
        raise _damaged(named, error) from None
    stand_ins: list[Any] = [(OrderedDict, name) for name in foreign if _is_bystander(name)]
    other = [name for name in foreign if not _is_bystander(name)]
    if other:
        raise UserError(
            f"{named} holds more than weights: {', '.join(other)} would run as code; nothing was "
            "run. Save the weights alone (torch.save of a state_dict), or as safetensors"
        )
    with safe_globals(stand_ins):
        return _unpickle(path, named, mmap=True)


def _is_bystander(name: str) -> bool:
    return name.partition(".")[0] in BYSTANDERS


def _unpickle(path: Path, named: Path, mmap: bool | None = None) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        said = str(error)
        if "GLOBAL" in said or "class" in said:
            what = next((line for line in said.splitlines() if "GLOBAL" in line), said)
            raise UserError(
                f"{named} holds more than weights; nothing was run ({_short(what)})"
            ) from None
        raise _damaged(named, error) from None
    except DAMAGED as error:
        raise _damaged(named, error) from None


def _state(tree: Any, named: Path) -> dict[str, Tensor]:
    """The weights of what a file held, without the prefix of DistributedDataParallel."""
    shown = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
    for key in ("state_dict", "model"):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    named_tensors = tree.items() if isinstance(tree, Mapping) else ()
    tensors = {str(k): v.detach() for k, v in named_tensors if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{named} holds no weights: found {shown[:80] or 'nothing'}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _damaged(named: Path, error: Exception) -> UserError:
    return UserError(f"{named} is cut off or damaged ({_short(error)}); fetch or copy it again")


def _short(error: object) -> str:
    line = (" ".join(str(error).split()) or type(error).__name__).split(". ")[0]
    return line if len(line) <= 120 else f"{line[:117]}..."
