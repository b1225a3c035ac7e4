import dataclasses
import itertools

import pytest
import torch
from conftest import random_batch, tiny_task, tiny_vocabulary, tiny_words
from torch import nn

from elip_ds.config import PruningConfig, load_config
from elip_ds.data import Batch
from elip_ds.errors import UserError
from elip_ds.models import Fused, ImageFeatures, TextFeatures
from elip_ds.objectives import Progress, Setup
from elip_ds.objectives.itm import ITM, ITMConfig
from elip_ds.tasks import Pretrain, build_pretrain, min_micro_batch
from elip_ds.towers.pruning import full_index

PROGRESS = Progress(step=1, samples_seen=8, samples_per_epoch=64)
CPU = torch.device("cpu")


def whole(parameter):
    return parameter.data


def reordered(*names):
    """The tiny config with its objectives in this order."""
    config = load_config(tiny_words())
    return dataclasses.replace(config, objectives={n: config.objectives[n] for n in names})


# Building.


def test_itm_without_itc_is_refused_and_what_it_lacks_is_named():
    with pytest.raises(
        UserError,
        match=r"objectives\.itm needs sim_i2t, sim_t2i, which neither model\.name=albef nor an "
        r"objective before it gives; order now: itm, mlm",
    ):
        build_pretrain(reordered("itm", "mlm"), tiny_vocabulary())


def test_itm_before_itc_is_refused():
    with pytest.raises(UserError, match=r"objectives\.itm needs sim_i2t.*order now: itm, itc"):
        build_pretrain(reordered("itm", "itc"), tiny_vocabulary())


def test_the_order_of_objectives_that_do_not_need_each_other_is_free():
    forth, back = (
        build_pretrain(reordered(*names), tiny_vocabulary())
        for names in (("itc", "mlm"), ("mlm", "itc"))
    )
    back.load_state_dict(forth.state_dict())
    a, b = (task(random_batch(8), PROGRESS).values for task in (forth, back))
    assert list(a) == ["itc", "mlm"] and list(b) == ["mlm", "itc"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_builds_from_one_seed_are_equal():
    a, b = tiny_task(), tiny_task()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], 2), (["objectives.itm=null"], 1), (["objectives.itc=null", "objectives.itm=null"], 1)],
)
def test_the_smallest_micro_batch_is_what_the_neediest_objective_asks_for(words, expected):
    assert min_micro_batch(load_config(tiny_words(*words))) == expected


# Stepping.


def test_the_total_is_the_weighted_sum_of_the_losses():
    words = [
        f"objectives.{name}.weight={weight}"
        for name, weight in zip(("itc", "itm", "mlm"), (0.5, 2.0, 3.0), strict=True)
    ]
    result = tiny_task(*words)(random_batch(8), PROGRESS)
    values = result.values
    expected = 0.5 * values["itc"] + 2 * values["itm"] + 3 * values["mlm"]
    torch.testing.assert_close(result.total.detach(), expected)
    assert result.total.requires_grad
    assert result.kept_tokens == (10, 6)


def test_a_task_without_pruning_reports_no_kept_tokens():
    assert tiny_task("pruning.stages=[]")(random_batch(8), PROGRESS).kept_tokens == ()


def test_it_asks_for_the_batch_fields_that_its_objectives_read():
    assert tiny_task().inputs == {"images", "input_ids", "attention_mask"}


def test_after_a_step_the_twin_and_the_queue_have_taken_in_all_micro_batches():
    task = tiny_task("teacher.momentum=0.75")
    task.teacher.model.requires_grad_(False)
    with torch.no_grad():
        task.model.vision_proj.bias += 1.0
    before = task.teacher.model.vision_proj.bias.clone()
    for seed in (0, 1):
        task(random_batch(8, seed), PROGRESS)
    task.after_step(PROGRESS, whole)
    torch.testing.assert_close(task.teacher.model.vision_proj.bias, before + 0.25)
    assert task.objectives["itc"].image_queue.at == 16
    task.after_step(PROGRESS, whole)  # nothing is left over
    assert task.objectives["itc"].image_queue.at == 16


def test_a_skipped_step_leaves_no_trace():
    task = tiny_task()
    before = {key: value.clone() for key, value in task.state().items()}
    task(random_batch(8), PROGRESS)
    task.drop_carries()
    task.after_step(PROGRESS, whole)
    assert all(torch.equal(value, before[key]) for key, value in task.state().items())


# State.


def test_state_goes_round_under_the_objectives_names():
    a, b = tiny_task(), tiny_task("run.seed=1")
    assert not torch.equal(a.state()["itc.image_queue"], b.state()["itc.image_queue"])
    a(random_batch(8), PROGRESS)
    a.after_step(PROGRESS, whole)
    b.load_state({key: value.clone() for key, value in a.state().items()})
    assert set(a.state()) == {"itc.image_queue", "itc.text_queue", "itc.at"}
    assert all(torch.equal(value, b.state()[key]) for key, value in a.state().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("itc.at"), r"itc\.at is missing, here \(\)"),
        (lambda s: s.update({"itc2.at": torch.zeros(3)}), r"itc2\.at is \(3,\), here unknown"),
        (
            lambda s: s.update({"itc.text_queue": torch.zeros(7, 16)}),
            r"itc\.text_queue is \(7, 16\), here \(32, 16\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(change, message):
    task = tiny_task()
    state = {key: torch.zeros_like(value) for key, value in task.state().items()}
    change(state)
    with pytest.raises(UserError, match=message):
        task.load_state(state)
    assert task.state()["itc.image_queue"].any()


# Evaluation.


class Numbered(nn.Module):
    """Reads an image's and a caption's number and answers with that axis of the joint space."""

    gives = frozenset({"joint_space"})

    def __init__(self, width=32):
        super().__init__()
        self.axes = nn.Parameter(torch.eye(width))
        self.dropout = nn.Dropout(0.5)

    def only_joint_space(self):
        """It makes nothing else."""

    def encode_text(self, input_ids, attention_mask):
        feat = self.dropout(self.axes[input_ids[:, 1]])
        return TextFeatures(input_ids, attention_mask, feat, feat, feat)

    def encode_image(self, images, guide=None):
        assert guide is None
        number = ((images[:, 0, 0, 0] * 0.26862954 + 0.48145466) * 255).round().long()
        feat = self.dropout(self.axes[number])
        return ImageFeatures(feat, full_index(len(feat), 1, feat.device), feat)


class NumberedPairs:
    """count pairs in batches of size, the last one filled up with the first pairs again."""

    def __init__(self, count, size, captions=None):
        self.count, self.size = count, size
        self.captions = list(range(count)) if captions is None else captions

    def __len__(self):
        return self.count

    def __iter__(self):
        for start in range(0, self.count, self.size):
            rows = [i % self.count for i in range(start, start + self.size)]
            images = torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 1)
            input_ids = torch.tensor([[2, self.captions[i]] for i in rows])
            yield Batch(
                images.expand(-1, 3, 2, 2),
                input_ids,
                torch.ones_like(input_ids),
                torch.tensor(rows),
            )


@pytest.fixture
def numbered():
    return Pretrain(
        Numbered(),
        {},
        teacher_momentum=0.995,
        prune_teacher="off",
        pruning=PruningConfig(),
        seed=0,
    )


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 5), (13, 8), (3, 8)])
def test_equal_pairs_are_all_found_whatever_fills_up_the_last_batch(numbered, count, size):
    scores = numbered.evaluate(NumberedPairs(count, size), CPU)
    assert scores["candidates"] == count
    for name, k in itertools.product(("recall", "tr", "ir"), (1, 5, 10)):
        assert scores[f"{name}_at_{k}"] == 1.0


def test_pairs_with_the_wrong_caption_are_not_found(numbered):
    captions = [1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    scores = numbered.evaluate(NumberedPairs(12, 4, captions), CPU)
    assert scores["tr_at_1"] == scores["ir_at_1"] == scores["recall_at_1"] == pytest.approx(10 / 12)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_switches_dropout_off_and_the_mode_back(numbered, training):
    numbered.train(training)
    assert numbered.evaluate(NumberedPairs(12, 4), CPU)["recall_at_1"] == 1.0
    assert {module.training for module in numbered.modules()} == {training}


class Matching(Numbered):
    """No joint space: its fused pair says how far the two numbers are apart."""

    gives = frozenset({"fusion"})
    prunes_in_match = False
    pooled_width = 2

    def fuse(self, text, image):
        apart = (text.text_embeds - image.image_embeds).square().sum(dim=1)
        return Fused(text.text_embeds, torch.stack([apart, -apart], dim=1))


@pytest.fixture
def matching():
    head = ITM(ITMConfig(negatives="random"), Setup(2, 0, 8, {}, 0))
    with torch.no_grad():
        head.head.weight.copy_(torch.eye(2))
        head.head.bias.zero_()
    return Pretrain(
        Matching(),
        {"itm": head},
        teacher_momentum=0.9,
        prune_teacher="off",
        pruning=PruningConfig(),
        seed=0,
    )


@pytest.mark.parametrize(("count", "size", "candidates"), [(12, 4, 64), (13, 8, 5), (13, 8, 9)])
def test_without_a_joint_space_the_first_pairs_are_ranked_by_the_matching_head(
    matching, count, size, candidates
):
    scores = matching.evaluate(NumberedPairs(count, size), CPU, match_candidates=candidates)
    assert scores["candidates"] == min(count, candidates)
    assert scores["tr_at_1"] == scores["ir_at_1"] == scores["recall_at_10"] == 1.0


def test_a_wrong_pair_scores_lower_by_the_matching_head(matching):
    captions = [1, 0, 2, 3]
    scores = matching.evaluate(NumberedPairs(4, 4, captions), CPU)
    assert scores["tr_at_1"] == scores["ir_at_1"] == 0.5


@pytest.mark.parametrize(
    ("prune", "released", "expected"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_a_match_prunes_as_told_and_else_as_the_released_code(matching, prune, released, expected):
    matching.model.prunes_in_match = released
    guides = []
    encode = matching.model.encode_image

    def watched(images, guide=None):
        guides.append(guide)
        return encode(images)

    matching.model.encode_image = watched
    batch = next(iter(NumberedPairs(4, 4))).to(CPU, torch.float32)
    text = matching.model.encode_text(batch.input_ids, batch.attention_mask)
    scores = matching.match(batch.images, text, prune)
    assert scores.shape == (4,) and (guides[0] is text) == expected


def test_without_a_head_a_match_is_the_cosine():
    task = tiny_task("objectives.itm=null")
    batch = random_batch(4)
    text = task.model.encode_text(batch.input_ids, batch.attention_mask)
    image = task.model.encode_image(batch.images)
    torch.testing.assert_close(
        task.match(batch.images, text), (image.image_feat @ text.text_feat.T).diagonal()
    )


def test_evaluating_leaves_no_trace_in_a_real_task():
    task = tiny_task("model.text.dropout=0.1")
    weights = {key: value.clone() for key, value in task.state_dict().items()}
    state = {key: value.clone() for key, value in task.state().items()}
    rng = torch.get_rng_state()
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    batches = [dataclasses.replace(random_batch(8, seed), images=images) for seed in (0, 1)]

    class Pairs(list):
        def __len__(self):
            return 16

    scores = task.evaluate(Pairs(batches), CPU)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, weights[key]) for key, value in task.state_dict().items())
    assert all(torch.equal(value, state[key]) for key, value in task.state().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert scores["candidates"] == 16 and 0 <= scores["recall_at_10"] <= 1
