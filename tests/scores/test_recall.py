"""Retrieval recall against the plain slow version."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elip_ds.scores import matching_recall, retrieval_recall


def slow_recall(queries: Tensor, candidates: Tensor, k: int) -> float:
    hits = 0
    for i, query in enumerate(queries):
        own = float(query @ candidates[i])
        others = [float(query @ c) for j, c in enumerate(candidates) if j != i]
        hits += sum(other >= own for other in others) < k
    return hits / len(queries)


def whole_numbers(count: int, width: int, seed: int) -> Tensor:
    """Features with many ties, whose products are exact in any order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (count, width), generator=generator).float()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 14), st.integers(0, 10**6))
def test_it_equals_the_slow_version(count: int, width: int, rows: int, seed: int) -> None:
    image, text = whole_numbers(count, width, seed), whole_numbers(count, width, seed + 1)
    scores = retrieval_recall(image, text, at=(1, 3), rows=rows)
    for k in (1, 3):
        assert scores[f"tr_at_{k}"] == pytest.approx(slow_recall(image, text, k))
        assert scores[f"ir_at_{k}"] == pytest.approx(slow_recall(text, image, k))
        mean = (scores[f"tr_at_{k}"] + scores[f"ir_at_{k}"]) / 2
        assert scores[f"recall_at_{k}"] == pytest.approx(mean)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_scores_of_pairs_give_what_their_features_would(count: int, width: int, seed: int) -> None:
    image, text = whole_numbers(count, width, seed), whole_numbers(count, width, seed + 1)
    assert matching_recall(image @ text.T) == retrieval_recall(image, text)


def test_matching_features_score_1() -> None:
    scores = retrieval_recall(torch.eye(20), torch.eye(20))
    assert set(scores.values()) == {1.0}
    assert sorted(scores) == sorted(
        f"{n}_at_{k}" for n in ("tr", "ir", "recall") for k in (1, 5, 10)
    )


def test_a_tie_counts_against() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    scores = retrieval_recall(image, image, at=(1, 2))
    assert scores["tr_at_1"] == pytest.approx(1 / 3)
    assert scores["tr_at_2"] == 1.0


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_features_that_tell_nothing_score_0(value: float) -> None:
    same = torch.full((50, 8), value)
    assert set(retrieval_recall(same, same).values()) == {0.0}
