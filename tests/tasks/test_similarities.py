"""What tells collapse: cosines of pairs and of what is no pair."""

from types import SimpleNamespace

import pytest
import torch

from elip_ds.tasks.pretrain import _similarities


def told(image: torch.Tensor, text: torch.Tensor, temperature: float = 0.1) -> dict[str, float]:
    context = SimpleNamespace(given={"sim_i2t": image @ text.T / temperature})
    logs = _similarities(context, {"temperature": torch.tensor(temperature)})
    return {name.removeprefix("similarity_"): float(value) for name, value in logs.items()}


def test_learned_features_stand_apart():
    eye = torch.eye(4)
    assert told(eye, eye) == pytest.approx(
        {"positive": 1, "negative": 0, "hardest_negative": 0}, abs=1e-6
    )


def test_collapsed_features_are_all_one():
    same = torch.ones(4, 3) / 3**0.5
    found = told(same, same)
    assert found == pytest.approx(dict.fromkeys(found, 1), abs=1e-6)


def test_they_are_means_over_all_pairs():
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    cosines = image @ text.T
    wrong = [[float(cosines[i, j]) for j in range(5) if j != i] for i in range(5)]
    assert told(image, text) == pytest.approx(
        {
            "positive": float(cosines.diagonal().mean()),
            "negative": sum(map(sum, wrong)) / 20,
            "hardest_negative": sum(map(max, wrong)) / 5,
        },
        abs=1e-6,
    )


def test_the_scale_of_clip_is_taken_out():
    eye = torch.eye(3)
    context = SimpleNamespace(given={"sim_i2t": 20 * eye})
    logs = _similarities(context, {"logit_scale": torch.tensor(20.0)})
    assert float(logs["similarity_positive"]) == pytest.approx(1)


def test_without_a_joint_space_there_is_nothing_to_tell():
    assert _similarities(SimpleNamespace(given={}), {}) == {}
