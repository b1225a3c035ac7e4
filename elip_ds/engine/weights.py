"""The whole fp32 weights of a checkpoint: read, checked against a task, put into it.

weights.safetensors names a parameter as the task does, the momentum twin's as teacher.*.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from elip_ds.errors import UserError
from elip_ds.run import WEIGHTS
from elip_ds.weights import saved_name


def read_tensors(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """A safetensors file. Raises UserError when it is not there, cut or no such file."""
    try:
        return load_file(file, device=device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


@torch.no_grad()
def load_weights(path: Path, task: nn.Module) -> None:
    """Copy a checkpoint's weights into a task that no engine has touched yet."""
    weights = read_weights(path, task)
    for name, parameter in task.named_parameters():
        parameter.copy_(weights[saved_name(name)])


def read_weights(path: Path, task: nn.Module) -> dict[str, Tensor]:
    """The whole fp32 weights of a checkpoint, checked against a task on the CPU or sharded.

    Raises UserError, naming the first difference, when they are another model's.
    """
    weights = read_tensors(path / WEIGHTS)
    expected = {
        saved_name(name): tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in task.named_parameters()
    }
    missing, extra = sorted(expected.keys() - weights), sorted(weights.keys() - expected)
    wrong = [k for k in sorted(expected.keys() & weights) if tuple(weights[k].shape) != expected[k]]
    if missing or extra or wrong:
        detail = (
            f"{wrong[0]} is {tuple(weights[wrong[0]].shape)}, here {expected[wrong[0]]}"
            if wrong
            else f"missing {missing[:1]}, left over {extra[:1]}"
        )
        raise UserError(
            f"{path} is a checkpoint of another model: {detail} "
            f"({len(missing)} missing, {len(extra)} left over, {len(wrong)} of other shape)"
        )
    return weights
