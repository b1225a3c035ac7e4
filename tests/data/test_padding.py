"""Captions padded to the longest of their micro-batch: shorter tensors, the same numbers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import random_batch, tiny_task
from hypothesis import given
from hypothesis import strategies as st
from made_shards import data_config, make_loaders, make_run, record, take

from elip_ds.config.schema import DataConfig
from elip_ds.data.batch import PAD_MULTIPLE, Batch, shortest_length
from elip_ds.data.shards import write_shards
from elip_ds.errors import UserError
from elip_ds.objectives import Pass, Progress, StepContext

MODELS = ("albef", "blip", "meter", "clip")
PROGRESS = Progress(step=7, samples_seen=32, samples_per_epoch=64)


def short_captions(longest: int = 7) -> Batch:
    """Of 2 to so many tokens, 12 with the padding."""
    batch = random_batch(8)
    seen = torch.arange(12) < (batch.attention_mask.sum(dim=1, keepdim=True) % (longest - 1) + 2)
    mask = batch.attention_mask * seen
    return dataclasses.replace(batch, input_ids=batch.input_ids * mask, attention_mask=mask)


@given(
    st.integers(2, 40).flatmap(
        lambda n: st.lists(st.integers(1, n), min_size=1).map(lambda x: (n, x))
    )
)
def test_texts_are_cut_behind_the_longest_rounded_up(case: tuple[int, list[int]]) -> None:
    length, texts = case
    mask = (torch.arange(length) < torch.tensor(texts).unsqueeze(1)).long()
    cut = shortest_length(mask)
    assert not mask[:, cut:].any()
    assert cut == length or cut % PAD_MULTIPLE == 0
    assert cut == length or cut < max(texts) + PAD_MULTIPLE


def test_a_text_that_spells_the_padding_keeps_its_end() -> None:
    mask = torch.zeros(2, 30, dtype=torch.int64)
    mask[0, [0, 1, 17]] = 1
    mask[1, 0] = 1
    assert shortest_length(mask) == 24


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_are_those_of_the_fixed_length(model: str) -> None:
    fixed = short_captions()
    longest = fixed.shortened(shortest_length(fixed.attention_mask))
    assert longest.input_ids.shape == (8, 8)
    results = []
    for batch in (fixed, longest):
        task = tiny_task(model=model)
        loss = task(batch, PROGRESS)
        loss.total.backward()
        grads = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
        results.append((loss, grads))
    (loss, grads), (short, short_grads) = results
    assert loss.values.keys() == short.values.keys() and grads.keys() == short_grads.keys()
    for name, value in [*loss.values.items(), *loss.logs.items()]:
        other = (short.values | short.logs)[name]
        torch.testing.assert_close(other, value, atol=1e-5, rtol=1e-5, msg=name)
    largest = max(grad.abs().max() for grad in grads.values())
    for name, grad in grads.items():
        if name.endswith(("position.weight", "text.position.weight")):
            assert not grad.flatten(0, -2)[8:].any()  # of places that hold padding only
        assert (short_grads[name] - grad).abs().max() <= 1e-5 * max(1.0, float(largest)), name


def test_the_words_that_are_masked_do_not_depend_on_the_padding() -> None:
    task = tiny_task("objectives.mlm.probability=0.5")
    fixed = short_captions()
    seen = []
    for batch in (fixed, fixed.shortened(8)):
        context = StepContext(
            batch, {"student": task.model, "teacher": task.teacher.model}, PROGRESS
        )
        task.objectives["mlm"].pairs(context)
        seen.append((context.texts["masked"][0], context.given["masked_words"]))
    (ids, selected), (short_ids, short_selected) = seen
    assert short_selected.any() and not selected[:, 8:].any()
    assert torch.equal(short_selected, selected[:, :8])
    assert torch.equal(short_ids, ids[:, :8])


def test_clip_still_reads_a_text_at_its_end_mark() -> None:
    task = tiny_task(model="clip")
    fixed = short_captions()
    feats = [
        StepContext(batch, {"student": task.model}, PROGRESS).run(Pass("text")).text_feat
        for batch in (fixed, fixed.shortened(8))
    ]
    torch.testing.assert_close(*feats, atol=1e-6, rtol=0)


# ---- from the shards


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_shards(map(record, range(12)), tmp_path, "train", per_shard=7)
    write_shards(map(record, range(100, 106)), tmp_path, "val", per_shard=4)
    return dataclasses.replace(
        data_config(tmp_path / "train-*.tar", tmp_path / "val-*.tar"), text_length=20
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_are_as_long_as_their_longest_and_held_out_ones_as_said(
    config: DataConfig, tmp_path: Path, workers: int
) -> None:
    run = make_run(tmp_path / "run")
    config = dataclasses.replace(config, workers=workers)
    fixed, _ = make_loaders(config, run, micro=3)
    loader, held_out = make_loaders(dataclasses.replace(config, pad="longest"), run, micro=3)
    lengths = set()
    for whole, batch in zip(take(fixed, 4), take(loader, 4), strict=True):
        lengths.add(batch.input_ids.shape[1])
        assert batch.input_ids.is_contiguous() and batch.keys == whole.keys
        cut = whole.shortened(batch.input_ids.shape[1])
        assert torch.equal(cut.input_ids, batch.input_ids)
        assert torch.equal(cut.attention_mask, batch.attention_mask)
        assert whole.attention_mask.sum() == batch.attention_mask.sum()
    assert lengths == {8}
    assert {batch.input_ids.shape[1] for batch in held_out} == {20}


def test_an_unknown_padding_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.pad='short': choose fixed or longest"):
        DataConfig(pad="short")
