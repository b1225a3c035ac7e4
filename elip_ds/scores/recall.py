"""Retrieval recall from features."""

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
    recall: dict[str, float] = {}
    for name, queries, candidates in (("tr", image_feat, text_feat), ("ir", text_feat, image_feat)):
        ranks = torch.cat(
            [_ranks(queries, candidates, i, rows) for i in range(0, len(queries), rows)]
        )
        for k in at:
            recall[f"{name}_at_{k}"] = (ranks < k).float().mean().item()
    return recall | {
        f"recall_at_{k}": (recall[f"tr_at_{k}"] + recall[f"ir_at_{k}"]) / 2 for k in at
    }


def _ranks(queries: Tensor, candidates: Tensor, start: int, rows: int) -> Tensor:
    similarity = queries[start : start + rows] @ candidates.T
    own = similarity.diagonal(offset=start).unsqueeze(1)
    return (~(similarity < own)).sum(dim=1) - 1
