import dataclasses
from collections import Counter

import pytest
import torch
from conftest import random_batch, tiny_task

from elip_ds.objectives import Pass, Progress, StepContext

PROGRESS = Progress(step=7, samples_seen=32, samples_per_epoch=64)


def context_with_keys(keys, seed=42, step=7):
    batch = dataclasses.replace(random_batch(1), sample_key=torch.as_tensor(keys))
    return StepContext(batch, {}, dataclasses.replace(PROGRESS, step=step), seed=seed)


def context_of(task, prune_teacher="off"):
    models = {"student": task.model, "teacher": task.teacher.model}
    return StepContext(random_batch(4), models, PROGRESS, prune_teacher=prune_teacher)


def count_passes(task):
    """Runs one training step; returns forwards by (who, tower), and those of the backward pass.

    A fusion is counted by its first layer's projection of the images to keys and values.
    """
    counts = Counter()

    def watch(module, *key):
        module.register_forward_hook(lambda *_: counts.update([key]))

    models = {"student": task.model}
    if task.teacher is not None:
        models["teacher"] = task.teacher.model
    for who, model in models.items():
        watch(model.text.embeddings, who, "text")
        watch(model.visual, who, "image")
        watch(model.text.layers[model.text.config.fusion_layer].cross.key_value, who, "fusion")
        watch(model.text.mlm_head, who, "decode")
    total = task(random_batch(4), PROGRESS).total
    forward = dict(counts)
    counts.clear()
    total.backward()
    return forward, dict(counts)


ITC = {
    ("student", "text"): 1,
    ("student", "image"): 1,
    ("teacher", "text"): 1,
    ("teacher", "image"): 1,
}
ALL = ITC | {
    ("student", "text"): 2,  # clean and masked
    ("teacher", "text"): 2,
    ("student", "fusion"): 1,  # pairs, negatives and masked words at once
    ("teacher", "fusion"): 1,
    ("student", "decode"): 1,
    ("teacher", "decode"): 1,
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ALL),
        (["objectives.itm=null", "objectives.mlm=null"], ITC),
        (["objectives.mlm=null"], ITC | {("student", "fusion"): 1}),
        (["objectives.itm=null"], ALL),
        # Without ITC the teacher reads no clean text: its image is not pruned.
        (
            ["objectives.itc=null", "objectives.itm=null"],
            ALL | {("teacher", "text"): 1},
        ),
        (
            ["objectives.itc=null", "objectives.itm=null", "teacher.prune=own"],
            ALL,
        ),
        (
            ["objectives.itc=null", "objectives.itm=null", "objectives.mlm.alpha=0"],
            {k: v for k, v in ALL.items() if k[0] == "student"},
        ),
    ],
)
def test_a_step_runs_every_pass_once_and_no_other(words, expected):
    forward, backward = count_passes(tiny_task(*words))
    assert forward == expected
    # Word logits, and nothing else, are made again rather than kept.
    assert backward == {key: count for key, count in expected.items() if key[1] == "decode"}


def test_a_pass_asked_for_twice_is_one_object():
    context = context_of(tiny_task())
    assert context.run(Pass("image")) is context.run(Pass("image", "student", text="other"))
    assert context.run(Pass("text")) is context.run(Pass("text", view="other", guide=None))
    teacher = Pass("image", "teacher")
    assert context.run(teacher) is context.run(teacher._replace(guide=None))  # it never prunes


def test_a_pass_may_read_other_images_and_be_guided_by_another_text():
    task = tiny_task()
    context = context_of(task)
    input_ids, attention_mask = context.texts["clean"]
    context.texts["turned"] = (input_ids.flip(0), attention_mask.flip(0))
    context.views["turned"] = context.batch.images.flip(0)
    turned = context.run(Pass("fusion", text="turned", view="turned", guide="turned"))
    torch.testing.assert_close(turned.pooled.flip(0), context.run(Pass("fusion")).pooled)
    plain = context.run(Pass("image", guide=None))
    assert plain.keep.lengths == () and plain.image_embeds.shape == (4, 17, 32)


def test_the_students_image_is_pruned_and_the_teachers_is_not():
    context = context_of(tiny_task())
    assert context.run(Pass("image")).keep.lengths == (10, 6)
    assert context.run(Pass("image", "teacher")).image_embeds.shape == (4, 17, 32)


def test_the_teachers_image_is_pruned_when_told_so():
    context = context_of(tiny_task(), prune_teacher="own")
    assert context.run(Pass("image", "teacher")).keep.lengths == (10, 6)


def test_the_task_hands_teacher_prune_on():
    lengths = []
    task = tiny_task("teacher.prune=own")
    task.teacher.model.visual.register_forward_hook(
        lambda module, inputs, output: lengths.append(output[0].shape[1])
    )
    task(random_batch(4), PROGRESS)
    assert lengths == [6]


def test_fusion_with_masked_text_sees_the_tokens_that_the_clean_caption_chose():
    task = tiny_task()
    context = context_of(task)
    input_ids, attention_mask = context.texts["clean"]
    context.texts["masked"] = (torch.full_like(input_ids, 4), attention_mask)
    fused = context.run(Pass("fusion", text="masked")).text
    text = task.model.encode_text(*context.texts["masked"])
    assert torch.equal(fused, task.model.fuse(text, context.run(Pass("image"))).text)
    assert [spec.guide for spec in context.passes if spec.tower == "image"] == ["clean"]


def test_only_the_students_passes_carry_a_gradient():
    context = context_of(tiny_task())
    for who in ("student", "teacher"):
        made = context.run(Pass("fusion", who)).text, context.run(Pass("image", who)).image_feat
        assert [x.requires_grad for x in made] == [who == "student"] * 2
    with torch.no_grad():
        assert not context_of(tiny_task()).run(Pass("fusion")).pooled.requires_grad


def splitmix(x):
    """splitmix64 on plain integers: the step and its finaliser."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def slow_noise(seed, step, name, key, position):
    base = splitmix(splitmix(seed % 2**64) + step)
    for letter in name.encode():
        base = splitmix(base + letter)
    return splitmix(splitmix(key + base) + position) % 2**24 / 2**24


@pytest.mark.parametrize("seed", [0, 42, 2**40])
def test_noise_equals_splitmix64_on_plain_integers(seed):
    assert splitmix(0) == 0xE220A8397B1DCDAF  # its published first output
    keys = [0, 1, -1, 2**62 + 12345, -(2**63)]
    noise = context_with_keys(keys, seed).noise("mlm", 3)
    expected = [[slow_noise(seed, 7, "mlm", key, i) for i in range(3)] for key in keys]
    assert noise.tolist() == expected


def test_a_samples_noise_does_not_depend_on_the_batch_around_it():
    keys = torch.randint(-(2**62), 2**62, (10,), generator=torch.Generator().manual_seed(0))
    whole = context_with_keys(keys).noise("mlm", 9)
    order = torch.tensor([7, 2, 9])
    assert torch.equal(context_with_keys(keys[order]).noise("mlm", 9), whole[order])
    assert torch.equal(context_with_keys(keys).noise("mlm", 4), whole[:, :4])


def test_noise_is_uniform_and_its_positions_are_independent():
    noise = context_with_keys(torch.arange(5000)).noise("mlm", 20)
    assert noise.dtype == torch.float32 and noise.min() >= 0 and noise.max() < 1
    bins = torch.histc(noise, bins=50, min=0, max=1)
    assert ((bins - 2000) ** 2 / 2000).sum() < 85.4  # 49 degrees of freedom, p = 0.001
    assert noise.mean().item() == pytest.approx(0.5, abs=0.005)
    correlation = torch.corrcoef(noise.T) - torch.eye(20)
    assert correlation.abs().max() < 5 / 5000**0.5


def test_another_name_step_seed_or_sample_draws_other_noise():
    draws = [
        context_with_keys([1], 42, 7).noise("mlm", 8),
        context_with_keys([1], 42, 7).noise("itm", 8),
        context_with_keys([1], 42, 7).noise("mml", 8),
        context_with_keys([1], 42, 8).noise("mlm", 8),
        context_with_keys([1], 43, 7).noise("mlm", 8),
        context_with_keys([2], 42, 7).noise("mlm", 8),
    ]
    assert len({value for draw in draws for value in draw.flatten().tolist()}) == 48


def test_noise_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    context_with_keys([1, 2, 3]).noise("mlm", 100)
    assert torch.equal(torch.get_rng_state(), before)
