"""ITM: does this caption belong to this image? Judged on the fused [CLS], with hard negatives.

Source: ALBEF (Li et al. 2021) section 3.2 and its released code.

B local batch, L text tokens, M image tokens, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.objectives.base import Loss, Objective, ObjectiveConfig, Pass, Setup, StepContext


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


class ITM(Objective):
    """Negatives come from this rank's micro-batch: the loss depends on how a batch is split."""

    Config = ObjectiveConfig
    needs: ClassVar = frozenset({"sim_i2t", "sim_t2i"})
    min_micro_batch: ClassVar = 2

    def __init__(self, config: ObjectiveConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.head = nn.Linear(setup.width, 2)

    def forward(self, context: StepContext) -> Loss:
        text = context.run(Pass("text"))
        image = context.run(Pass("image")).image_embeds
        with torch.no_grad():
            noise = context.noise("itm", 2)
            image_for_text = draw_negatives(context.given["sim_t2i"], noise[:, 0])
            text_for_image = draw_negatives(context.given["sim_i2t"], noise[:, 1])
        states, mask = text.text_embeds, text.attention_mask
        # Pairs, then each text with a wrong image, then each image with a wrong text: one pass.
        fused = context.model().fuse(
            torch.cat([states, states, states[text_for_image]]),
            torch.cat([mask, mask, mask[text_for_image]]),
            torch.cat([image, image[image_for_text], image]),
        )
        logits = self.head(fused[:, 0]).float()  # (3B, 2)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(image)] = 1
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return Loss(
            values={"itm": F.cross_entropy(logits, labels)},
            logs={"itm_accuracy": accuracy},
            carry={},
        )
