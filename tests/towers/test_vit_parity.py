"""The vision tower against timm's, with timm's own weights taken through the table of names."""

import pytest
import timm
import torch

from elip_ds.config import PruningConfig
from elip_ds.towers import ViT, ViTConfig
from elip_ds.weights.table import to_ours
from elip_ds.weights.vit import FAMILY

LIMIT = 2e-5
TINY = {"embed_dim": 64, "depth": 3, "num_heads": 4}


def compare(name: str, config: ViTConfig, **settings) -> float:
    """Largest difference over all tokens of two images; every weight of timm's is made uneven."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, **settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    made, missing, left_over = to_ours(FAMILY.rules, theirs.state_dict())
    assert not missing and set(left_over) <= {"head.weight", "head.bias"}
    mine = ViT(config, PruningConfig(stages=[])).eval()
    weights = {n.removeprefix("model.visual."): weight.read() for n, (_, weight) in made.items()}
    mine.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, *config.pixels)
    with torch.no_grad():
        tokens, _ = mine(images)
        return (tokens - theirs.forward_features(images)).abs().max().item()


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit_base_patch16_224"])
@pytest.mark.parametrize(
    ("pixels", "patch"), [((64, 64), 16), ((32, 32), 8), ((48, 80), 16), ((56, 28), 7)]
)
def test_a_tiny_tower_gives_the_tokens_of_timm(name, pixels, patch):
    config = ViTConfig(
        image_size=pixels[0],
        image_width=pixels[1],
        patch_size=patch,
        width=64,
        depth=3,
        heads=4,
    )
    assert compare(name, config, img_size=pixels, patch_size=patch, **TINY) <= LIMIT


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("vit_base_patch16_clip_224", "gelu"),
        ("vit_base_patch16_clip_quickgelu_224", "quick_gelu"),
    ],
)
@pytest.mark.parametrize("pixels", [(64, 64), (32, 64)])
def test_a_tiny_tower_of_clip_gives_the_tokens_of_timm(name, activation, pixels):
    config = ViTConfig(
        image_size=pixels[0],
        image_width=pixels[1],
        width=64,
        depth=3,
        heads=4,
        layout="clip",
        activation=activation,
    )
    assert compare(name, config, img_size=pixels, **TINY) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "config"),
    [
        ("vit_base_patch16_224", {}, ViTConfig(image_size=224)),
        ("vit_base_patch16_224", {"img_size": 384}, ViTConfig(image_size=384)),
        (
            "vit_base_patch32_224",
            {"img_size": (224, 352)},
            ViTConfig(image_size=224, image_width=352, patch_size=32),
        ),
        ("deit_base_patch16_224", {}, ViTConfig(image_size=224)),
        ("vit_base_patch16_clip_224", {}, ViTConfig(image_size=224, layout="clip")),
        (
            "vit_base_patch32_clip_quickgelu_224",
            {},
            ViTConfig(image_size=224, patch_size=32, layout="clip", activation="quick_gelu"),
        ),
    ],
)
def test_a_base_tower_gives_the_tokens_of_timm(name, settings, config):
    difference = compare(name, config, **settings)
    print(f"{name} {settings}: {difference:.2e}")
    assert difference <= LIMIT
