"""MLM: guess masked words from the rest of the caption and the image, helped by the momentum twin.

Source: ALBEF (Li et al. 2021) section 3.2 and its released code; masking: BERT (Devlin et al.).

B local batch, L text tokens, D width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds import dist
from elip_ds.config import check_duration
from elip_ds.errors import UserError
from elip_ds.objectives.base import Loss, Objective, ObjectiveConfig, Pairs, Pass, StepContext
from elip_ds.objectives.soft_targets import ramp, soft_cross_entropy
from elip_ds.objectives.words import first_of, in_pieces, room_for


@dataclass(frozen=True)
class MLMConfig(ObjectiveConfig):
    probability: float = 0.15
    "Share of the words selected."
    alpha: float = 0.4
    "Share of the momentum twin's distribution in the targets; 0 runs no twin."
    alpha_ramp: str = "1 epoch"
    "alpha grows linearly from 0 over this long."
    guide: str = "clean"
    "Caption that guides the pruning: clean (ALBEF), or masked (METER), which leaks no word."

    def __post_init__(self) -> None:
        check_duration("objectives.mlm.alpha_ramp", self.alpha_ramp)
        if not 0 < self.probability < 1:
            raise UserError(f"objectives.mlm.probability={self.probability}: between 0 and 1")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"objectives.mlm.alpha={self.alpha}: 0..1")
        if self.guide not in ("clean", "masked"):
            raise UserError(f"objectives.mlm.guide={self.guide!r}: choose clean or masked")


def mask_words(
    input_ids: Tensor,
    noise: Tensor,
    probability: float,
    *,
    vocab_size: int,
    special_ids: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Select words; of those 80 % become [MASK], 10 % a random id of the whole vocabulary.

    input_ids: (B, L).  noise: (B, 3L) uniform in [0, 1), three for each word, so that those of a
    word do not depend on L.  [CLS], [SEP], [PAD] never are.
    Returns masked ids (B, L) and selected (B, L) bool.
    """
    select, kind, word = noise.unflatten(1, (-1, 3)).unbind(dim=2)
    selected = select < probability
    for special in ("[PAD]", "[CLS]", "[SEP]"):
        selected = selected & (input_ids != special_ids[special])
    masked = torch.where(selected & (kind < 0.8), special_ids["[MASK]"], input_ids)
    random_ids = (word * vocab_size).long()
    masked = torch.where(selected & (kind >= 0.8) & (kind < 0.9), random_ids, masked)
    return masked, selected


class MLM(Objective):
    """The mean is over the selected words of all ranks, so that it does not depend on the split
    over ranks; over accumulation steps it is a mean of means.

    # differs from ALBEF, where each rank divides by its own count.
    """

    Config = MLMConfig
    gives: ClassVar = frozenset({"masked_words"})

    @classmethod
    def needs(cls, config: MLMConfig) -> frozenset[str]:
        return frozenset({"fusion", "words", *(["teacher"] if config.alpha > 0 else [])})

    def pairs(self, context: StepContext) -> Pairs:
        """The captions with words masked. Leaves them as the text 'masked'."""
        input_ids, attention_mask = context.texts["clean"]
        noise = context.noise("mlm", 3 * input_ids.shape[1])
        masked, selected = mask_words(
            input_ids,
            noise,
            self.config.probability,
            vocab_size=self.setup.vocab_size,
            special_ids=self.setup.special_ids,
        )
        context.texts["masked"] = (masked, attention_mask)
        context.given["masked_words"] = selected
        text = context.run(Pass("text", text="masked"))
        return Pairs(Pass("image", guide=self.config.guide), (text,), words=True)

    def forward(self, context: StepContext) -> Loss:
        states = context.fused(self).text.flatten(0, 1)  # (B * L, D)
        selected = context.given["masked_words"].flatten()
        at = first_of(selected, room_for(self.config.probability, len(selected)))
        selected, labels = selected[at], context.texts["clean"][0].flatten()[at]
        rows = [states[at], labels]
        if self.config.alpha > 0:
            spec = Pass("fusion", "teacher", text="masked", guide=self.config.guide)
            with torch.no_grad():
                rows.append(context.run(spec).text.flatten(0, 1)[at])
        alpha = ramp(self.config.alpha, self.config.alpha_ramp, context.progress)

        def judge(states: Tensor, labels: Tensor, taught: Tensor | None = None) -> Any:
            logits = context.model().word_logits(states).float()
            hits = (logits.argmax(dim=1) == labels).float()
            if taught is None:
                return F.cross_entropy(logits, labels, reduction="none"), hits
            with torch.no_grad():
                soft = context.model("teacher").word_logits(taught).float()
            return soft_cross_entropy(logits, labels, soft, alpha), hits

        losses, hits = in_pieces(judge, self.setup.vocab_size, *rows)
        # This rank's part of all words, so that the mean over ranks is the mean over words.
        count = dist.sum_over_ranks(selected.sum()).clamp(min=1) / dist.world_size()
        count = count * dist.sample_weight()
        value, accuracy = (torch.where(selected, x, 0.0).sum() / count for x in (losses, hits))
        return Loss(values={"mlm": value}, logs={"mlm_accuracy": accuracy}, carry={})
