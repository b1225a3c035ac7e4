"""Vision tower: any ViT with a class token, pruning tokens where its schedule says so.

Images in, all remaining tokens after the final norm out. Source: Dosovitskiy et al. (ViT), Touvron
et al. (DeiT), as used by ALBEF and BLIP; Radford et al. (CLIP), as used by METER; pruning: ELIP.

B batch, N patches, L tokens that remain, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from elip_ds.config import PruningConfig
from elip_ds.errors import UserError
from elip_ds.towers import pruning as elip
from elip_ds.towers.layers import (
    ACTIVATIONS,
    PreNormBlock,
    Table,
    check_heads,
    init_linear_and_norm,
    init_std,
)
from elip_ds.towers.recompute import check_recompute, keeping


@dataclass(frozen=True)
class ViTConfig:
    image_size: int = 256
    "Height of the input, pixels; also its width unless image_width says otherwise."
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    image_width: int | None = None
    "Width of the input, pixels; null: square."
    layout: str = "vit"
    "vit: as DeiT, ALBEF, BLIP.  clip: no patch bias, a norm before block 0, norms' eps 1e-5."
    activation: str = "gelu"
    "gelu, or quick_gelu as in OpenAI's CLIP weights and METER."
    recompute: str = "none"
    "What the backward pass computes again: none, cheap (norms, activations) or full (blocks)."

    def __post_init__(self) -> None:
        for name, side in (("image_size", self.pixels[0]), ("image_width", self.pixels[1])):
            if side % self.patch_size:
                near = side // self.patch_size * self.patch_size
                fit = ", ".join(str(n) for n in (near, near + self.patch_size) if n)
                raise UserError(
                    f"model.vision.{name}={side} is not a multiple of "
                    f"patch_size={self.patch_size}; nearest: {fit}"
                )
        for name, value, known in (
            ("layout", self.layout, ("vit", "clip")),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in known:
                raise UserError(f"model.vision.{name}={value!r}: choose {' or '.join(known)}")
        check_heads("model.vision", self.width, self.heads)
        check_recompute("model.vision.recompute", self.recompute)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.image_size, self.image_width or self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.pixels[0] // self.patch_size, self.pixels[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


class ViT(nn.Module):
    """With no stages, or no text, it equals a plain ViT bit for bit.

    pruning: its schedule ends here: unless told other ratios, the tower keeps what the last entry
    says.
    keep_base: patches that keep ratios refer to; None: this tower's own.
    match_norm: bring the text's class vector to the norm of the class token before the two mix.
    class_only, False at first: the last block runs for the class token alone. It is for a step that
    reads no other token of it.
    """

    def __init__(
        self,
        config: ViTConfig,
        pruning: PruningConfig,
        *,
        keep_base: int | None = None,
        match_norm: bool = False,
    ) -> None:
        super().__init__()
        elip.check_pruning(pruning, config.depth, keep_base or config.num_patches)
        self.config, self.pruning, self.match_norm = config, elip.settled(pruning), match_norm
        self.keep_base = keep_base or config.num_patches
        self.class_only = False
        clip = config.layout == "clip"
        width, eps = config.width, 1e-5 if clip else 1e-6
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=not clip)
        self.cls_token = Table(1, width)
        self.pos_embed = Table(1 + config.num_patches, width)
        self.norm_pre = nn.LayerNorm(width, eps=eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList(
            PreNormBlock(
                width,
                config.heads,
                int(width * config.mlp_ratio),
                eps=eps,
                activation=config.activation,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        init_linear_and_norm(self, std=init_std(width), truncated=True)

    def forward(
        self,
        images: Tensor,
        text_class: Tensor | None = None,
        keep_ratios: Sequence[float] | None = None,
        replay: elip.KeepIndex | None = None,
    ) -> tuple[Tensor, elip.KeepIndex]:
        """images: (B, 3, H, W), normalised.  text_class: (B, D) guides the pruning; None: no
        pruning, unless replay is given.
        keep_ratios: of the stages; None: those of the configuration.
        replay: what a tower of the same schedule did to these images; it is done again, and neither
        text nor look-ahead is needed.

        Returns tokens (B, L, D) after the final norm, class token first, or with class_only
        (B, 1, D), and what pruning did.
        """
        # Channels last, the convolution's result is (B, N, D) in memory, and nothing is transposed.
        images = images.contiguous(memory_format=torch.channels_last)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.cls_token().expand(len(patches), -1, -1), patches], dim=1)
        x = self.norm_pre(x + self.pos_embed())
        index = elip.full_index(len(patches), patches.shape[1], x.device)
        stages = {} if text_class is None and replay is None else self._stages(keep_ratios)
        with keeping(self.config.recompute, self.training) as run:
            for layer, block in enumerate(self.blocks):
                if layer in stages:
                    # Outside what is run again: a tie could otherwise choose another token then.
                    number, stage, ratio = stages[layer]
                    if replay is not None:
                        choice = replay.choices[number]
                        pruned = None if choice is None else elip.merge_tokens(x, choice)
                    else:
                        assert text_class is not None
                        pruned = self._prune(x, text_class, stage, ratio)
                    if pruned is None:
                        index = elip.pass_over(index)
                    else:
                        x, index = pruned.tokens, elip.follow(index, pruned, number)
                last = layer == len(self.blocks) - 1
                class_token = index.owner.new_zeros(len(x)) if self.class_only and last else None
                x = run(block, x, class_token)
        return self.norm(x), index

    def _stages(
        self, keep_ratios: Sequence[float] | None
    ) -> dict[int, tuple[int, elip.Stage, float]]:
        """Layer -> number of the stage there, the stage, its ratio."""
        stages = self.pruning.stages
        if keep_ratios is None:
            keep_ratios = [stage.keep_ratio for stage in stages]
        triples = zip(range(len(stages)), stages, keep_ratios, strict=True)
        return {stage.layer: (number, stage, ratio) for number, stage, ratio in triples}

    def _prune(
        self, x: Tensor, text_class: Tensor, stage: elip.Stage, keep_ratio: float
    ) -> elip.Pruned | None:
        """None: there is nothing to merge."""
        candidates = x.shape[1] - 1
        num_keep = elip.num_kept(keep_ratio, self.keep_base, candidates)
        if num_keep == candidates and self.pruning.empty_stage == "skip":
            return None
        blocks = cast(list[PreNormBlock], self.blocks[stage.layer : stage.layer + stage.lookahead])
        if self.match_norm:
            text_class = elip.match_norm(text_class, x[:, 0])
        scores = elip.lookahead_scores(x, text_class, blocks, self.pruning.text_weight)
        return elip.prune_tokens(x, scores, num_keep, self.pruning.eps)
