"""Vision transformers with a class token as timm stores them: DeiT, AugReg and their kin.

Source of the names: timm's VisionTransformer; its CLIP-like variants have a norm before block 0.
"""

from elip_ds.weights.table import Family, Rule, linear, rule


def vision_tower(ours: str, theirs: str) -> list[Rule]:
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    blocks = (linear(f"{ours}blocks.{{i}}.{p}", f"{theirs}blocks.{{i}}.{p}") for p in parts)
    return [
        rule(f"{ours}cls_token.weight", f"{theirs}cls_token"),
        rule(f"{ours}pos_embed.weight", f"{theirs}pos_embed"),
        *linear(f"{ours}patch_embed", f"{theirs}patch_embed.proj"),
        *(each for block in blocks for each in block),
        *linear(f"{ours}norm", f"{theirs}norm"),
    ]


def recognise(names: set[str]) -> str:
    wanted = "blocks.0.attn.qkv.weight"
    return wanted if wanted in names and "cls_token" in names else ""


FAMILY = Family(
    title="a timm vision transformer",
    model=None,
    recognise=recognise,
    rules=(
        *vision_tower("model.visual.", ""),
        *linear("model.visual.norm_pre", "norm_pre"),
    ),
    ignored={r"head\..*": "the classifier", r"pre_logits\..*": "the classifier"},
    refused={
        r"dist_token|head_dist\..*": "a distilled DeiT, whose tower has a second class token",
        r"fc_norm\..*": "a tower that averages its tokens instead of reading the class token",
    },
    wrap="model",
)
