"""Retrieval recall, from features or from scores of pairs."""

import torch
from torch import Tensor


def retrieval_recall(
    image_feat: Tensor, text_feat: Tensor, at: tuple[int, ...] = (1, 5, 10), rows: int = 1024
) -> dict[str, float]:
    """Share of queries whose partner is among the k most similar of all candidates.

    image_feat, text_feat: (N, E), row i of one belongs to row i of the other.  rows: queries scored
    at once.  Returns, in 0..1, tr_at_k (image finds text), ir_at_k (text finds image) and their
    mean, recall_at_k. A candidate as similar as the partner counts as before it, so equal features
    score 0, and so do features that are not numbers.
    """
    ranks = {}
    for name, queries, candidates in (("tr", image_feat, text_feat), ("ir", text_feat, image_feat)):
        parts = [
            _ranks(queries[i : i + rows] @ candidates.T, i) for i in range(0, len(queries), rows)
        ]
        ranks[name] = torch.cat(parts)
    return _recall(ranks, at)


def matching_recall(scores: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """The same from scores (N, N) of every image (row) with every text (column)."""
    return _recall({"tr": _ranks(scores), "ir": _ranks(scores.T)}, at)


def _ranks(scores: Tensor, start: int = 0) -> Tensor:
    """How many candidates come before the partner: (R, N), partners from column start on -> (R,)"""
    own = scores.diagonal(offset=start).unsqueeze(1)
    return (~(scores < own)).sum(dim=1) - 1


def _recall(ranks: dict[str, Tensor], at: tuple[int, ...]) -> dict[str, float]:
    recall = {
        f"{way}_at_{k}": (rank < k).float().mean().item() for way, rank in ranks.items() for k in at
    }
    return recall | {
        f"recall_at_{k}": (recall[f"tr_at_{k}"] + recall[f"ir_at_{k}"]) / 2 for k in at
    }
