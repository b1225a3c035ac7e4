"""What every model has: where to start from, and what its joint space is made of."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    name: str = "albef"
    init_from: list[str] = field(default_factory=list)
    "Weights to start from: runs, checkpoints, converted files or published ones, the last counts."


class Temperature(nn.Module):
    """The learned temperature of the contrastive logits, clamped to [0.001, 0.5].

    # differs from ALBEF, which clamps the parameter in place at every forward: under ZeRO the fp32
    # master would undo that. The clamped value is used here and the gradient passes straight
    # through.
    Of shape (1,), because DeepSpeed cannot broadcast 0-d parameters.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((1,), start))

    def forward(self) -> Tensor:
        """(1,), fp32."""
        value = self.temperature.float()
        return value + (value.clamp(0.001, 0.5) - value).detach()


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last dimension, fp32."""
    return F.normalize(x.float(), dim=-1)
