"""ITM: does this caption belong to this image? Judged on what the fused pair is pooled to.

Source: ALBEF (Li et al. 2021) section 3.2 and its released code; METER (Dou et al. 2022).

B local batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.errors import UserError
from elip_ds.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfig,
    Pairs,
    Pass,
    Setup,
    StepContext,
)


@dataclass(frozen=True)
class ITMConfig(ObjectiveConfig):
    negatives: str = "hard"
    "hard: by the contrastive similarities (ALBEF, BLIP); random: half of the pairs (METER)."

    def __post_init__(self) -> None:
        if self.negatives not in ("hard", "random"):
            raise UserError(f"objectives.itm.negatives={self.negatives!r}: choose hard or random")


def draw_negatives(similarity: Tensor, noise: Tensor) -> Tensor:
    """For each row one other column, drawn with the softmax of its similarity as weight.

    similarity: (B, B), fp32, B >= 2.  noise: (B,) uniform in [0, 1).
    Returns (B,), never the row's own.
    Source: ALBEF. Differs: 1e-4 is added to the weights, as BLIP does, because a softmax that has
    all its mass on the pair itself leaves nothing to draw from.
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    weights = (similarity.softmax(dim=1) + 1e-4).masked_fill(own, 0.0)
    cumulated = weights.cumsum(dim=1)
    below = cumulated <= noise.unsqueeze(1) * cumulated[:, -1:]
    drawn = below.sum(dim=1).clamp(max=len(similarity) - 1)
    # A sum made in parallel may round so that a column of weight 0 is drawn after all.
    rows = torch.arange(len(similarity), device=similarity.device)
    return torch.where(drawn == rows, (rows - 1) % len(similarity), drawn)


def draw_matches(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Half the rows, rounded down, keep their image, the others get any other one of the batch.

    noise: (B, 2) uniform in [0, 1), B >= 2.  Returns the image's row (B,), and label (B,) 1 for
    a true pair. Source: METER. Differs: there the wrong image comes from the whole dataset; here
    it comes from the micro-batch, which is a random draw of it.
    """
    batch = len(noise)
    rows = torch.arange(batch, device=noise.device)
    label = torch.zeros(batch, dtype=torch.long, device=noise.device)
    label[noise[:, 0].argsort()[: batch // 2]] = 1
    other = (rows + 1 + (noise[:, 1] * (batch - 1)).long()) % batch
    return torch.where(label == 1, rows, other), label


class ITM(Objective):
    """Negatives come from this rank's micro-batch: the loss depends on how a batch is split."""

    Config = ITMConfig
    min_micro_batch: ClassVar = 2

    def __init__(self, config: ITMConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.head = nn.Linear(setup.pooled_width, 2)

    @classmethod
    def needs(cls, config: ITMConfig) -> frozenset[str]:
        hard = {"sim_i2t", "sim_t2i"} if config.negatives == "hard" else set()
        return frozenset({"fusion", *hard})

    def forward(self, context: StepContext) -> Loss:
        pooled = context.fused(self).pooled
        if self.config.negatives == "hard":  # (3B, P): pairs and wrong texts in turn, wrong images
            rows = torch.arange(len(pooled), device=pooled.device)
            labels = ((rows < 2 * len(context.batch)) & (rows % 2 == 0)).long()
        else:
            _, labels = draw_matches(context.noise("itm", 2))
        logits = self.head(pooled).float()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return Loss(
            values={"itm": F.cross_entropy(logits, labels)},
            logs={"itm_accuracy": accuracy},
            carry={},
        )

    def pairs(self, context: StepContext) -> Pairs:
        """Hard: true pairs, each image with a wrong text, and each text with a wrong image. Images
        keep the tokens that their own captions chose. Random: each text with one image, which is
        pruned by it.
        """
        noise, text = context.noise("itm", 2), context.run(Pass("text"))
        if self.config.negatives == "random":
            rows, _ = draw_matches(noise)
            context.views["matched"] = context.batch.images[rows]
            return Pairs(Pass("image", view="matched"), (text,))
        image_for_text = draw_negatives(context.given["sim_t2i"], noise[:, 0])
        text_for_image = draw_negatives(context.given["sim_i2t"], noise[:, 1])
        return Pairs(Pass("image"), (text, text.take(text_for_image)), ((text, image_for_text),))
