"""Where a trial is and what it counts. Whole trials of real ranks: launching/test_real_steps.py."""

import json
from itertools import islice

import pytest
import torch
from conftest import tiny_words

from elip_ds.config import Config, load_config
from elip_ds.data import Batch, Vocabulary
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.engine import trial
from elip_ds.engine.trial import Watch
from elip_ds.engine.trial_job import TrialJob, read_job


class Rising:
    """In place of HostMemory: every peak is higher than the last."""

    def __init__(self) -> None:
        self.peaks = 0

    def reset(self) -> None:
        pass

    def peak(self) -> int:
        self.peaks += 1
        return self.peaks


def beats(folder, laps: list[str]) -> tuple[list[str], dict[str, int]]:
    """Phases that the heartbeat says after each lap, and the peaks by phase."""
    watch = Watch(folder, 0, Rising())  # type: ignore[arg-type]
    watch.at("forward", micro_batch_size=4, step=0)
    said = []
    for lap in laps:
        watch.lap(lap)
        said.append(json.loads((folder / "heartbeat-0.json").read_text())["phase"])
    return said, watch.peaks


def test_the_heartbeat_says_what_comes_next_and_peaks_what_was(tmp_path):
    # As Engine.train_step laps: the next data are fetched behind the backward pass.
    said, peaks = beats(
        tmp_path, ["data", "forward", "backward", "data", "optimizer", "data", "forward"]
    )
    assert said == ["forward", "backward", "step", "step", "step", "forward", "backward"]
    assert peaks == {"forward": 7, "backward": 3, "step": 5}


def test_a_first_pass_over_the_micro_batches_counts_as_forward(tmp_path):
    said, peaks = beats(tmp_path, ["data", "forward", "data", "forward", "backward"])
    assert said[2] == "forward"
    assert peaks == {"forward": 4, "backward": 5}


def longest_captions(model: str, pad: str, size: int) -> tuple[Config, Vocabulary, Batch]:
    kind = {"clip": "clip"}.get(model, "albef")
    config = load_config(tiny_words(f"data.pad={pad}", f"data.tokenizer={kind}", model=model))
    vocabulary = made_up_vocabulary(config)
    return config, vocabulary, random_batch(config, vocabulary, size)


@pytest.mark.parametrize("model", ["albef", "clip"])
@pytest.mark.parametrize("pad", ["fixed", "longest"])
def test_the_shortest_captions_have_a_word_and_the_padding_of_the_configuration(model, pad):
    config, vocabulary, longest = longest_captions(model, pad, 3)
    job = TrialJob(config, {}, [3], accumulation=2, captions="alternate")
    batches = list(islice(trial._batches(job, longest, config, vocabulary), 5))
    assert [batch is longest for batch in batches] == [True, True, False, False, True]
    short = batches[2]
    assert short.input_ids.shape == (3, 8 if pad == "longest" else 12)
    assert short.attention_mask.sum(dim=1).tolist() == [3 if model == "clip" else 2] * 3
    assert longest.attention_mask.all()
    if model == "clip":
        assert short.input_ids[0, 2] == vocabulary.end_id


@pytest.mark.parametrize("model", ["albef", "clip"])
@pytest.mark.parametrize("pad", ["fixed", "longest"])
def test_random_captions_are_of_all_lengths_and_end_as_captions_do(model, pad):
    config, vocabulary, longest = longest_captions(model, pad, 5)
    job = TrialJob(config, {}, [5], captions="random")
    seen, widths = set(), set()
    for batch in islice(trial._batches(job, longest, config, vocabulary), 200):
        lengths = batch.attention_mask.sum(dim=1)
        padding = torch.arange(batch.input_ids.shape[1]) >= lengths[:, None]
        assert torch.equal(batch.attention_mask == 0, padding)
        assert (batch.input_ids[padding] == vocabulary.special_ids["[PAD]"]).all()
        if model == "clip":
            assert (batch.input_ids[torch.arange(5), lengths - 1] == vocabulary.end_id).all()
        seen |= set(lengths.tolist())
        widths.add(batch.input_ids.shape[1])
    assert seen == set(range(3 if model == "clip" else 2, 13))
    assert widths == ({8, 12} if pad == "longest" else {12})
    assert longest.attention_mask.all()


def test_a_job_is_read_as_it_was_written(tmp_path):
    config = load_config(tiny_words())
    job = TrialJob(config, {"zero_optimization": {"stage": 2}}, [1, 4], limit_bytes=7, save=True)
    job.write(tmp_path)
    assert read_job(tmp_path) == job


def test_the_worst_case_prunes_as_asked_and_starts_from_nothing():
    schedule = "pruning.schedule=[{after: 9 samples, keep_ratios: [0.3, 0.2]}]"
    config = load_config(tiny_words(schedule, "model.init_from=[a.pth]"))
    for ratios, expected in ((None, [0.5, 0.25]), ([0.9, 0.8], [0.9, 0.8])):
        worst = trial._worst_case(TrialJob(config, {}, [1], keep_ratios=ratios))
        assert [stage.keep_ratio for stage in worst.pruning.stages] == expected
        assert (worst.pruning.schedule, worst.model.init_from) == ([], [])
