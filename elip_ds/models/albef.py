"""ALBEF: a ViT, a BERT split into a text half and a fusion half, and a joint space.

Source: Li et al., arXiv:2107.07651, with ELIP's pruning of the vision tokens. The text is encoded
first, because its class token guides the pruning of the image.

B batch, L text tokens, M image tokens, D width, E joint space, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.models.features import ImageFeatures, TextFeatures
from elip_ds.towers import BERT, BERTConfig, ViT, ViTConfig, check_stages


@dataclass(frozen=True)
class ALBEFConfig:
    name: str = "albef"
    vision: ViTConfig = field(default_factory=ViTConfig)
    text: BERTConfig = field(default_factory=BERTConfig)
    embed_dim: int = 256
    "Width of the joint space."
    temperature: float = 0.07
    "Start of the learned temperature, held in 0.001..0.5."

    def check(self, pruning: PruningConfig) -> None:
        """Raises UserError unless the parts fit each other and the pruning schedule fits them."""
        check_stages(pruning.stages, self.vision.depth, self.vision.num_patches)
        if pruning.stages and self.text.width != self.vision.width:
            raise UserError(
                f"model.text.width={self.text.width} must equal model.vision.width="
                f"{self.vision.width}: ALBEF's text class token guides the pruning unprojected"
            )


class ALBEF(nn.Module):
    Config = ALBEFConfig

    def __init__(self, config: ALBEFConfig, pruning: PruningConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision, pruning)
        self.text = BERT(config.text, image_width=config.vision.width)
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.temperature = Temperature(config.temperature)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """input_ids, attention_mask: (B, L)."""
        states = self.text.encode(input_ids, attention_mask)
        return TextFeatures(states, attention_mask, _unit(self.text_proj(states[:, 0])))

    def encode_image(self, images: Tensor, guide: TextFeatures | None = None) -> ImageFeatures:
        """images: (B, 3, S, S), normalised.  guide: each image's own caption; None: no pruning."""
        text_class = None if guide is None else guide.text_embeds[:, 0]
        tokens, keep = self.visual(images, text_class)
        return ImageFeatures(tokens, _unit(self.vision_proj(tokens[:, 0])), keep)

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """(B, L, D), (B, L), (B, M, D) -> (B, L, D): text states that have seen the image."""
        return self.text.fuse(text_embeds, attention_mask, image_embeds)

    def decode(self, hidden: Tensor) -> Tensor:
        """(..., D) -> word logits (..., V)."""
        return self.text.decode(hidden)


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


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
