"""Vision tower: a ViT in timm's layout that prunes tokens where its schedule says so.

Images in, all remaining tokens after the final norm out. Source: Dosovitskiy et al. (ViT), Touvron
et al. (DeiT), as used by ALBEF and BLIP; pruning: ELIP.

B batch, N patches, L tokens that remain, D width.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.towers import pruning as elip
from elip_ds.towers.layers import ViTBlock, init_linear_and_norm, init_std, recomputed


@dataclass(frozen=True)
class ViTConfig:
    image_size: int = 256
    "Side of the square input, pixels."
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    recompute: bool = False
    "Activation checkpointing: store only each block's input and run the block again in backward."

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            near = self.image_size // self.patch_size * self.patch_size
            raise UserError(
                f"model.vision.image_size={self.image_size} is not a multiple of "
                f"patch_size={self.patch_size}; nearest: {near}, {near + self.patch_size}"
            )
        if self.width % self.heads:
            raise UserError(
                f"model.vision.width={self.width} does not divide into heads={self.heads}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class ViT(nn.Module):
    """With no stages, or no text, it equals a plain ViT bit for bit."""

    def __init__(self, config: ViTConfig, pruning: PruningConfig) -> None:
        super().__init__()
        elip.check_stages(pruning.stages, config.depth, config.num_patches)
        self.config, self.pruning = config, pruning
        width, eps = config.width, 1e-6
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.cls_token = _Table(1, width)
        self.pos_embed = _Table(1 + config.num_patches, width)
        self.blocks = nn.ModuleList(
            ViTBlock(width, config.heads, int(width * config.mlp_ratio), eps)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        init_linear_and_norm(self, std=init_std(width), truncated=True)

    def forward(
        self, images: Tensor, text_class: Tensor | None = None
    ) -> tuple[Tensor, elip.KeepIndex]:
        """images: (B, 3, S, S), normalised.  text_class: (B, D) guides the pruning; None: no
        pruning.

        Returns tokens (B, L, D) after the final norm, class token first, and what pruning did.
        """
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.cls_token().expand(len(patches), -1, -1), patches], dim=1)
        x = x + self.pos_embed()
        index = elip.full_index(len(patches), patches.shape[1], x.device)
        stages = {s.layer: (i, s) for i, s in enumerate(self.pruning.stages)}
        for layer, block in enumerate(self.blocks):
            if text_class is not None and layer in stages:
                x, index = self._prune(x, text_class, index, *stages[layer])
            # What pruning keeps is decided outside the recomputed part: recomputing a tie could
            # otherwise choose another token.
            recompute = self.config.recompute and self.training and torch.is_grad_enabled()
            x = recomputed(block, x) if recompute else block(x)
        return self.norm(x), index

    def _prune(
        self, x: Tensor, text_class: Tensor, index: elip.KeepIndex, number: int, stage: elip.Stage
    ) -> tuple[Tensor, elip.KeepIndex]:
        candidates = x.shape[1] - 1
        num_keep = min(elip.keep_count(stage.keep_ratio, self.config.num_patches), candidates)
        if num_keep == candidates and self.pruning.empty_stage == "skip":
            return x, index
        blocks = cast(list[ViTBlock], self.blocks[stage.layer : stage.layer + stage.lookahead])
        scores = elip.lookahead_scores(x, text_class, blocks, self.pruning.text_weight)
        pruned = elip.prune_tokens(x, scores, num_keep, self.pruning.eps)
        return pruned.tokens, elip.follow(index, pruned, number)


class _Table(nn.Module):
    """A learned (1, rows, D) table that is a module, so that ZeRO-3 gathers it when it is
    called."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, rows, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self) -> Tensor:
        return self.weight
