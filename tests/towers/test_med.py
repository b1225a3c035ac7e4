"""BLIP's text tower against transformers' BLIP, and what its three ways through it promise."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from elip_ds.towers import MED, MEDConfig

TINY = MEDConfig(vocab_size=50, width=32, depth=3, heads=2, max_positions=16, dropout=0.0)
BASE = dataclasses.replace(MEDConfig(), dropout=0.0)
IMAGE_WIDTH = 24

sizes = pytest.mark.parametrize(
    ("config", "image_width"),
    [(TINY, IMAGE_WIDTH), pytest.param(BASE, 768, marks=pytest.mark.slow)],
    ids=["tiny", "base"],
)


# ---- transformers' BLIP with our weights in it


def uneven(module, seed=0):
    """Every parameter random and unlike its neighbours: matrices, biases, norms and tables."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(std * torch.randn(parameter.shape, generator=draw))
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return module


def put(theirs, ours, parts=1, part=0):
    """Weight and bias of our layer, or one part of its rows, into theirs."""
    for name, parameter in theirs.named_parameters():
        parameter.data.copy_(getattr(ours, name).data.chunk(parts)[part])


def put_attention(theirs, ours, norm):
    fused, sources = (
        (ours.qkv, ("query", "key", "value"))
        if hasattr(ours, "qkv")
        else (ours.key_value, ("key", "value"))
    )
    if not hasattr(ours, "qkv"):
        put(theirs.self.query, ours.query)
    for part, name in enumerate(sources):
        put(getattr(theirs.self, name), fused, len(sources), part)
    put(theirs.output.dense, ours.proj)
    put(theirs.output.LayerNorm, norm)


def put_text(theirs, ours, decode):
    """Our MED into a BlipTextModel: the encoder, or with decode the decoder."""
    put(theirs.embeddings.word_embeddings, ours.embeddings.word)
    put(theirs.embeddings.position_embeddings, ours.embeddings.position)
    put(theirs.embeddings.LayerNorm, ours.embeddings.norm)
    for layer, mine in zip(theirs.encoder.layer, ours.layers, strict=True):
        attention = mine.decoder_attn if decode else mine.attn
        put_attention(
            layer.attention, attention, mine.decoder_attn_norm if decode else mine.attn_norm
        )
        put_attention(layer.crossattention, mine.cross, mine.cross_norm)
        put(layer.intermediate.dense, mine.mlp.fc1)
        put(layer.output.dense, mine.mlp.fc2)
        put(layer.output.LayerNorm, mine.mlp_norm)


def their_text_config(config, image_width, **more):
    from transformers import BlipTextConfig

    return BlipTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        encoder_hidden_size=image_width,
        intermediate_size=int(config.width * config.mlp_ratio),
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        max_position_embeddings=config.max_positions,
        attn_implementation="eager",
        **more,
    )


def their_encoder(ours, image_width):
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    theirs = BlipTextModel(their_text_config(ours.config, image_width), add_pooling_layer=False)
    put_text(theirs, ours, decode=False)
    return theirs.eval()


def their_decoder(ours, image_width, **more):
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    theirs = BlipTextLMHeadModel(their_text_config(ours.config, image_width, **more))
    put_text(theirs.bert, ours, decode=True)
    head = theirs.cls.predictions
    put(head.transform.dense, ours.lm_head.dense)
    put(head.transform.LayerNorm, ours.lm_head.norm)
    head.bias.data.copy_(ours.lm_head.bias.data)
    theirs.tie_weights()
    assert torch.equal(head.decoder.weight, ours.embeddings.word.weight)
    assert torch.equal(head.decoder.bias, ours.lm_head.bias)
    return theirs.eval()


def largest(x, y):
    assert x.shape == y.shape
    return (x - y).abs().max().item()


def make_inputs(config, image_width, batch=3, length=10, tokens=7):
    """input_ids, attention_mask (B, L) of different lengths, the last 2; image (B, M, C)."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.linspace(length, 2, batch).int().unsqueeze(1)
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(1, config.vocab_size, (batch, length), generator=draw) * mask
    return ids, mask, torch.randn(batch, tokens, image_width, generator=draw)


@pytest.fixture
def med():
    return uneven(MED(TINY, IMAGE_WIDTH))


@pytest.fixture
def inputs():
    return make_inputs(TINY, IMAGE_WIDTH)


@sizes
@torch.no_grad()
def test_encoding_and_fusing_equal_those_of_transformers(config, image_width):
    med = uneven(MED(config, image_width)).eval()
    theirs = their_encoder(med, image_width)
    ids, mask, image = make_inputs(config, image_width)
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    assert largest(med.encode(ids, mask), expected) <= 2e-5
    seen = torch.ones(image.shape[:2], dtype=torch.long)
    expected = theirs(
        ids, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=seen
    ).last_hidden_state
    assert largest(med.fuse(ids, mask, image)[0], expected) <= 2e-5


@sizes
@torch.no_grad()
def test_decoding_and_its_word_logits_equal_those_of_transformers(config, image_width):
    med = uneven(MED(config, image_width)).eval()
    theirs = their_decoder(med, image_width)
    ids, mask, image = make_inputs(config, image_width)
    seen = torch.ones(image.shape[:2], dtype=torch.long)
    expected = theirs(
        ids,
        attention_mask=mask,
        encoder_hidden_states=image,
        encoder_attention_mask=seen,
        output_hidden_states=True,
    )
    states = med.decode(ids, mask, image)
    assert largest(states, expected.hidden_states[-1]) <= 2e-5
    assert largest(med.word_logits(states), expected.logits) <= 2e-5


# ---- what the three ways promise


WAYS = {
    "fuse": lambda med: lambda *inputs: med.fuse(*inputs)[0],
    "decode": lambda med: med.decode,
}


def test_encoder_and_decoder_share_all_but_self_attention(med, inputs):
    ids, mask, image = inputs
    med.fuse(ids, mask, image)[0].square().sum().backward()
    read_by_fuse = {n for n, p in med.named_parameters() if p.grad is not None}
    med.zero_grad(set_to_none=True)
    med.word_logits(med.decode(ids, mask, image)).square().sum().backward()
    read_by_decode = {n for n, p in med.named_parameters() if p.grad is not None}

    def parts(names):
        return {n.split(".")[2 if n.startswith("layers") else 0] for n in names}

    assert parts(read_by_fuse - read_by_decode) == {"attn", "attn_norm"}
    assert parts(read_by_decode - read_by_fuse) == {"decoder_attn", "decoder_attn_norm", "lm_head"}
    assert read_by_fuse | read_by_decode == {n for n, _ in med.named_parameters()}


def test_the_text_alone_has_nothing_to_see_images_or_decode_with(med, inputs):
    ids, mask, _ = inputs
    expected = med.encode(ids, mask)
    with torch.no_grad():
        for name, parameter in med.named_parameters():
            if any(part in name for part in ("cross", "decoder_attn", "lm_head")):
                parameter.fill_(float("nan"))
    assert torch.equal(med.encode(ids, mask), expected)


@pytest.mark.parametrize("way", ["fuse", "decode"])
def test_what_stands_in_the_padding_changes_no_real_token(med, inputs, way):
    ids, mask, image = inputs
    real = mask.bool()
    garbage = torch.where(real, ids, 37)
    run = WAYS[way](med)
    assert torch.equal(run(ids, mask, image)[real], run(garbage, mask, image)[real])


def test_a_decoded_token_sees_itself_and_what_is_before_it(med, inputs):
    ids, mask, image = (x[:1] for x in inputs)
    states = med.decode(ids, mask, image)[0]
    for i in range(10):
        changed = ids.clone()
        changed[0, i] = changed[0, i] % 49 + 1
        differs = (med.decode(changed, mask, image)[0] != states).any(dim=1)
        assert differs.tolist() == [j >= i for j in range(10)], i


def test_a_decoded_text_cut_short_has_the_same_beginning(med, inputs):
    ids, mask, image = inputs
    whole = med.decode(ids, mask, image)
    cut = med.decode(ids[:, :4], mask[:, :4], image)
    torch.testing.assert_close(cut, whole[:, :4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["fuse", "decode"])
def test_every_token_sees_all_image_tokens_in_any_order(med, inputs, way):
    ids, mask, image = inputs
    run = WAYS[way](med)
    states = run(ids, mask, image)
    torch.testing.assert_close(run(ids, mask, image.flip(1)), states, atol=1e-5, rtol=0)
    for m in range(7):
        changed = image.clone()
        changed[0, m] += 1.0
        other = run(ids, mask, changed)
        assert (other[0] != states[0]).any(dim=1).all(), m
        torch.testing.assert_close(other[1:], states[1:])


def test_the_words_are_guessed_by_the_matrix_that_embeds_them(med):
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    head = med.lm_head
    states = F.layer_norm(
        F.gelu(head.dense(hidden)), (32,), head.norm.weight, head.norm.bias, 1e-12
    )
    expected = states @ med.embeddings.word.weight.T + head.bias
    torch.testing.assert_close(med.word_logits(hidden), expected)
    shapes = [tuple(p.shape) for p in med.parameters()]
    assert shapes.count((50, 32)) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_gives_the_same_states_and_gradients_bit_for_bit(med, inputs, mode, dropout):
    ids, mask, image = inputs
    results = []
    for recompute in ("none", mode):
        tower = MED(dataclasses.replace(TINY, dropout=dropout, recompute=recompute), IMAGE_WIDTH)
        tower.load_state_dict(copy.deepcopy(med.state_dict()))
        calls = []
        tower.layers[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        seen = image.clone().requires_grad_()
        torch.manual_seed(3)
        states = (
            tower.encode(ids, mask),
            tower.fuse(ids, mask, seen)[0],
            tower.decode(ids, mask, seen),
        )
        sum(s.square().sum() for s in states).backward()
        results.append((*states, seen.grad, *(p.grad for p in tower.layers.parameters())))
        assert len(calls) == (6 if recompute == "full" else 3)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_published_tower_has_two_more_words_than_bert_and_no_segments():
    config = MEDConfig()
    assert (config.vocab_size, config.decoder_id, config.encoder_id) == (30524, 30522, 30523)
    assert MED(TINY, IMAGE_WIDTH).embeddings.token_type is None


def test_initial_weights_of_the_published_width_are_small_and_biases_zero():
    torch.manual_seed(0)
    tower = MED(dataclasses.replace(TINY, width=768, depth=1, mlp_ratio=1.0), 768)
    for name, part in tower.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        if isinstance(part, torch.nn.Linear):
            assert not part.bias.any(), name
        if isinstance(part, torch.nn.LayerNorm):
            assert (part.weight == 1).all() and not part.bias.any(), name
            assert part.eps == 1e-12
