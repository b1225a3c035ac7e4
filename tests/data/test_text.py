"""Captions in, token ids out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import elip_ds.data.text
from elip_ds.data import Vocabulary, read_vocabulary
from elip_ds.data.text import SPECIALS, CaptionTokenizer, clean_caption, learn_vocabulary
from elip_ds.errors import UserError

CAPTIONS = [
    "A large red circle above a small blue square.",
    "Two dogs: one black, one white - on the grass/lawn!",
    "<person> rides a bike; a dog runs",
    "Café in Zürich, 1940",
]


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Dog", "a dog"),
        ("a, b. c' d! e? f\" g( h) i* j# k: l; m~", "a b c d e f g h i j k l m"),
        ("it's", "its"),
        ("black-and-white and/or", "black and white and or"),
        ("<person> and <PERSON>", "person and person"),
        ("a  b   c", "a b c"),
        ("  a dog \n", "a dog"),
        ("a [b] {c} & d_e", "a [b] {c} & d_e"),
        ("", ""),
        ("...", ""),
        (" ".join(str(i) for i in range(40)), " ".join(str(i) for i in range(30))),
    ],
)
def test_a_caption_is_cleaned_as_albef_does(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_cleaning_twice_changes_nothing(caption: str) -> None:
    once = clean_caption(caption)
    if "<person>" not in once:  # '<<person>>' leaves one
        assert clean_caption(once) == once
    assert len(once.split()) <= 30


@pytest.fixture(scope="module")
def learned() -> Vocabulary:
    return learn_vocabulary(CAPTIONS, 200)


def test_the_class_token_comes_first_and_no_separator_last(learned: Vocabulary) -> None:
    ids = CaptionTokenizer(learned, 25)(CAPTIONS[0])
    words = [learned.words[i] for i in ids if i != learned.ids["[PAD]"]]
    assert words[0] == "[CLS]"
    assert "[SEP]" not in words
    assert "".join(words[1:]).replace("##", "") == clean_caption(CAPTIONS[0]).replace(" ", "")


def test_captions_are_padded_and_cut_to_one_length(learned: Vocabulary) -> None:
    tokenizer = CaptionTokenizer(learned, 8)
    short, long = tokenizer("a dog"), tokenizer(" ".join(["dog"] * 20))
    assert short.shape == long.shape == (8,)
    assert short.dtype == np.int64
    assert list(tokenizer.attention_mask(long)) == [1] * 8
    mask = tokenizer.attention_mask(np.stack([short, long]))
    used = mask[0].sum()
    assert list(mask[0]) == [1] * used + [0] * (8 - used)
    assert (short[used:] == learned.special_ids["[PAD]"]).all()
    whole = CaptionTokenizer(learned, 40)(" ".join(["dog"] * 20))
    assert (whole[:8] == long).all()


def test_an_empty_caption_is_the_class_token_alone(learned: Vocabulary) -> None:
    ids = CaptionTokenizer(learned, 4)("...")
    assert [learned.words[i] for i in ids] == ["[CLS]", "[PAD]", "[PAD]", "[PAD]"]


@pytest.mark.parametrize("special", SPECIALS)
def test_a_caption_cannot_name_a_special_token(learned: Vocabulary, special: str) -> None:
    ids = CaptionTokenizer(learned, 12)(special)
    used = [i for i in ids[1:] if i != learned.ids["[PAD]"]]
    assert not set(used) & {learned.ids[s] for s in SPECIALS if s != "[UNK]"}


def test_special_tokens_have_the_first_ids(learned: Vocabulary) -> None:
    assert learned.words[:5] == SPECIALS
    assert learned.special_ids == {special: i for i, special in enumerate(SPECIALS)}


@pytest.mark.parametrize("size", [5, 6, 12, 30, 60, 200])
def test_a_vocabulary_keeps_to_its_size(size: int) -> None:
    vocabulary = learn_vocabulary(CAPTIONS, size)
    assert len(vocabulary) <= size
    assert len(set(vocabulary.words)) == len(vocabulary)
    CaptionTokenizer(vocabulary, 25)(CAPTIONS[1])


def test_frequent_words_become_entries() -> None:
    vocabulary = learn_vocabulary(["a zebra, a Zebra!"] * 5, 50)
    assert "zebra" in vocabulary.ids
    assert "Zebra" not in vocabulary.ids and "," not in vocabulary.ids


def test_the_order_of_captions_does_not_matter(learned: Vocabulary) -> None:
    assert learn_vocabulary(CAPTIONS[::-1], 200) == learned


def test_every_process_learns_the_same_vocabulary(learned: Vocabulary) -> None:
    program = (
        "import runpy\n"
        f"text = runpy.run_path({elip_ds.data.text.__file__!r})\n"  # without the room: no torch
        f"print('\\n'.join(text['learn_vocabulary']({CAPTIONS!r}, 200).words))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert tuple(printed.stdout.splitlines()) == learned.words


def test_a_vocabulary_file_reads_back_equal(learned: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(learned.words) + "\n")
    assert read_vocabulary(path) == learned


def test_an_entry_s_place_is_its_id_as_in_bert(tmp_path: Path) -> None:
    # bert-base-uncased: [PAD] 0, [unused0..98] 1..99, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["\u2028", "\x85", "dog", "##s"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    vocabulary = read_vocabulary(path)
    assert vocabulary.special_ids == {
        "[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103
    }  # fmt: skip
    ids = CaptionTokenizer(vocabulary, 6)("Dogs xyz")
    assert list(ids) == [101, 106, 107, 100, 0, 0]


def test_a_vocabulary_without_a_special_token(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(SPECIALS[:-1]))
    with pytest.raises(UserError, match=r"vocab.txt: the entry \[MASK\] is missing"):
        read_vocabulary(path)


def test_a_vocabulary_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.txt: No such file.*give a WordPiece vocab.txt"):
        read_vocabulary(tmp_path / "none.txt")
