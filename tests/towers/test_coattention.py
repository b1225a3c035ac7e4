"""Co-attention against the formulas, one sample and one head at a time; masks and recomputing.

B batch, L text tokens, M image tokens, D width.
"""

import dataclasses

import pytest
import torch
from towers.test_med import largest, uneven

from elip_ds.errors import UserError
from elip_ds.towers.coattention import CoAttentionConfig, coattend, stream

TINY = CoAttentionConfig(width=24, depth=3, heads=3, mlp_ratio=2.0, dropout=0.0)
LENGTHS = [8, 5, 1]


def make_streams(config=TINY):
    return [uneven(stream(config), seed) for seed in (0, 1)]


def make_inputs(width=24, tokens=7):
    """text (3, 8, D), image (3, M, D), attention_mask (3, 8) of 8, 5 and 1 words."""
    draw = torch.Generator().manual_seed(2)
    mask = (torch.arange(8) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    text = torch.randn(3, 8, width, generator=draw)
    return text, torch.randn(3, tokens, width, generator=draw), mask


# ---- the slow oracle: nothing shared with the package but weights


def slow_attention(x, seen, query, key, value, proj, heads):
    """x (L, D) reads seen (M, D), of which padding has been cut off -> (L, D). Pairs (weight, bias)
    of each linear layer.
    """
    outputs = []
    size = x.shape[1] // heads
    for h in range(heads):
        rows = slice(h * size, (h + 1) * size)
        q = x @ query[0][rows].T + query[1][rows]
        k = seen @ key[0][rows].T + key[1][rows]
        v = seen @ value[0][rows].T + value[1][rows]
        weights = torch.exp(q @ k.T / size**0.5)
        outputs.append(weights / weights.sum(dim=1, keepdim=True) @ v)
    return torch.cat(outputs, dim=1) @ proj[0].T + proj[1]


def slow_norm(x, norm):
    centred = x - x.mean(dim=1, keepdim=True)
    spread = (centred.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
    return centred / spread * norm.weight + norm.bias


def pair(layer):
    return layer.weight, layer.bias


def parts(layer, number):
    return zip(layer.weight.chunk(number), layer.bias.chunk(number), strict=True)


def slow_layer(layer, x, other, heads):
    """x (L, D), other (M, D), neither with padding."""
    x = slow_norm(
        x + slow_attention(x, x, *parts(layer.attn.qkv, 3), pair(layer.attn.proj), heads),
        layer.attn_norm,
    )
    cross = layer.cross
    read = slow_attention(
        x, other, pair(cross.query), *parts(cross.key_value, 2), pair(cross.proj), heads
    )
    x = slow_norm(x + read, layer.cross_norm)
    hidden = x @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return slow_norm(x + hidden @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias, layer.mlp_norm)


def slow_coattend(text_layers, image_layers, text, image, mask, heads):
    """-> of each sample (words, patches), the padding cut off."""
    results = []
    for words, patches, length in zip(text, image, mask.sum(dim=1).tolist(), strict=True):
        words = words[:length]
        for text_layer, image_layer in zip(text_layers, image_layers, strict=True):
            before = words, patches
            words = slow_layer(text_layer, before[0], before[1], heads)
            patches = slow_layer(image_layer, before[1], before[0], heads)
        results.append((words, patches))
    return results


def run(streams, inputs, recompute="none"):
    return coattend(*streams, *inputs, recompute=recompute, training=streams[0].training)


@pytest.mark.parametrize(
    "config",
    [TINY, pytest.param(CoAttentionConfig(dropout=0.0), marks=pytest.mark.slow)],
    ids=["tiny", "base"],
)
@torch.no_grad()
def test_both_streams_equal_the_formulas(config):
    streams, inputs = make_streams(config), make_inputs(config.width)
    text, image = run(streams, inputs)
    for b, (words, patches) in enumerate(slow_coattend(*streams, *inputs, config.heads)):
        assert largest(text[b, : LENGTHS[b]], words) <= 2e-5
        assert image[b].shape == patches[:1].shape  # of the last layer nothing reads the others
        assert largest(image[b], patches[:1]) <= 2e-5


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_what_is_not_wanted_is_not_made_and_changes_nothing_else(words, pooled):
    streams, (text, image, mask) = make_streams(), make_inputs()
    whole = run(streams, (text, image, mask))
    part = coattend(
        *streams, text, image, mask, recompute="none", training=True, words=words, pooled=pooled
    )
    wanted = (text.shape[1] if words else 1, 1 if pooled else 0)
    assert tuple(x.shape[1] for x in part) == wanted
    for some, all_of_it in zip(part, whole, strict=True):
        torch.testing.assert_close(some, all_of_it[:, : some.shape[1]], atol=2e-6, rtol=1e-5)


def test_chosen_words_equal_those_among_all():
    streams, inputs, places = make_streams(), make_inputs(), torch.tensor([17, 0, 9])
    chosen, patches = coattend(
        *streams, *inputs, recompute="none", training=True, words=places, pooled=True
    )
    text, image = run(streams, inputs)
    torch.testing.assert_close(chosen, text.flatten(0, 1)[places], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, image[:, :1], atol=1e-5, rtol=1e-5)


def test_gradients_of_weights_and_inputs_equal_those_of_the_formulas():
    streams, (text, image, mask) = make_streams(), make_inputs()
    draw = torch.Generator().manual_seed(3)
    pull_text = torch.randn(text.shape, generator=draw)
    pull_image = torch.randn(image.shape, generator=draw)
    wanted = [text.requires_grad_(), image.requires_grad_(), *streams[0].parameters()]
    wanted += streams[1].parameters()

    words, patches = run(streams, (text, image, mask))
    real = mask.unsqueeze(-1)
    fast = torch.autograd.grad(
        (words * real * pull_text).sum() + (patches * pull_image[:, :1]).sum(), wanted
    )
    slow_loss = sum(
        (w * pull_text[b, : len(w)]).sum() + (p[:1] * pull_image[b, :1]).sum()
        for b, (w, p) in enumerate(slow_coattend(*streams, text, image, mask, TINY.heads))
    )
    for mine, theirs in zip(fast, torch.autograd.grad(slow_loss, wanted), strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


def test_a_layer_reads_what_the_layer_before_gave_in_the_other_stream():
    streams, inputs = make_streams(), make_inputs()
    read, gave = {}, {}

    def watch(layer, *at):
        layer.register_forward_hook(lambda _, inputs, output: gave.update({at: output}))
        layer.cross.key_value.register_forward_hook(
            lambda _, inputs, output: read.update({at: inputs[0]})
        )

    for name, layers in zip(("text", "image"), streams, strict=True):
        for number, layer in enumerate(layers):
            watch(layer, name, number)
    run(streams, inputs)
    assert read["text", 0] is inputs[1] and read["image", 0] is inputs[0]
    for number in (1, 2):
        assert read["text", number] is gave["image", number - 1]
        assert read["image", number] is gave["text", number - 1]


def test_neither_stream_sees_what_stands_in_the_padding():
    streams, (text, image, mask) = make_streams(), make_inputs()
    other = torch.where(mask.unsqueeze(-1).bool(), text, -text + 5)
    words, patches = run(streams, (text, image, mask))
    other_words, other_patches = run(streams, (other, image, mask))
    assert torch.equal(patches, other_patches)
    assert torch.equal(words[mask.bool()], other_words[mask.bool()])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_recomputing_gives_the_same_streams_and_gradients_bit_for_bit(mode, dropout):
    config = dataclasses.replace(TINY, dropout=dropout)
    results = []
    for recompute in ("none", mode):
        streams, (text, image, mask) = make_streams(config), make_inputs()
        calls = []
        streams[1][0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        text.requires_grad_()
        torch.manual_seed(4)
        words, patches = run(streams, (text, image, mask), recompute=recompute)
        (words.square().sum() + patches.square().sum()).backward()
        grads = (p.grad for layers in streams for p in layers.parameters())
        results.append((words, patches, text.grad, *grads))
        assert len(calls) == 1 + (recompute == "full")
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_initial_weights_of_the_published_width_are_normal_and_small():
    torch.manual_seed(0)
    layers = stream(CoAttentionConfig(depth=1, mlp_ratio=1.0))
    for name, part in layers.named_modules():
        if isinstance(part, torch.nn.Linear):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not part.bias.any(), name
        if isinstance(part, torch.nn.LayerNorm):
            assert part.eps == 1e-12 and (part.weight == 1).all(), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100}, r"model\.fusion\.width=100 does not divide into heads=12"),
        ({"recompute": "all"}, r"model\.fusion\.recompute='all': choose none, cheap, full"),
    ],
)
def test_a_fusion_that_does_not_add_up_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        CoAttentionConfig(**fields)


def test_dropout_of_the_config_acts_in_training_only():
    layers = stream(dataclasses.replace(TINY, dropout=0.25))
    for layer in layers:
        assert layer.dropout.p == layer.attn.dropout == layer.cross.dropout == 0.25
    assert not torch.equal(*(run([layers, layers], make_inputs())[0] for _ in range(2)))
    layers.eval()
    assert torch.equal(*(run([layers, layers], make_inputs())[0] for _ in range(2)))
