"""Small vocabularies of every kind, and the files that they come in."""

import gzip
import json
from functools import cache
from pathlib import Path

from elip_ds.data import Vocabulary
from elip_ds.data.learn import learn_vocabulary
from elip_ds.data.vocabulary import KINDS

CAPTIONS = [
    "A large red circle above a small blue square.",
    "Two dogs: one black, one white - on the grass/lawn!",
    "<person> rides a bike; a dog runs, and it doesn't stop",
    "Caf\u00e9 in Z\u00fcrich, 1940",
]
SIZES = {"albef": 200, "bert": 200, "blip": 202, "roberta": 400, "clip": 650}


@cache
def learned(kind: str) -> Vocabulary:
    assert SIZES.keys() == KINDS.keys()
    return learn_vocabulary(CAPTIONS, SIZES[kind], kind)


def write_words(folder: Path, vocabulary: Vocabulary) -> Path:
    """As BERT's vocab.txt."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(vocabulary.words) + "\n", encoding="utf-8")
    return path


def write_pair(folder: Path, vocabulary: Vocabulary) -> Path:
    """As RoBERTa's vocab.json and merges.txt. Returns the folder."""
    merges = ["#version: 0.2", *(f"{a} {b}" for a, b in vocabulary.merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary.ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    return folder


def write_clip_merges(folder: Path, vocabulary: Vocabulary) -> Path:
    """As CLIP's bpe_simple_vocab_16e6.txt.gz."""
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(f"{a} {b}" for a, b in vocabulary.merges)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return path
