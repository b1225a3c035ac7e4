"""Vocabularies learned from captions."""

import hashlib
import os
import random
import subprocess
import sys

import pytest
from made_vocabularies import CAPTIONS, SIZES, learned

from elip_ds.data.learn import check_size, learn_vocabulary
from elip_ds.data.text import CaptionTokenizer
from elip_ds.data.vocabulary import KINDS, SPECIALS
from elip_ds.errors import UserError

every_kind = pytest.mark.parametrize("kind", KINDS)


def many_ties() -> list[str]:
    """Captions in which very many pairs of characters are equally frequent."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz\u00e9\u00fc\u03b1\u4e2d"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(600)]
    return [" ".join(words[i : i + 6]) for i in range(0, len(words), 6)]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("albef", [5, 6, 12, 30, 60, 200]),
        ("bert", [5, 6, 12, 30, 60, 200]),
        ("blip", [7, 8, 12, 30, 60, 200]),
        ("roberta", [261, 262, 300, 400]),
        ("clip", [514, 515, 550, 650]),
    ],
)
def test_a_vocabulary_keeps_to_its_size(kind: str, sizes: list[int]) -> None:
    assert KINDS[kind].min_entries == sizes[0]
    lengths = []
    for size in sizes:
        vocabulary = learn_vocabulary(CAPTIONS, size, kind)
        lengths.append(len(vocabulary))
        assert len(vocabulary) <= size
        CaptionTokenizer(vocabulary, 25)(CAPTIONS[1])
    assert lengths == sorted(lengths) and lengths[-1] > lengths[0]


@pytest.mark.parametrize(("kind", "least"), [("clip", 514), ("roberta", 261), ("blip", 7)])
def test_a_vocabulary_that_cannot_be_so_small(kind: str, least: int) -> None:
    line = f"^model.text.vocab_size={least - 1}: .* data.tokenizer={kind} has {least} entries"
    with pytest.raises(UserError, match=line):
        learn_vocabulary(CAPTIONS, least - 1, kind)
    check_size(least, kind)


@every_kind
def test_frequent_words_become_entries(kind: str) -> None:
    room = KINDS[kind].min_entries + 45
    vocabulary = learn_vocabulary(["a zebra, a Zebra!"] * 5, room, kind)
    whole = {"clip": "zebra</w>", "roberta": "\u0120zebra"}.get(kind, "zebra")
    assert whole in vocabulary.ids
    assert ("Zebra" in " ".join(vocabulary.ids)) == (kind == "roberta")
    assert ("," in vocabulary.ids) == (kind != "albef")


def test_special_tokens_have_the_first_ids() -> None:
    assert learned("albef").words[:5] == SPECIALS
    assert learned("blip").words[:5] == SPECIALS
    assert learned("blip").words[-2:] == ("[DEC]", "[ENC]")


@every_kind
def test_no_captions_teach_the_least(kind: str) -> None:
    assert len(learn_vocabulary([], 1000, kind)) == KINDS[kind].min_entries
    assert len(learn_vocabulary(["", " "], 1000, kind)) == KINDS[kind].min_entries


@every_kind
def test_the_order_of_captions_does_not_matter(kind: str) -> None:
    assert learn_vocabulary(CAPTIONS[::-1], SIZES[kind], kind) == learned(kind)
    captions = many_ties()
    size = KINDS[kind].min_entries + 300
    first = learn_vocabulary(captions, size, kind)
    assert len(first) == size
    for seed in range(3):
        random.Random(seed).shuffle(captions)
        assert learn_vocabulary(captions, size, kind) == first


@pytest.mark.slow
def test_every_process_learns_the_same_vocabularies() -> None:
    # Hash tables are seeded anew in each, and shared out otherwise to other numbers of threads.
    program = (
        "import hashlib\n"
        "from elip_ds.data.learn import learn_vocabulary\n"
        "from elip_ds.data.vocabulary import KINDS\n"
        "from test_learn import many_ties\n"
        "for kind in KINDS:\n"
        "    size = KINDS[kind].min_entries + 300\n"
        "    text = learn_vocabulary(many_ties(), size, kind).json\n"
        "    print(kind, hashlib.sha256(text.encode()).hexdigest())\n"
    )
    here = {}
    for kind in KINDS:
        text = learn_vocabulary(many_ties(), KINDS[kind].min_entries + 300, kind).json
        here[kind] = hashlib.sha256(text.encode()).hexdigest()
    folder = os.path.dirname(__file__)
    for threads in ("1", "3"):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([folder, os.path.dirname(folder)]),
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true",
        }
        printed = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert dict(line.split() for line in printed.stdout.splitlines()) == here
