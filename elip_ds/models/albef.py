"""ALBEF: a ViT, a BERT split into a text half and a fusion half, and a joint space.

Source: Li et al., arXiv:2107.07651, with ELIP's pruning of the vision tokens. The text is encoded
first, because its class token guides the pruning of the image.

B batch, L text tokens, M image tokens, D width, E joint space, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from elip_ds.models.features import Fused, ImageFeatures, TextFeatures
from elip_ds.models.two_towers import TwoTowers, TwoTowersConfig
from elip_ds.towers import BERT, BERTConfig
from elip_ds.towers.bert import Pairing


@dataclass(frozen=True)
class ALBEFConfig(TwoTowersConfig):
    name: str = "albef"
    text: BERTConfig = field(default_factory=BERTConfig)


class ALBEF(TwoTowers):
    Config = ALBEFConfig
    Text = BERT
    gives: ClassVar = frozenset({"joint_space", "fusion", "words"})

    def fuse(
        self, text: TextFeatures, image: ImageFeatures, pairing: Pairing | None = None
    ) -> Fused:
        """Row i of the text reads row i of the image, unless a pairing says otherwise."""
        states, pooled = self.text.fuse(text.text_embeds, text.attention_mask, image.seen, pairing)
        return Fused(states, pooled if len(pooled) or states.ndim == 2 else states[:, 0])

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Masked words guessed: (..., D) -> (..., V)."""
        return self.text.decode(hidden)
