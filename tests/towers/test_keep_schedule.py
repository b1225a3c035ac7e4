"""Keep ratios that change with the samples seen: which hold when, and who asks for what."""

import dataclasses

import pytest
import torch
from conftest import random_batch, tiny_task, tiny_words
from hypothesis import given
from hypothesis import strategies as st
from test_pruning import make_inputs, make_vit

from elip_ds.config import PruningConfig, Stage, load_config
from elip_ds.config.schema import KeepChange
from elip_ds.errors import UserError
from elip_ds.objectives import Progress
from elip_ds.towers import ViT, ViTConfig
from elip_ds.towers.pruning import (
    at_ratios,
    check_pruning,
    keep_ratios_at,
    keep_stretches,
    num_kept,
    sequence_lengths,
    settled,
)

STAGES = [Stage(1, 1, 1.0), Stage(2, 1, 1.0)]
SCHEDULE = (
    "pruning.stages=[{layer: 1, lookahead: 1, keep_ratio: 1.0}, "
    "{layer: 2, lookahead: 1, keep_ratio: 1.0}]",
    "pruning.schedule=[{after: 16 samples, keep_ratios: [1.0, 0.5]}, "
    "{after: 40 samples, keep_ratios: [0.5, 0.25]}]",
)


def scheduled(*changes):
    return PruningConfig(STAGES, schedule=[KeepChange(after, list(r)) for after, r in changes])


def ratios_by_walking(pruning, seen, samples_per_epoch):
    """Sample by sample from the start; durations read by their two words."""
    held = [stage.keep_ratio for stage in pruning.stages]
    for sample in range(seen + 1):
        for change in pruning.schedule:
            number, unit = change.after.split()
            start = float(number) * (samples_per_epoch if unit == "epochs" else 1)
            if sample == max(1, round(start)):
                held = change.keep_ratios
    return tuple(held)


@given(
    data=st.data(),
    unit=st.sampled_from(["samples", "epochs"]),
    samples_per_epoch=st.integers(1, 50),
    seen=st.integers(0, 150),
)
def test_ratios_are_those_of_the_last_change_that_was_reached(data, unit, samples_per_epoch, seen):
    step = 1 if unit == "samples" else 0.25
    starts = data.draw(st.lists(st.integers(1, 40), max_size=4, unique=True).map(sorted))
    ratio = st.floats(0.1, 1.0)
    pruning = scheduled(
        *((f"{n * step} {unit}", data.draw(st.tuples(ratio, ratio))) for n in starts)
    )
    expected = ratios_by_walking(pruning, seen, samples_per_epoch)
    assert keep_ratios_at(pruning, seen, samples_per_epoch) == expected

    stretches = keep_stretches(pruning, samples_per_epoch)
    begins = [start for start, _ in stretches]
    assert begins[0] == 0 and begins == sorted(set(begins))
    for (start, ratios), end in zip(stretches, [*begins[1:], begins[-1] + 7], strict=True):
        assert {keep_ratios_at(pruning, at, samples_per_epoch) for at in (start, end - 1)} == {
            ratios
        }


def test_without_a_schedule_a_run_is_one_stretch():
    assert keep_stretches(PruningConfig(STAGES), 10) == [(0, (1.0, 1.0))]
    assert keep_stretches(PruningConfig(), 10) == [(0, ())]


def test_a_stretch_is_a_configuration_of_its_own():
    pruning = scheduled(("8 samples", [0.9, 0.5]), ("2e1 samples", [0.5, 0.25]))
    stretches = keep_stretches(pruning, 10)
    assert [start for start, _ in stretches] == [0, 8, 20]
    plans = [sequence_lengths(at_ratios(pruning, r), 3, 16) for _, r in stretches]
    assert plans == [[17, 17, 17], [17, 16, 10], [17, 10, 6]]
    assert settled(pruning) == at_ratios(pruning, [0.5, 0.25])
    assert settled(pruning).schedule == []


@pytest.mark.parametrize("base", [16, 9])
def test_a_ratio_of_one_keeps_all_whatever_it_refers_to(base):
    assert num_kept(1.0, base, 16) == 16
    assert num_kept(0.5, base, 16) == base // 2


def test_where_ratios_refer_to_fewer_patches_a_ratio_of_one_does_nothing_either():
    config = ViTConfig(32, 8, width=32, depth=3, heads=2)
    vit = ViT(config, PruningConfig(STAGES), keep_base=9)
    images, text_class = make_inputs(vit)
    tokens, index = vit(images, text_class)
    assert torch.equal(tokens, vit(images)[0]) and index.choices == (None, None)
    assert vit(images, text_class, (1.0, 0.5))[1].lengths == (17, 1 + 4 + 1)


def test_a_tower_outside_of_training_prunes_as_the_schedule_ends():
    stages = [Stage(1, 2, 1.0), Stage(3, 1, 1.0)]
    ending = [Stage(1, 2, 0.8), Stage(3, 1, 0.4)]
    change = KeepChange("5 epochs", [0.8, 0.4])
    vit, other = make_vit(stages, schedule=[change]), make_vit(ending)
    inputs = make_inputs(vit)
    assert torch.equal(vit(*inputs)[0], other(*inputs)[0])


def test_a_model_without_a_joint_space_is_scored_as_the_schedule_ends():
    ends = (
        "pruning.stages=[{layer: 1, lookahead: 1, keep_ratio: 0.5}, "
        "{layer: 2, lookahead: 1, keep_ratio: 0.25}]"
    )
    task, ended = tiny_task(*SCHEDULE, model="meter"), tiny_task(ends, model="meter")
    batch = random_batch(4)
    texts = (batch.input_ids, batch.attention_mask)
    scores = [t.match(batch.images, t.model.encode_text(*texts)) for t in (task, ended)]
    assert torch.equal(*scores)


# ---- a task


def step(task, seen, **at):
    return task(random_batch(8), dataclasses.replace(Progress(seen // 8, seen, 64), **at))


@pytest.mark.parametrize("model", ["albef", "blip", "meter", "clip"])
def test_a_step_keeps_what_its_samples_seen_say_and_nothing_else_changes(model):
    task = tiny_task(*SCHEDULE, model=model)
    for seen, ratios, kept in (
        (8, (1.0, 1.0), (17, 17)),
        (16, (1.0, 0.5), (17, 10)),
        (40, (0.5, 0.25), (10, 6)),
        (15, (1.0, 1.0), (17, 17)),  # whatever came before: a resumed run knows no more
    ):
        stages = ", ".join(
            f"{{layer: {i}, lookahead: 1, keep_ratio: {r}}}" for i, r in enumerate(ratios, start=1)
        )
        constant = tiny_task(f"pruning.stages=[{stages}]", model=model)
        result, expected = step(task, seen), step(constant, seen)
        assert result.kept_tokens == expected.kept_tokens == kept
        assert torch.equal(result.total, expected.total)


def test_all_micro_batches_of_a_step_have_the_ratios_of_its_start():
    task = tiny_task(*SCHEDULE)
    kept = {step(task, 32, micro_step=i, micro_steps=4).kept_tokens for i in range(4)}
    assert kept == {(17, 10)}


def test_a_pruned_twin_follows_the_schedule():
    for prune in ("own", "student"):
        task = tiny_task(*SCHEDULE, f"teacher.prune={prune}")
        lengths = []
        task.teacher.model.visual.register_forward_hook(
            lambda module, inputs, output, lengths=lengths: lengths.append(output[1].lengths)
        )
        for seen in (8, 16, 40):
            step(task, seen)
        assert lengths == [(17, 17), (17, 10), (10, 6)]


# ---- at the door


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [("2 weeks", [1, 1])],
            r"pruning.schedule\[0\].after='2 weeks': write a number and a unit",
        ),
        ([("0 samples", [1, 1])], r"pruning.schedule\[0\].after='0 samples': more than 0"),
        ([("8 samples", [1.0])], r"pruning.schedule\[0\].keep_ratios=\[1.0\]: wanted is one for "),
        (
            [("8 samples", [1, 1]), ("8 samples", [1, 1])],
            r"pruning.schedule\[1\].after='8 samples' does not come after '8 samples' before it",
        ),
        (
            [("1 epoch", [1, 1]), ("2 epochs", [1, 1]), ("1.5 epochs", [1, 1])],
            r"pruning.schedule\[2\].after='1.5 epochs' does not come after '2 epochs' before it",
        ),
        (
            [("8 samples", [1, 1]), ("1 epoch", [1, 1])],
            r"pruning.schedule\[1\].after='1 epoch' follows '8 samples': give all of them in ",
        ),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        scheduled(*changes)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((0.5, 0.6), r"keep_ratios\[1\]: keep_ratio 0.6 exceeds 0.5 before it"),
        ((1.5, 0.6), r"keep_ratios\[0\]: keep_ratio=1.5 must lie in \(0, 1\]"),
        ((0.5, 0.0), r"keep_ratios\[1\]: keep_ratio=0.0 must lie in \(0, 1\]"),
        ((0.5, 0.05), r"keep_ratios\[1\]: keep_ratio=0.05 of 16 patches keeps none"),
    ],
)
def test_ratios_of_a_schedule_are_checked_as_those_of_the_stages(ratios, message):
    pruning = scheduled(("8 samples", (1.0, 0.5)), ("9 samples", ratios))
    with pytest.raises(UserError, match=rf"pruning.schedule\[1\].{message}"):
        check_pruning(pruning, depth=4, num_patches=16)


@pytest.mark.parametrize("model", ["albef", "blip", "meter", "clip"])
def test_every_model_checks_its_schedule_before_it_is_built(model):
    bad = SCHEDULE[1].replace("0.25", "0.7")
    with pytest.raises(UserError, match=r"pruning.schedule\[1\].keep_ratios\[1\].*exceeds 0.5"):
        load_config(tiny_words(SCHEDULE[0], bad, model=model))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pruning.schedule=8", "a list is wanted"),
        ("pruning.schedule=[{after: 8 samples}]", "keep_ratios is missing"),
        ("pruning.schedule=[{after: 8 samples, keep_ratios: 0.5}]", "a list is wanted"),
        ("pruning.stages=[]", r"one for each of the 0 pruning.stages; without stages"),
    ],
)
def test_a_schedule_of_another_form_is_one_line(word, message):
    words = [w for w in SCHEDULE if w.split("=")[0] != word.split("=")[0]]
    with pytest.raises(UserError, match=message):
        load_config(tiny_words(*words, word))
