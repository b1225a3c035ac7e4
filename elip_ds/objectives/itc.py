"""ITC: image-text contrast against momentum features and a queue of past ones, with soft targets.

Source: ALBEF (Li et al. 2021) section 3.2 and its released code.

B local batch, W ranks, E joint space, Q queue length, K = W * B + Q candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elip_ds import dist
from elip_ds.config import check_duration
from elip_ds.errors import UserError
from elip_ds.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfig,
    Pass,
    Progress,
    Setup,
    StepContext,
)
from elip_ds.objectives.ring import Ring
from elip_ds.objectives.soft_targets import ramp, soft_contrast


@dataclass(frozen=True)
class ITCConfig(ObjectiveConfig):
    queue_size: int = 65536
    "Past momentum features that serve as further candidates; 0 is off."
    alpha: float = 0.4
    "Share of the momentum twin's similarities in the targets."
    alpha_ramp: str = "1 epoch"
    "alpha grows linearly from 0 over this long."
    gather_keys: bool = True
    "Candidates from all ranks; false: only this rank's and the queue, as released."

    def __post_init__(self) -> None:
        check_duration("objectives.itc.alpha_ramp", self.alpha_ramp)
        if self.queue_size < 0:
            raise UserError(f"objectives.itc.queue_size={self.queue_size}: 0 (off) or more")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"objectives.itc.alpha={self.alpha}: 0..1")


class ITC(Objective):
    """Gives sim_i2t and sim_t2i, (B, B): local similarities over temperature, for hard negatives.

    # differs from ALBEF: candidates come from all ranks by default, so that the loss does not
    # depend on how a batch is split; the queue takes in a global batch after the optimizer step.
    Negatives of the current step stay inside one micro-batch of each rank.
    """

    Config = ITCConfig
    gives: ClassVar = frozenset({"sim_i2t", "sim_t2i"})

    def __init__(self, config: ITCConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.image_queue = Ring(config.queue_size, setup.embed_dim, setup.seed)
        self.text_queue = Ring(config.queue_size, setup.embed_dim, setup.seed + 1)

    @classmethod
    def needs(cls, config: ITCConfig) -> frozenset[str]:
        return frozenset({"teacher", "joint_space"})

    def forward(self, context: StepContext) -> Loss:
        image = context.run(Pass("image")).image_feat
        text = context.run(Pass("text")).text_feat
        with torch.no_grad():
            teacher_image = context.run(Pass("image", "teacher")).image_feat
            teacher_text = context.run(Pass("text", "teacher")).text_feat
            image_keys, text_keys, start = self._keys(teacher_image, teacher_text)
        own = start + torch.arange(len(image), device=image.device)
        temperature = context.model().temperature()
        alpha = ramp(self.config.alpha, self.config.alpha_ramp, context.progress)
        losses = [
            soft_contrast(x, twin, (keys, queue.rows), own, temperature, alpha).mean()
            for x, twin, keys, queue in (
                (image, teacher_image, text_keys, self.text_queue),
                (text, teacher_text, image_keys, self.image_queue),
            )
        ]
        with torch.no_grad():  # those of the present batch are read once more
            i2t, t2i = image @ text_keys.T / temperature, text @ image_keys.T / temperature
        local = slice(start, start + len(image))
        context.given |= {"sim_i2t": i2t[:, local], "sim_t2i": t2i[:, local]}
        hits = (i2t.argmax(dim=1) == own).float().mean()
        return Loss(
            values={"itc": 0.5 * (losses[0] + losses[1])},
            logs={"itc_in_batch_recall": hits, "temperature": temperature.detach().squeeze()},
            carry={"image": image_keys, "text": text_keys},
        )

    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        if self.config.queue_size == 0:
            return
        for carry in carries:
            for queue, keys in ((self.image_queue, "image"), (self.text_queue, "text")):
                rows = carry[keys] if self.config.gather_keys else dist.gather_samples(carry[keys])
                queue.push(rows)

    def state(self) -> dict[str, Tensor]:
        return {
            "image_queue": self.image_queue.rows,
            "text_queue": self.text_queue.rows,
            "at": torch.tensor(self.image_queue.at),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.image_queue.rows.copy_(state["image_queue"])
        self.text_queue.rows.copy_(state["text_queue"])
        self.image_queue.at = self.text_queue.at = int(state["at"])

    def _keys(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, int]:
        """(W * B, E) candidates of both kinds, and the place of the first local row among them."""
        if not self.config.gather_keys:
            return image, text, 0
        both = dist.gather_samples(torch.stack([image, text], dim=1))  # one collective
        return both[:, 0], both[:, 1], dist.samples_before(len(image))
