"""METER's text tower against transformers' RoBERTa and BERT, and what it promises."""

import dataclasses

import pytest
import torch
from towers.test_med import largest, put, put_attention, uneven

from elip_ds.errors import UserError
from elip_ds.towers.roberta import RoBERTa, RoBERTaConfig

TINY = RoBERTaConfig(vocab_size=60, width=32, depth=3, heads=2, max_positions=18, dropout=0.0)
BASE = RoBERTaConfig(dropout=0.0)
VARIANT = {
    "tiny roberta": TINY,
    "tiny bert": dataclasses.replace(TINY, variant="bert", max_positions=16),
    "base roberta": BASE,
    "base bert": dataclasses.replace(BASE, variant="bert", vocab_size=30522, max_positions=512),
}
variants = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "base" in name else ()) for name in VARIANT],
)
tiny_variants = pytest.mark.parametrize("name", ["tiny roberta", "tiny bert"])


def make_tower(name, **fields):
    return uneven(RoBERTa(dataclasses.replace(VARIANT[name], **fields))).eval()


def make_inputs(vocab_size, length, batch=3):
    """input_ids, attention_mask (B, L) of different lengths, padded with RoBERTa's [PAD], id 1."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.linspace(length, 2, batch).int().unsqueeze(1)
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(2, vocab_size, (batch, length), generator=draw)
    return torch.where(mask.bool(), ids, 1), mask


def their_text_tower(ours):
    """transformers' model of the same variant, with our weights in it."""
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    config = ours.config
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "max_position_embeddings": config.max_positions,
    }
    if config.variant == "roberta":
        numbers = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
        theirs = RobertaModel(RobertaConfig(**sizes, **numbers), add_pooling_layer=False)
    else:
        numbers = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 1}
        theirs = BertModel(BertConfig(**sizes, **numbers), add_pooling_layer=False)
    put(theirs.embeddings.word_embeddings, ours.embeddings.word)
    put(theirs.embeddings.position_embeddings, ours.embeddings.position)
    put(theirs.embeddings.token_type_embeddings, ours.embeddings.token_type)
    put(theirs.embeddings.LayerNorm, ours.embeddings.norm)
    for layer, mine in zip(theirs.encoder.layer, ours.layers, strict=True):
        put_attention(layer.attention, mine.attn, mine.attn_norm)
        put(layer.intermediate.dense, mine.mlp.fc1)
        put(layer.output.dense, mine.mlp.fc2)
        put(layer.output.LayerNorm, mine.mlp_norm)
    return theirs.eval()


@variants
@torch.no_grad()
def test_states_of_real_tokens_equal_those_of_transformers(name):
    ours = make_tower(name)
    theirs = their_text_tower(ours)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    ids, mask = make_inputs(
        ours.config.vocab_size, ours.config.max_length if "tiny" in name else 50
    )
    states = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    assert largest(ours(ids, mask)[real], states[real]) <= 2e-5


@tiny_variants
def test_gradients_equal_those_of_transformers(name):
    ours = make_tower(name)
    theirs = their_text_tower(ours)
    ids, mask = make_inputs(60, 10)
    pull = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(2)) * mask.unsqueeze(-1)
    (ours(ids, mask) * pull).sum().backward()
    (theirs(input_ids=ids, attention_mask=mask).last_hidden_state * pull).sum().backward()
    their_qkv = torch.cat(
        [
            getattr(theirs.encoder.layer[1].attention.self, part).weight.grad
            for part in ("query", "key", "value")
        ]
    )
    for mine, other in (
        (ours.embeddings.word.weight, theirs.embeddings.word_embeddings.weight),
        (ours.embeddings.position.weight, theirs.embeddings.position_embeddings.weight),
        (ours.embeddings.token_type.weight, theirs.embeddings.token_type_embeddings.weight),
        (ours.layers[2].mlp.fc1.weight, theirs.encoder.layer[2].intermediate.dense.weight),
    ):
        used = other.grad.any(dim=1)  # theirs leaves the row of [PAD] out
        torch.testing.assert_close(mine.grad[used], other.grad[used], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.layers[1].attn.qkv.weight.grad, their_qkv, atol=1e-4, rtol=1e-4)


def test_published_sizes_leave_room_for_512_tokens_and_no_more():
    for name in ("base roberta", "base bert"):
        assert VARIANT[name].max_length == 512
    for name, length in (("tiny roberta", 16), ("tiny bert", 16)):
        assert VARIANT[name].max_length == length
        ids, mask = make_inputs(60, length)
        assert make_tower(name)(ids, mask).shape == (3, length, 32)


def test_the_first_token_of_roberta_has_position_two_and_of_bert_none():
    for name, unused in (("tiny roberta", [0, 1]), ("tiny bert", [])):
        tower = make_tower(name)
        tower(*make_inputs(60, 16)).square().sum().backward()
        rows = tower.embeddings.position.weight.grad.abs().sum(dim=1)
        assert (rows == 0).nonzero().flatten().tolist() == unused


@tiny_variants
def test_what_stands_in_the_padding_changes_no_real_token(name):
    tower = make_tower(name)
    ids, mask = make_inputs(60, 10)
    real = mask.bool()
    garbage = torch.where(real, ids, 37)
    assert torch.equal(tower(ids, mask)[real], tower(garbage, mask)[real])


@tiny_variants
def test_padding_to_a_greater_length_changes_no_real_token(name):
    tower = make_tower(name)
    ids, mask = make_inputs(60, 10)
    short = tower(ids[2:, :2], mask[2:, :2])
    torch.testing.assert_close(tower(ids[2:], mask[2:])[:, :2], short, atol=1e-5, rtol=0)


def test_a_word_that_became_padding_does_not_shift_those_behind_it():
    tower = make_tower("tiny roberta")
    ids, mask = make_inputs(60, 10)
    ids[0, 4] = 1  # masking may draw any word of the vocabulary
    with torch.no_grad():
        tower.embeddings.position.weight[:] = torch.arange(18).unsqueeze(1).float()
        tower.embeddings.word.weight.zero_()
        tower.embeddings.token_type.weight.zero_()
    seen = []
    tower.embeddings.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tower(ids, mask)
    assert seen[0][0, :, 0].tolist() == list(range(2, 12))


@tiny_variants
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_gives_the_same_states_and_gradients_bit_for_bit(name, mode, dropout):
    ids, mask = make_inputs(60, 10)
    results = []
    for recompute in ("none", mode):
        tower = make_tower(name, dropout=dropout, recompute=recompute).train()
        calls = []
        tower.layers[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        states = tower(ids, mask)
        states.square().sum().backward()
        results.append((states, *(p.grad for p in tower.parameters())))
        assert len(calls) == 1 + (recompute == "full")
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_dropout_acts_in_training_only():
    tower = make_tower("tiny roberta", dropout=0.3)
    ids, mask = make_inputs(60, 10)
    assert torch.equal(tower(ids, mask), tower(ids, mask))
    tower.train()
    assert not torch.equal(tower(ids, mask), tower(ids, mask))


def test_initial_weights_are_small_and_normal_biases_zero_and_norms_one():
    torch.manual_seed(0)
    tower = RoBERTa(dataclasses.replace(TINY, width=768, heads=12, depth=1, mlp_ratio=1.0))
    for name, part in tower.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding) and "token_type" not in name:
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        if isinstance(part, torch.nn.Linear):
            assert not part.bias.any(), name
        if isinstance(part, torch.nn.LayerNorm):
            assert (part.weight == 1).all() and not part.bias.any() and part.eps == 1e-5, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100}, r"model\.text\.width=100 does not divide into heads=12"),
        ({"recompute": "no"}, r"model\.text\.recompute='no': choose none, cheap, full"),
        ({"variant": "deberta"}, r"model\.text\.variant='deberta': choose roberta or bert"),
    ],
)
def test_a_tower_that_does_not_add_up_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        RoBERTaConfig(**fields)
