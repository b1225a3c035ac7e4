"""Weights to disk: written aside, then renamed, so that a full disk leaves nothing half-written.

safetensors is streamed, one tensor at a time: its own save_file wants all of them in memory, which
for a file that is being converted is the file once more.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from elip_ds.errors import UserError
from elip_ds.weights.table import Weight

DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def write_weights(
    path: Path, weights: Mapping[str, Weight], metadata: dict[str, str], wrap: str | None
) -> None:
    """By the name's ending: .safetensors with metadata, anything else a file of torch.save.

    wrap: the key that the latter keeps the weights under; None: none.
    Raises UserError when it cannot be written.
    """
    if path.suffix == ".safetensors":
        _write_aside(path, lambda file: write_safetensors(file, weights, metadata))
    else:
        _write_aside(path, lambda file: _write_pickle(file, weights, wrap))


def _write_aside(path: Path, write: Callable[[BinaryIO], None]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_safetensors(
    file: BinaryIO, weights: Mapping[str, Weight], metadata: dict[str, str]
) -> None:
    """Weights of 8 bytes first, so that all are aligned."""
    order = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        shape, dtype, _ = weights[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        value = weights[name].read().contiguous()
        assert (tuple(value.shape), value.dtype) == weights[name][:2], name
        file.write(value.reshape(-1).numpy().data)


def _write_pickle(file: BinaryIO, weights: Mapping[str, Weight], wrap: str | None) -> None:
    state = {name: weight.read().contiguous() for name, weight in weights.items()}
    try:
        torch.save({wrap: state} if wrap else state, file)
    except RuntimeError as error:  # so its zip writer reports a full disk
        raise OSError(errno.EIO, str(error).split("\n")[0]) from None
