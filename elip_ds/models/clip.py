"""CLIP: a ViT and a causal text tower that meet in a joint space and nowhere else.

Source: Radford et al., arXiv:2103.00020, as open_clip builds and initialises it, with ELIP's
pruning of the vision tokens. The text is encoded first, because it guides the pruning; its vector
reaches the vision tower's width by the image projection taken backwards.

B batch, L text tokens, M image tokens, D width of a tower, E joint space.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.models.features import ImageFeatures, TextFeatures
from elip_ds.models.joint import ModelConfig, unit
from elip_ds.towers import CLIPText, CLIPTextConfig, ViT, ViTConfig
from elip_ds.towers.pruning import KeepIndex, check_pruning

RELEASED_BASE = 197
"What the released code takes ratios of, at any size: the tokens of /16 at 224, class token too."
GUIDES = ("rescaled", "released", "unprojected")


@dataclass(frozen=True)
class CLIPConfig(ModelConfig):
    name: str = "clip"
    vision: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=224, layout="clip"))
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    embed_dim: int = 512
    "Width of the joint space."
    logit_scale: float = math.log(1 / 0.07)
    "Start of the learned logarithm of the logits' scale, held in 0..ln 100."
    guide: str = "rescaled"
    """What the pruning sees of the text: its joint vector taken back to the tower's width and
    brought to the class token's length ('rescaled'), of length about 1 as 'released', or its state
    before the projection ('unprojected')."""

    def __post_init__(self) -> None:
        if self.guide not in GUIDES:
            raise UserError(f"model.guide={self.guide!r}: choose {', '.join(GUIDES)}")

    def check(self, pruning: PruningConfig) -> None:
        """Raises UserError unless the parts fit each other and the pruning schedule fits them."""
        base = keep_base(pruning) or self.vision.num_patches
        check_pruning(pruning, self.vision.depth, base)
        if self.guide == "unprojected" and self.text.width != self.vision.width:
            raise UserError(
                f"model.guide=unprojected needs model.text.width={self.text.width} equal to "
                f"model.vision.width={self.vision.width}; make them equal, or choose rescaled"
            )


def keep_base(pruning: PruningConfig) -> int | None:
    """Patches that keep ratios refer to; None: the tower's own."""
    return RELEASED_BASE if pruning.keep_base == "released" else None


class CLIP(nn.Module):
    """# differs from ELIP's CLIP: by default the text vector is brought to the length of the class
    token. Released it has length about 1 beside sqrt(D), and hardly turns what it is mixed into.
    """

    Config = CLIPConfig
    gives: ClassVar = frozenset({"joint_space"})
    prunes_in_match: ClassVar = False

    def __init__(self, config: CLIPConfig, pruning: PruningConfig) -> None:
        super().__init__()
        self.config = config
        rescaled = config.guide == "rescaled"
        self.visual = ViT(config.vision, pruning, keep_base=keep_base(pruning), match_norm=rescaled)
        self.visual_proj = Projection(config.vision.width, config.embed_dim)
        self.text = CLIPText(config.text)
        self.text_projection = Projection(config.text.width, config.embed_dim)
        self.logit_scale = LogitScale(config.logit_scale)
        init_vision(self.visual)

    @property
    def pooled_width(self) -> int:
        """Of Fused.pooled: there is none."""
        return 0

    @property
    def embed_dim(self) -> int:
        """Of the joint space."""
        return self.config.embed_dim

    def only_joint_space(self) -> None:
        """From now on image_embeds and text_embeds are of the one token that the joint space reads,
        (B, 1, W) and (B, 1, D): nothing reads more.
        """
        self.visual.class_only = self.text.ends_only = True

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """input_ids, attention_mask: (B, L).  text_class carries no gradient."""
        states, pooled = self.text(input_ids)
        feat = unit(self.text_projection(pooled))
        with torch.no_grad():
            guide = pooled.detach()
            if self.config.guide != "unprojected":
                guide = self.visual_proj(feat.detach().to(pooled.dtype), back=True)
        return TextFeatures(input_ids, attention_mask, states, guide, feat)

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
        return ImageFeatures(tokens, keep, unit(self.visual_proj(tokens[:, 0])))

    def temperature(self) -> Tensor:
        """What the logits are divided by: (1,), fp32."""
        return 1 / self.logit_scale()


class Projection(nn.Module):
    """A tower's width to the joint space and back, by one matrix (D, E)."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """(B, D) -> (B, E); with back (B, E) -> (B, D), by the transposed matrix."""
        return x @ (self.weight.T if back else self.weight)


class LogitScale(nn.Module):
    """The learned scale of the contrastive logits, its logarithm clamped to [0, ln 100].

    # differs from open_clip, which clamps the parameter in place after every step: under ZeRO the
    fp32 master would undo that. The clamped value is used here and the gradient passes straight
    through.
    Of shape (1,), because DeepSpeed cannot broadcast 0-d parameters.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), start))

    def forward(self) -> Tensor:
        """(1,), fp32, 1..100."""
        value = self.logit_scale.float()
        return (value + (value.clamp(0, math.log(100)) - value).detach()).exp()


def init_vision(visual: ViT) -> None:
    """open_clip's: tables normal(0, 1 / sqrt(D)), blocks as PyTorch starts an attention layer."""
    for table in (visual.cls_token, visual.pos_embed):
        nn.init.normal_(table.weight, std=visual.config.width**-0.5)
    for module in visual.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for name, parameter in visual.named_parameters():
        if name.endswith("attn.qkv.weight"):
            nn.init.xavier_uniform_(parameter)
        if name.endswith((".attn.qkv.bias", ".attn.proj.bias")):
            nn.init.zeros_(parameter)
