"""ELIP: the one place where vision tokens are scored, kept and merged.

Pure functions on tensors and numbers. Source: ELIP, Guo et al., arXiv:2309.16738, and its released
code. Before a few chosen blocks, a throw-away copy of the tokens, its class token mixed with the
text's, looks ahead through the next blocks without gradient; what its class token attends to there
are the scores. The best-scored patches stay, in order; the others become one token, their mean with
the scores as weights, appended last.

B batch, N patches of the image, L tokens of the sequence (class token included), D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_ds.config import PruningConfig, Stage, duration_in_samples
from elip_ds.errors import UserError


class LookaheadBlock(Protocol):
    """What pruning asks of a transformer block."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def class_attention(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L), head mean of the class token's attention row, fp32."""


class Choice(NamedTuple):
    """What one stage kept and merged, of L - 1 tokens without the class token.

    kept: (B, K), ascending, index 0 the first token after the class token.
    weights: (B, L - 1), with which each token entered the merged one, 0 for kept tokens, fp32.
    """

    kept: Tensor
    weights: Tensor


class KeepIndex(NamedTuple):
    """What pruning did to one batch of images, whatever the number of stages.

    origin: (B, L) patch 0..N-1 of each token; -1 the class token; -(2 + s) the one merged at s.
    owner: (B, N) slot of the final sequence that carries each patch.
    share: (B, N) weight with which the patch entered its owner; 1 if it was kept.
    lengths: tokens after each stage, class and merged token included; none without a guide.
    choices: of each stage; None: it did nothing.
    A merged token is an ordinary token later: it may survive, or be merged again.
    (A named tuple, because ZeRO-3's hooks look for tensors in tuples, not in dataclasses.)
    """

    origin: Tensor
    owner: Tensor
    share: Tensor
    lengths: tuple[int, ...] = ()
    choices: tuple[Choice | None, ...] = ()

    def take(self, rows: Tensor) -> "KeepIndex":
        """Of the samples of these row numbers, in that order, any of them several times."""
        return KeepIndex(
            self.origin[rows],
            self.owner[rows],
            self.share[rows],
            self.lengths,
            tuple(c and Choice(c.kept[rows], c.weights[rows]) for c in self.choices),
        )


@dataclass(frozen=True)
class Pruned:
    """tokens: (B, 1 + K + 1, D), the merged token last.  kept, weights: see Choice."""

    tokens: Tensor
    kept: Tensor
    weights: Tensor


def keep_count(keep_ratio: float, num_patches: int) -> int:
    """Patches that survive a stage: a share of the tower's full patch count, truncated."""
    return int(num_patches * keep_ratio)


def num_kept(keep_ratio: float, base: int, candidates: int) -> int:
    """Of so many candidates; base: patches that the ratio refers to. A ratio of 1 keeps all."""
    return candidates if keep_ratio == 1 else min(keep_count(keep_ratio, base), candidates)


def keep_stretches(
    pruning: PruningConfig, samples_per_epoch: int
) -> list[tuple[int, tuple[float, ...]]]:
    """The stretches of a run, (samples seen at its start, keep ratios of the stages), from 0 on.

    Of changes that epochs this short round to one sample the last counts.
    """
    stretches = {0: tuple(stage.keep_ratio for stage in pruning.stages)}
    for change in pruning.schedule:
        start = duration_in_samples(change.after, samples_per_epoch)
        stretches[start] = tuple(change.keep_ratios)
    return list(stretches.items())


def keep_ratios_at(
    pruning: PruningConfig, samples_seen: int, samples_per_epoch: int
) -> tuple[float, ...]:
    """Of the stages, for the whole of a step before which so many samples were seen."""
    stretches = keep_stretches(pruning, samples_per_epoch)
    return [ratios for start, ratios in stretches if start <= samples_seen][-1]


def at_ratios(pruning: PruningConfig, keep_ratios: Sequence[float]) -> PruningConfig:
    """The same stages with these ratios and no schedule: one stretch of a run."""
    pairs = zip(pruning.stages, keep_ratios, strict=True)
    stages = [replace(stage, keep_ratio=ratio) for stage, ratio in pairs]
    return replace(pruning, stages=stages, schedule=[])


def settled(pruning: PruningConfig) -> PruningConfig:
    """As the schedule ends."""
    return at_ratios(pruning, pruning.schedule[-1].keep_ratios) if pruning.schedule else pruning


def sequence_lengths(
    pruning: PruningConfig, depth: int, num_patches: int, keep_base: int | None = None
) -> list[int]:
    """Tokens that each of the depth blocks sees, class and merged tokens included.

    By the stages' own ratios; for others see at_ratios.
    keep_base: patches that keep ratios refer to; None: num_patches.
    """
    at = {stage.layer: stage for stage in pruning.stages}
    lengths, length = [], 1 + num_patches
    for layer in range(depth):
        if layer in at:
            count = num_kept(at[layer].keep_ratio, keep_base or num_patches, length - 1)
            if count < length - 1 or pruning.empty_stage == "zero_token":
                length = 1 + count + 1
        lengths.append(length)
    return lengths


def check_stages(stages: Sequence[Stage], depth: int, num_patches: int) -> None:
    """Raises UserError, naming the stage, unless the schedule fits a tower of depth blocks."""
    for i, stage in enumerate(stages):
        key = f"pruning.stages[{i}]"
        before = stages[i - 1] if i else None
        if stage.layer < 0 or stage.lookahead < 1:
            raise UserError(
                f"{key}: layer={stage.layer}, lookahead={stage.lookahead}: "
                "a layer counts from 0, a look-ahead runs at least 1 block"
            )
        left = depth - stage.layer
        if stage.lookahead > left:
            fits = f"lookahead <= {left} or a lower layer" if left > 0 else f"layer < {depth}"
            raise UserError(
                f"{key}: layer {stage.layer} + lookahead {stage.lookahead} is beyond the tower's "
                f"{depth} blocks; use {fits}"
            )
        if before and stage.layer <= before.layer:
            raise UserError(
                f"{key}: layer {stage.layer} does not come after layer {before.layer} before it"
            )
        _check_ratio(key, stage.keep_ratio, before.keep_ratio if before else 1.0, num_patches)


def check_pruning(pruning: PruningConfig, depth: int, num_patches: int) -> None:
    """As check_stages, with the ratios of the schedule."""
    check_stages(pruning.stages, depth, num_patches)
    for i, change in enumerate(pruning.schedule):
        before = 1.0
        for j, ratio in enumerate(change.keep_ratios):
            _check_ratio(f"pruning.schedule[{i}].keep_ratios[{j}]", ratio, before, num_patches)
            before = ratio


def _check_ratio(key: str, ratio: float, before: float, num_patches: int) -> None:
    """before: the ratio of the stage before."""
    if not 0 < ratio <= 1:
        raise UserError(f"{key}: keep_ratio={ratio} must lie in (0, 1]")
    if ratio > before:
        raise UserError(
            f"{key}: keep_ratio {ratio} exceeds {before} before it; "
            "ratios refer to the full patch count and cannot grow"
        )
    if keep_count(ratio, num_patches) < 1:
        raise UserError(f"{key}: keep_ratio={ratio} of {num_patches} patches keeps none")


def full_index(batch_size: int, num_patches: int, device: torch.device) -> KeepIndex:
    """The KeepIndex of an unpruned pass: every patch carries itself."""
    origin = torch.arange(-1, num_patches, device=device)  # made there: a copy would wait
    return KeepIndex(
        origin=origin.expand(batch_size, -1),
        owner=(origin[1:] + 1).expand(batch_size, -1),
        share=torch.ones(batch_size, num_patches, device=device),
    )


@torch.no_grad()
def match_norm(text_class: Tensor, class_token: Tensor) -> Tensor:
    """(B, D), (B, D) -> (B, D): each text vector at the length of its image's class token.

    A unit text vector beside a class token of norm sqrt(D) would hardly turn it (CLIP).
    """
    length = class_token.float().norm(dim=-1, keepdim=True)
    return F.normalize(text_class.float(), dim=-1) * length


@torch.no_grad()
def lookahead_scores(
    x: Tensor, text_class: Tensor, blocks: Sequence[LookaheadBlock], text_weight: float
) -> Tensor:
    """Score every token but the class token by what a text-mixed class token will attend to.

    x: (B, L, D), unchanged.  text_class: (B, D).  blocks: those of the look-ahead, at least one.
    Returns (B, L - 1), fp32, >= 0; the class token's own share is dropped, the rest kept as it is.
    Source: ELIP. Differs: of the last block only the class token's attention row is computed.
    """
    mixed = torch.lerp(x[:, :1], text_class.to(x.dtype).unsqueeze(1), text_weight)
    z = torch.cat([mixed, x[:, 1:]], dim=1)
    for block in blocks[:-1]:
        z = block(z)
    return blocks[-1].class_attention(z)[:, 1:]


def prune_tokens(x: Tensor, scores: Tensor, num_keep: int, eps: float) -> Pruned:
    """Keep the highest-scored tokens, in order, and fold the rest into one, appended last.

    x: (B, L, D), class token first.  scores: (B, L - 1), >= 0, any scale.
    With num_keep = L - 1 nothing is left to merge and the appended token is zero, as in the
    released code; callers that do not want it skip the stage.
    Gradient reaches x through kept and merged tokens, and never the scores.
    Raises ValueError unless 1 <= num_keep <= L - 1.
    Source: ELIP. Differs: one gather for the whole batch instead of a loop.
    """
    if not 1 <= num_keep <= scores.shape[1]:
        raise ValueError(f"num_keep={num_keep} must lie in 1..{scores.shape[1]}")
    scores = scores.detach().float()
    kept = scores.topk(num_keep, dim=1, sorted=False).indices.sort(dim=1).values
    weights = scores.scatter(1, kept, 0.0)
    weights = weights / (weights.sum(dim=1, keepdim=True) + eps)
    return merge_tokens(x, Choice(kept, weights))


def merge_tokens(x: Tensor, choice: Choice) -> Pruned:
    """Keep and merge what was chosen, here or in another tower's pass over the same images.

    x: (B, L, D), class token first.
    """
    kept, weights = choice
    index = kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    survivors = x[:, 1:].gather(1, index)
    merged = torch.einsum("bl,bld->bd", weights.to(x.dtype), x[:, 1:])
    return Pruned(torch.cat([x[:, :1], survivors, merged.unsqueeze(1)], dim=1), kept, weights)


def follow(index: KeepIndex, pruned: Pruned, stage: int) -> KeepIndex:
    """The KeepIndex after one more stage: whose slot each patch is in now, and with what weight."""
    batch, num_keep = pruned.kept.shape
    length = index.origin.shape[1]
    slot = pruned.kept.new_full((batch, length), num_keep + 1)
    slot[:, 0] = 0
    slots = torch.arange(1, num_keep + 1, device=slot.device).expand(batch, -1)
    slot.scatter_(1, pruned.kept + 1, slots)
    weight = torch.cat([pruned.weights.new_ones(batch, 1), pruned.weights], dim=1)
    weight = weight.scatter(1, pruned.kept + 1, 1.0)
    survivors = index.origin[:, 1:].gather(1, pruned.kept)
    merged = survivors.new_full((batch, 1), -(2 + stage))
    return KeepIndex(
        origin=torch.cat([index.origin[:, :1], survivors, merged], dim=1),
        owner=slot.gather(1, index.owner),
        share=index.share * weight.gather(1, index.owner),
        lengths=(*index.lengths, num_keep + 2),
        choices=(*index.choices, Choice(pruned.kept, pruned.weights)),
    )


def pass_over(index: KeepIndex) -> KeepIndex:
    """The KeepIndex after a stage that did nothing."""
    length = index.origin.shape[1]
    return index._replace(lengths=(*index.lengths, length), choices=(*index.choices, None))


def unprune(x: Tensor, index: KeepIndex) -> Tensor:
    """(B, L, D) -> (B, N, D): every patch reads the token that carries it."""
    return x.gather(1, index.owner.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def prune_targets(targets: Tensor, index: KeepIndex) -> Tensor:
    """(B, N, C) -> (B, L - 1, C): per-patch targets mixed as the tokens were; no class token."""
    weighted = targets * index.share.unsqueeze(-1).to(targets.dtype)
    batch, length = index.origin.shape
    out = targets.new_zeros(batch, length, targets.shape[-1])
    out.scatter_add_(1, index.owner.unsqueeze(-1).expand_as(weighted), weighted)
    return out[:, 1:]
