"""BERT and RoBERTa as transformers stores them, for any text tower; parts of other tables.

Source of the names: transformers' BertForMaskedLM, BertModel and RobertaModel, with or without
their prefix, and the original file's gamma and beta.
"""

import re

from elip_ds.weights.table import Family, Rule, linear, rule


def embeddings(ours: str, *theirs: str) -> list[Rule]:
    """Positions and norm; words and segments are not in all of them the same."""
    return [
        rule(f"{ours}.position.weight", *(f"{t}.position_embeddings.weight" for t in theirs)),
        *linear(f"{ours}.norm", *(f"{t}.LayerNorm" for t in theirs)),
    ]


def self_attention(ours: str, *theirs: str) -> list[Rule]:
    parts = ("query", "key", "value")
    return [
        *linear(f"{ours}.qkv", *([f"{t}.self.{part}" for part in parts] for t in theirs)),
        *linear(f"{ours}.proj", *(f"{t}.output.dense" for t in theirs)),
        *linear(f"{ours}_norm", *(f"{t}.output.LayerNorm" for t in theirs)),
    ]


def cross_attention(ours: str, *theirs: str) -> list[Rule]:
    parts = ("key", "value")
    return [
        *linear(f"{ours}.query", *(f"{t}.self.query" for t in theirs)),
        *linear(f"{ours}.key_value", *([f"{t}.self.{part}" for part in parts] for t in theirs)),
        *linear(f"{ours}.proj", *(f"{t}.output.dense" for t in theirs)),
        *linear(f"{ours}_norm", *(f"{t}.output.LayerNorm" for t in theirs)),
    ]


def feed_forward(ours: str, *theirs: str) -> list[Rule]:
    """ours, theirs: a layer."""
    return [
        *linear(f"{ours}.mlp.fc1", *(f"{t}.intermediate.dense" for t in theirs)),
        *linear(f"{ours}.mlp.fc2", *(f"{t}.output.dense" for t in theirs)),
        *linear(f"{ours}.mlp_norm", *(f"{t}.output.LayerNorm" for t in theirs)),
    ]


def word_head(ours: str, theirs: str) -> list[Rule]:
    """All but the decoder's matrix, which is the word table."""
    return [
        *linear(f"{ours}.dense", f"{theirs}.transform.dense"),
        *linear(f"{ours}.norm", f"{theirs}.transform.LayerNorm"),
        rule(f"{ours}.bias", f"{theirs}.bias", f"{theirs}.decoder.bias"),
    ]


def text_tower(ours: str, theirs: str) -> list[Rule]:
    """Embeddings but for the words, and layers without cross-attention."""
    layer = f"{theirs}encoder.layer.{{i}}"
    segments = f"{theirs}embeddings.token_type_embeddings.weight"
    return [
        rule(f"{ours}embeddings.token_type.weight", segments),
        *embeddings(f"{ours}embeddings", f"{theirs}embeddings"),
        *self_attention(f"{ours}layers.{{i}}.attn", f"{layer}.attention"),
        *feed_forward(f"{ours}layers.{{i}}", layer),
    ]


def recognise(names: set[str]) -> str:
    found = {re.sub(r"^(bert|roberta)\.", "", name) for name in names}
    wanted = "embeddings.word_embeddings.weight"
    return wanted if wanted in found else ""


def tidy(name: str) -> str:
    name = re.sub(r"^(bert|roberta)\.", "", name)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


IGNORED = {
    r".*embeddings\.position_ids": "a counter, not a weight",
    r".*pooler\..*": "no tower here has BERT's pooler",
}

FAMILY = Family(
    title="BERT",
    model=None,
    recognise=recognise,
    tidy=tidy,
    rules=(
        rule(
            "model.text.embeddings.word.weight",
            "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.weight",
        ),
        *text_tower("model.text.", ""),
        *word_head("model.text.mlm_head", "cls.predictions"),
    ),
    ignored={
        **IGNORED,
        r"cls\.seq_relationship\..*": "the next-sentence head",
        r"lm_head\..*": "METER's word head starts anew",
    },
    optional=("model.text.mlm_head.",),
)
