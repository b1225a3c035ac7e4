"""Checkpoints on disk: written aside, flushed, then renamed, so that a kill at any moment leaves
the last whole one in place.

A checkpoint is a folder step-00000123 with
  meta.json            step, samples seen, ranks, ZeRO stage, versions
  config.yaml          the resolved configuration
  weights.safetensors  student (model.*, objectives.*) and teacher.*, fp32, whole
  state.safetensors    queues
  tokenizer.json       the vocabulary, and how captions become its ids
  rng-rank*.pt, mp_rank_*.pt, *_optim_states.pt   per rank: random generators; DeepSpeed's own files
and `latest`, beside the folders, names the newest, for DeepSpeed's tools and for people.
"""

import copyreg
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors import SafetensorError

from elip_ds.run import META, list_checkpoints

# Some versions of Python pickle a member of an enumeration as getattr(class, name), and getattr is
# nothing that a weights-only load may call.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def read_meta(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / META).read_text())


def flush(path: Path) -> None:
    """Until the file, or the folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(partial: Path, final: Path, keep: int) -> None:
    """Give a written folder its name, point `latest` at it, remove all but the newest keep."""
    for file in partial.iterdir():
        flush(file)
    flush(partial)
    if final.exists():  # the same step again, after a resume: identical content
        _remove(final)
    os.rename(partial, final)
    latest = final.parent / "latest"
    pointer = final.parent / ".latest.partial"
    pointer.write_text(final.name)
    flush(pointer)
    os.replace(pointer, latest)
    flush(final.parent)
    for old in list_checkpoints(final.parent)[:-keep]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    dying = checkpoint.with_name(f".old-{checkpoint.name}")
    os.rename(checkpoint, dying)  # first lose the name, so that half a checkpoint is never one
    shutil.rmtree(dying, ignore_errors=True)  # NFS keeps what another process has open


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for pattern in (".step-*", ".old-*", ".latest.partial"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class CarefulFiles(TorchCheckpointEngine):
    """DeepSpeed's file layer: flushes what it writes, reads pickles weights-only, and remembers a
    failed write instead of raising, because a rank that raises leaves the others in a barrier.
    """

    def __init__(self, serialization: bool = True) -> None:
        self.name = "CarefulFiles"
        self.zipfile_serialization = serialization
        self.failure: str | None = None

    def create(self, info: Any) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        with self.attempt(path):
            torch.save(state_dict, path)
            flush(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(weights_only_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)

    @contextmanager
    def attempt(self, path: str | Path) -> Iterator[None]:
        """Note the first failed write under this, with its path."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch's zip writer reports a full disk as RuntimeError, safetensors as its own error;
            # neither always says so.
            there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
            free = shutil.disk_usage(there).free / 1e6
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.failure = self.failure or f"{path}: {reason}; {free:.1f} MB free there"


def weights_only_classes() -> list[Any]:
    """Classes that DeepSpeed puts into its files and that a weights-only load may build."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
