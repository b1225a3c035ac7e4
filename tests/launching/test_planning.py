"""What a plan says besides memory, and what it is compared with."""

import pytest
from conftest import tiny_words

from elip_ds.config import load_config
from elip_ds.errors import UserError
from elip_ds.launching.planning import _durations, plan_all
from elip_ds.launching.telling import show_plans

GIVEN = ["batching.device_memory=cpu:64MiB", "model.vision.image_size=64"]


@pytest.fixture(scope="module")
def z0(tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "z0.json"
    path.write_text('{"zero_optimization": {"stage": 0}}')
    return str(path)


def test_warm_up_and_epoch_are_told_in_samples_and_steps():
    words = ["data.builtin.train=60", "data.train=[{shards: builtin, weight: 1.5}]"]
    config = load_config(tiny_words(*words, "schedule.warmup=0.5 epochs"))
    assert _durations(config, 8) == {
        **{"warmup_samples": 45, "warmup_steps": 6},
        **{"epoch_samples": 90, "epoch_steps": 12},
    }


def test_what_the_configuration_does_not_say_is_unknown_without_data():
    shards = "data.train=[shards/train-*.tar]"
    known = _durations(load_config(tiny_words(shards, "schedule.warmup=80 samples")), 8)
    assert (known["warmup_samples"], known["warmup_steps"]) == (80, 10)
    assert known["epoch_samples"] is None and known["epoch_steps"] is None
    unknown = _durations(load_config(tiny_words(shards, "schedule.warmup=1 epoch")), 8)
    assert set(unknown.values()) == {None}


@pytest.mark.slow
def test_eager_attention_is_compared_like_any_setting(z0):
    words = [*tiny_words(*GIVEN), "batching.global_batch_size=auto"]
    eager = "attention=eager"
    compared = [[eager], [eager, "pruning.stages=[]"], ["pruning.stages=[]"]]
    fused, slow, slow_whole, whole = plan_all(words, z0, 2, compared)
    assert [p["name"] for p in (fused, slow)] == ["plan", eager]
    # Scores of all pairs of tokens are kept, so that fewer tokens spare more.
    assert slow["bytes_per_sample"] > fused["bytes_per_sample"]
    gains = [a["largest"] / b["largest"] for a, b in ((fused, whole), (slow, slow_whole))]
    assert 1 < gains[0] < gains[1]
    told = show_plans([fused, slow])
    lines = ("logits and heads", "rank's loader", "optimized by", "64 samples, 1 steps", "warm-up")
    for line in lines:
        assert line in told, told
    (note,) = fused["notes"]  # of both alike, and so said once
    assert "720 MiB besides" in note and " ".join(told.split()).count(note) == 1


@pytest.mark.slow
def test_a_batch_that_is_fixed_is_traced_at_a_ranks_share_first(z0, monkeypatch):
    seen = []
    from elip_ds.launching.tracing import StepTracer

    predict = StepTracer.predict

    def watched(self, size):
        seen.append(size)
        return predict(self, size)

    monkeypatch.setattr(StepTracer, "predict", watched)
    (plan,) = plan_all([*tiny_words(*GIVEN), "batching.global_batch_size=48"], z0, 2, [])
    assert plan["shown_at"] == plan["micro_batch_size"] == 24
    assert seen[0] == 24 and len(seen) == len(set(seen)) <= 3


def test_a_plan_without_a_memory_says_how_to_name_one(z0):
    with pytest.raises(UserError, match="--device-memory, as in 24GiB"):
        plan_all(tiny_words(), z0, 1, [])
