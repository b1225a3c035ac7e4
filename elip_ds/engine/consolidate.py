"""Whole weights out of the files that DeepSpeed itself writes, at any stage, on the CPU."""

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from elip_ds.engine.checkpoint import weights_only_classes
from elip_ds.errors import UserError

WHOLE = "mp_rank_00_model_states.pt"


def consolidate(folder: Path) -> dict[str, Tensor]:
    """Task names -> fp32 weights of what was trained. A momentum twin is not in DeepSpeed's files.

    folder: with *_optim_states.pt of every rank, or, without ZeRO, one whole model.
    Raises UserError when they are not there, or not all of them.
    """
    sharded = list(folder.glob("*_optim_states.pt"))
    if not sharded and not (folder / WHOLE).is_file():
        raise UserError(f"{folder} holds no checkpoint of DeepSpeed: no *_optim_states.pt")
    try:
        with _weights_only(), contextlib.redirect_stdout(io.StringIO()):
            state = _sharded(folder) if sharded else _whole(folder)
    except (ValueError, FileNotFoundError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder}: DeepSpeed's files cannot be put together: {reason}") from None
    return {
        name: value.detach().float().contiguous()
        for name, value in state.items()
        if not name.startswith("teacher.")
    }


def _sharded(folder: Path) -> dict[str, Tensor]:
    return get_fp32_state_dict_from_zero_checkpoint(
        str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
    )


def _whole(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / WHOLE, map_location="cpu", weights_only=True)["module"]


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """DeepSpeed's own loader asks for unrestricted pickles; this makes PyTorch refuse them."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with torch.serialization.safe_globals(weights_only_classes()):
            yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
