"""The ViT with ELIP's pruning, one sample at a time: specification section 1.2, step by step.

B batch, N patches, L tokens of the sequence (class token included), D width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds.config import PruningConfig
from elip_ds.launching.parts import part
from naive.layers import Weights, linear, norm, pre_norm_block


class Tokens(NamedTuple):
    """tokens: (B, L, D) after the final norm.  origin: (B, L) patch 0..N-1 of each; -1 the class
    token; -(2 + s) the one merged at stage s.  lengths: tokens after each stage that ran.
    """

    tokens: Tensor
    origin: Tensor
    lengths: tuple[int, ...]


def vit(
    w: Weights,
    config: Any,
    pruning: PruningConfig,
    images: Tensor,
    text_class: Tensor | None,
    *,
    keep_base: int | None = None,
    match_norm: bool = False,
) -> Tokens:
    """images: (B, 3, H, W).  text_class: (B, D) guides the pruning; None: no pruning.

    keep_base: patches that ratios refer to; None: the image's.  match_norm: the text's vector is
    brought to the length of the class token.
    """
    clip = config.layout == "clip"
    eps = 1e-5 if clip else 1e-6
    patches = F.conv2d(
        images, w["patch_embed.weight"], w.get("patch_embed.bias"), stride=config.patch_size
    )
    patches = patches.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token.weight"].expand(len(patches), -1, -1), patches], dim=1)
    x = x + w["pos_embed.weight"]
    if clip:
        x = norm(w, "norm_pre", x, eps)

    def block(layer: int, z: Tensor) -> tuple[Tensor, Tensor]:
        return pre_norm_block(w.under(f"blocks.{layer}"), z, config.heads, eps, config.activation)

    stages = {stage.layer: (number, stage) for number, stage in enumerate(pruning.stages)}
    num_patches = patches.shape[1]
    origin = torch.arange(-1, num_patches, device=x.device).repeat(len(x), 1)
    lengths: tuple[int, ...] = ()
    for layer in range(config.depth):
        if text_class is not None and layer in stages:
            number, stage = stages[layer]
            candidates = x.shape[1] - 1
            num_keep = min(int((keep_base or num_patches) * stage.keep_ratio), candidates)
            if num_keep < candidates or pruning.empty_stage == "zero_token":
                with torch.no_grad(), part("look-ahead"):
                    z = mix(x, text_class, pruning.text_weight, match_norm)
                    for ahead in range(layer, layer + stage.lookahead):
                        z, probabilities = block(ahead, z)
                    scores = probabilities.float().mean(dim=1)[:, 0, 1:]
                x, origin = prune(x, origin, scores, num_keep, pruning.eps, -(2 + number))
                lengths = (*lengths, x.shape[1])
        x, _ = block(layer, x)
    return Tokens(norm(w, "norm", x, eps), origin, lengths)


def mix(x: Tensor, text_class: Tensor, text_weight: float, match_norm: bool) -> Tensor:
    """A copy of the tokens whose class token is mixed with the text's."""
    if match_norm:
        length = x[:, 0].float().norm(dim=-1, keepdim=True)
        text_class = text_class.float() / text_class.float().norm(dim=-1, keepdim=True) * length
    z = x.clone()
    z[:, 0] = text_weight * text_class.to(x.dtype) + (1 - text_weight) * x[:, 0]
    return z


def prune(
    x: Tensor, origin: Tensor, scores: Tensor, num_keep: int, eps: float, merged_origin: int
) -> tuple[Tensor, Tensor]:
    """Keep the best num_keep tokens of each sample in order, and append the mean of the others.

    x: (B, L, D).  origin: (B, L).  scores: (B, L - 1).  Returns both, 1 + num_keep + 1 long.
    """
    rows, origins = [], []
    for sample, score, names in zip(x, scores, origin, strict=True):
        order = score.argsort(descending=True)
        kept, losers = order[:num_keep].sort().values, order[num_keep:].sort().values
        weights = score[losers] / (score[losers].sum() + eps)
        merged = (weights.to(x.dtype).unsqueeze(1) * sample[1 + losers]).sum(dim=0, keepdim=True)
        rows.append(torch.cat([sample[:1], sample[1 + kept], merged]))
        origins.append(torch.cat([names[:1], names[1 + kept], names.new_tensor([merged_origin])]))
    return torch.stack(rows), torch.stack(origins)


def project(w: Weights, name: str, x: Tensor) -> Tensor:
    """To the joint space: length 1, fp32."""
    with part("heads"):
        return F.normalize(linear(w, name, x).float(), dim=-1)
