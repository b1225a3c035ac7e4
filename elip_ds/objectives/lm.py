"""LM: write the caption word by word from the image and the words before.

Source: BLIP (Li et al. 2022) section 3.2 and its released code.

B local batch, L text tokens, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds import dist
from elip_ds.errors import UserError
from elip_ds.objectives.base import Loss, Objective, ObjectiveConfig, Pass, StepContext
from elip_ds.objectives.words import in_pieces


@dataclass(frozen=True)
class LMConfig(ObjectiveConfig):
    label_smoothing: float = 0.1
    "Share of the target that is spread evenly over the whole vocabulary."

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"objectives.lm.label_smoothing={self.label_smoothing}: 0 (off) or more, below 1"
            )


class LM(Objective):
    """Every token but the first is guessed from those before it; padding is not.

    The mean is over the words of all ranks, so that it does not depend on the split over ranks;
    over accumulation steps it is a mean of means.
    # differs from BLIP, where each rank divides by its own count.
    """

    Config = LMConfig

    @classmethod
    def needs(cls, config: LMConfig) -> frozenset[str]:
        return frozenset({"decoder"})

    def forward(self, context: StepContext) -> Loss:
        targets = context.texts["clean"][0][:, 1:]  # (B, L - 1)
        real = (targets != self.setup.special_ids["[PAD]"]).flatten()
        states = context.run(Pass("decoder"))[:, :-1].flatten(0, 1)  # (B * (L - 1), D)
        smoothing = self.config.label_smoothing

        def judge(states: Tensor, labels: Tensor) -> Any:
            logits = context.model().word_logits(states).float()
            log_p = logits.log_softmax(dim=1)
            nats = F.nll_loss(log_p, labels, reduction="none")
            losses = (1 - smoothing) * nats - smoothing * log_p.mean(dim=1)
            return losses, nats.detach(), (logits.argmax(dim=1) == labels).float()

        losses, nats, hits = in_pieces(judge, self.setup.vocab_size, states, targets.flatten())
        # This rank's part of all words, so that the mean over ranks is the mean over words.
        count = dist.sum_over_ranks(real.sum()).clamp(min=1) / dist.world_size()
        count = count * dist.sample_weight()
        value, nats_per_word, accuracy = (
            torch.where(real, x, 0.0).sum() / count for x in (losses, nats, hits)
        )
        return Loss(
            values={"lm": value},
            logs={"lm_accuracy": accuracy, "lm_nats_per_word": nats_per_word},  # not smoothed
            carry={},
        )
