"""What ALBEF and BLIP share: a ViT, a BERT whose class token guides the pruning, a joint space.

B batch, L text tokens, M image tokens, D width, E joint space.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.models.features import ImageFeatures, TextFeatures
from elip_ds.models.joint import ModelConfig, Temperature, unit
from elip_ds.towers import ViT, ViTConfig
from elip_ds.towers.pruning import KeepIndex, check_pruning


@dataclass(frozen=True)
class TwoTowersConfig(ModelConfig):
    vision: ViTConfig = field(default_factory=ViTConfig)
    text: Any = None
    embed_dim: int = 256
    "Width of the joint space."
    temperature: float = 0.07
    "Start of the learned temperature, held in 0.001..0.5."

    def check(self, pruning: PruningConfig) -> None:
        """Raises UserError unless the parts fit each other and the pruning schedule fits them."""
        check_pruning(pruning, self.vision.depth, self.vision.num_patches)
        if pruning.stages and self.text.width != self.vision.width:
            raise UserError(
                f"model.text.width={self.text.width} must equal model.vision.width="
                f"{self.vision.width}: {self.name.upper()}'s text class token guides the pruning "
                "unprojected"
            )


class TwoTowers(nn.Module):
    """Text: the text tower's class, which encode()s ids and a mask."""

    Text: ClassVar[Any]
    prunes_in_match: ClassVar = False  # at test the released code encodes images without text

    def __init__(self, config: Any, pruning: PruningConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision, pruning)
        self.text = self.Text(config.text, image_width=config.vision.width)
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.temperature = Temperature(config.temperature)

    @property
    def pooled_width(self) -> int:
        """Of Fused.pooled; 0 where the model fuses nothing."""
        return self.config.text.width

    @property
    def embed_dim(self) -> int:
        """Of the joint space; 0 where there is none."""
        return self.config.embed_dim

    def only_joint_space(self) -> None:
        """From now on image_embeds are of the class token alone, (B, 1, W): nothing reads more."""
        self.visual.class_only = True

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """input_ids, attention_mask: (B, L)."""
        states = self.text.encode(input_ids, attention_mask)
        feat = unit(self.text_proj(states[:, 0]))
        return TextFeatures(input_ids, attention_mask, states, states[:, 0], feat)

    def encode_image(
        self,
        images: Tensor,
        guide: TextFeatures | None = None,
        *,
        keep_ratios: Sequence[float] | None = None,
        replay: KeepIndex | None = None,
    ) -> ImageFeatures:
        """images: (B, 3, H, W), normalised.  guide: each image's own caption; None: no pruning.
        keep_ratios, replay: see towers.ViT.
        """
        text_class = None if guide is None else guide.text_class
        tokens, keep = self.visual(images, text_class, keep_ratios, replay)
        return ImageFeatures(tokens, keep, unit(self.vision_proj(tokens[:, 0])))
