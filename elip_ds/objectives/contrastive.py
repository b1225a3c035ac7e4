"""Contrast of images and texts with each other, all other pairs of the global batch as negatives.

Source: CLIP (Radford et al., arXiv:2103.00020); local_loss and gather_with_grad as in open_clip.

B local batch, W ranks, E joint space.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds import dist
from elip_ds.objectives.base import (
    Features,
    Loss,
    Objective,
    ObjectiveConfig,
    Pass,
    StepContext,
)


@dataclass(frozen=True)
class ContrastiveConfig(ObjectiveConfig):
    local_loss: bool = True
    "Each rank scores its own rows, (B, W * B) logits; false: every rank scores all."
    gather_with_grad: bool = True
    "Gradient reaches the features of all ranks; false: of this rank's rows only."
    cache: bool = True
    "With accumulation, contrast the samples of all micro-batches, for one more forward of each."


class Contrastive(Objective):
    """Gives sim_i2t and sim_t2i, (B, B): scaled similarities of this micro-batch.

    The gradient is that of the global batch with gather_with_grad. Without it the published code's
    is not: W times too small, or with local_loss without the part that comes from other ranks.
    Without cache, negatives of the step stay inside one micro-batch of each rank.
    # differs from open_clip: both settings are on by default, as large batches want them, and the
    gradient of the scale comes once under accumulation, not once a micro-batch.
    """

    Config = ContrastiveConfig
    gives: ClassVar = frozenset({"sim_i2t", "sim_t2i"})

    @classmethod
    def needs(cls, config: ContrastiveConfig) -> frozenset[str]:
        return frozenset({"joint_space"})

    @property
    def caches(self) -> bool:
        return self.config.cache

    def forward(self, context: StepContext) -> Loss:
        return self.loss(self.features(context))

    def features(self, context: StepContext) -> Features:
        image = context.run(Pass("image")).image_feat
        text = context.run(Pass("text")).text_feat
        scale = 1 / context.model().temperature()
        similarity = (scale * image @ text.T).detach()
        context.given |= {"sim_i2t": similarity, "sim_t2i": similarity.T}
        return Features((image, text), (scale,))

    def loss(self, features: Features) -> Loss:
        (image, text), (scale,) = features
        images, texts, start = self._gather(image, text)
        if self.config.local_loss:
            i2t, t2i = scale * image @ texts.T, scale * text @ images.T
        else:
            i2t, start = scale * images @ texts.T, 0
            t2i = i2t.T
        own = start + torch.arange(len(i2t), device=i2t.device)
        value = 0.5 * (F.cross_entropy(i2t, own) + F.cross_entropy(t2i, own))
        hits = (i2t.argmax(dim=1) == own).float().mean()
        return Loss(
            values={"contrastive": value},
            logs={
                "contrastive_in_batch_recall": hits,
                "logit_scale": scale.detach().squeeze(),
            },
            carry={},
        )

    def _gather(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, int]:
        """(W * B, E) of both kinds, and the place of the first local row among them."""
        if dist.world_size() == 1:  # all rows are this rank's
            return image, text, 0
        both = torch.stack([image, text], dim=1)  # one collective
        start = dist.samples_before(len(both))
        if self.config.gather_with_grad:
            rows = dist.gather_samples_with_grad(both)
        else:
            rows = dist.gather_samples(both)
            if not self.config.local_loss:
                rows = torch.cat([rows[:start], both, rows[start + len(both) :]])
        return rows[:, 0], rows[:, 1], start
