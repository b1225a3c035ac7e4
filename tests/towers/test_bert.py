"""The text tower: padding, the two halves, the tied decoder, recomputing, initial weights."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from elip_ds.errors import UserError
from elip_ds.towers import BERT, BERTConfig

CONFIG = BERTConfig(
    vocab_size=50, width=32, depth=4, fusion_layer=2, heads=2, max_positions=16, dropout=0.0
)
IMAGE_WIDTH = 24


@pytest.fixture
def bert():
    torch.manual_seed(0)
    tower = BERT(CONFIG, IMAGE_WIDTH)
    for parameter in tower.parameters():  # large enough that every connection shows
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return tower


@pytest.fixture
def inputs():
    """input_ids, attention_mask (3, 10) with 10, 6 and 2 tokens, image (3, 7, C)."""
    draw = torch.Generator().manual_seed(1)
    mask = (torch.arange(10) < torch.tensor([[10], [6], [2]])).long()
    ids = torch.randint(1, 50, (3, 10), generator=draw) * mask
    return ids, mask, torch.randn(3, 7, IMAGE_WIDTH, generator=draw)


def test_what_stands_in_the_padding_changes_no_real_token(bert, inputs):
    ids, mask, image = inputs
    real = mask.bool()
    garbage = torch.where(real, ids, 37)
    states, same = bert.encode(ids, mask), bert.encode(garbage, mask)
    assert torch.equal(states[real], same[real])
    fused, same_fused = (bert.fuse(x, mask, image)[0] for x in (states, same))
    assert torch.equal(fused[real], same_fused[real])


def test_padding_to_a_greater_length_changes_no_real_token(bert, inputs):
    ids, mask, image = inputs
    states = bert.encode(ids[2:, :2], mask[2:, :2])
    padded = bert.encode(ids[2:], mask[2:])
    torch.testing.assert_close(padded[:, :2], states, atol=1e-5, rtol=0)
    fused, _ = bert.fuse(states, mask[2:, :2], image[2:])
    padded_fused, _ = bert.fuse(padded, mask[2:], image[2:])
    torch.testing.assert_close(padded_fused[:, :2], fused, atol=1e-5, rtol=0)


def test_every_real_token_of_a_caption_reaches_its_class_token(bert, inputs):
    ids, mask, _ = inputs
    class_state = bert.encode(ids, mask)[0, 0]
    for i in range(1, 10):
        changed = ids.clone()
        changed[0, i] = changed[0, i] % 49 + 1
        assert not torch.equal(bert.encode(changed, mask)[0, 0], class_state), i


def test_the_text_half_has_nothing_to_see_images_with(bert, inputs):
    ids, mask, _ = inputs
    assert [hasattr(layer, "cross") for layer in bert.layers] == [False, False, True, True]
    by_half = bert.encode(ids, mask)
    with torch.no_grad():  # breaking all that reads images leaves the text half as it was
        for layer in bert.layers[2:]:
            for parameter in layer.parameters():
                parameter.fill_(float("nan"))
    assert torch.equal(bert.encode(ids, mask), by_half)


def test_the_fusion_half_sees_all_image_tokens_in_any_order(bert, inputs):
    ids, mask, image = inputs
    states = bert.encode(ids, mask)
    fused, _ = bert.fuse(states, mask, image)
    turned, _ = bert.fuse(states, mask, image.flip(1))
    torch.testing.assert_close(turned, fused, atol=1e-5, rtol=0)
    for m in range(7):
        changed = image.clone()
        changed[0, m] += 1.0
        other, _ = bert.fuse(states, mask, changed)
        assert not torch.equal(other[0], fused[0]), m
        torch.testing.assert_close(other[1:], fused[1:])


def test_the_decoder_is_the_word_embedding(bert):
    hidden = torch.randn(5, 32)
    logits = bert.decode(hidden)
    head = bert.mlm_head
    expected = head.norm(F.gelu(head.dense(hidden))) @ bert.embeddings.word.weight.T + head.bias
    torch.testing.assert_close(logits, expected)
    sizes = [tuple(p.shape) for p in bert.parameters()]
    assert sizes.count((50, 32)) == 1  # one matrix for both ways: nothing to tie, nothing to untie

    logits.sum().backward()
    assert bert.embeddings.word.weight.grad.abs().sum() > 0
    with torch.no_grad():
        bert.embeddings.word.weight[7] = 0.0
    assert torch.equal(bert.decode(hidden)[:, 7], head.bias[7].expand(5))
    assert not bert.embeddings.word(torch.tensor([7])).any()


@pytest.mark.parametrize(("mode", "calls"), [("cheap", 1), ("full", 2)])
def test_recomputing_gives_the_same_states_and_gradients_bit_for_bit(bert, inputs, mode, calls):
    ids, mask, image = inputs
    recomputing = copy.deepcopy(bert)
    recomputing.config = dataclasses.replace(CONFIG, recompute=mode)
    called = []
    recomputing.layers[3].register_forward_pre_hook(lambda *_: called.append(1))
    results = []
    for tower in (bert, recomputing):
        seen = image.clone().requires_grad_()
        fused, _ = tower.fuse(tower.encode(ids, mask), mask, seen)
        tower.decode(fused).square().sum().backward()
        results.append((fused, seen.grad, *(p.grad for p in tower.parameters())))
    assert len(called) == calls
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_draws_the_same_dropout_again(inputs, mode):
    ids, mask, image = inputs
    grads = []
    for recompute in ("none", mode):
        torch.manual_seed(0)
        tower = BERT(dataclasses.replace(CONFIG, dropout=0.3, recompute=recompute), IMAGE_WIDTH)
        tower.fuse(tower.encode(ids, mask), mask, image)[0].square().sum().backward()
        grads.append([p.grad for p in tower.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_dropout_acts_in_training_only(inputs):
    ids, mask, image = inputs
    torch.manual_seed(0)
    tower = BERT(dataclasses.replace(CONFIG, dropout=0.3), IMAGE_WIDTH)

    def twice():
        return [tower.fuse(tower.encode(ids, mask), mask, image)[0] for _ in range(2)]

    assert not torch.equal(*twice())
    tower.eval()
    assert torch.equal(*twice())


def test_initial_weights_of_the_published_width_are_small_and_biases_zero():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, width=768, depth=2, fusion_layer=1, mlp_ratio=1.0)
    tower = BERT(config, IMAGE_WIDTH)
    for name, part in tower.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        if isinstance(part, torch.nn.Linear):
            assert not part.bias.any(), name
        if isinstance(part, torch.nn.LayerNorm):
            assert (part.weight == 1).all() and not part.bias.any(), name
            assert part.eps == 1e-12
    assert not tower.mlm_head.bias.any()
    # A plain normal, as BERT's: some of 38400 draws lie beyond three standard deviations.
    assert tower.embeddings.word.weight.abs().max() > 3 * 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100}, "model.text.width=100 does not divide into heads=12"),
        ({"fusion_layer": 0}, "fusion_layer=0 must lie between 0 and depth=12"),
        ({"fusion_layer": 12}, "fusion_layer=12 must lie between 0 and depth=12"),
        ({"recompute": "some"}, "model.text.recompute='some': choose none, cheap, full"),
    ],
)
def test_a_tower_that_does_not_add_up_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        BERTConfig(**fields)
