"""Captions in, token ids out: against the code that the models were published with."""

import importlib.util
import os
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_vocabularies import CAPTIONS, learned, write_clip_merges, write_pair, write_words

from elip_ds.data import Vocabulary
from elip_ds.data.text import CaptionTokenizer
from elip_ds.data.vocabulary import BYTES, KINDS, SPECIALS
from elip_ds.data.vocabulary_files import load_vocabulary

every_kind = pytest.mark.parametrize("kind", KINDS)
many = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

OLD = unicodedata.ucd_3_2_0
"What every library classes alike: characters that Unicode has had since 2002."
CHARACTERS = [
    chr(i)
    for i in range(sys.maxunicode + 1)
    if OLD.category(chr(i)) not in ("Cn", "Cs", "Co") and i != 0x345
]
PIECES = (
    *CAPTIONS,
    *("dog", " ", "  ", "\n", "'s", "'LL", "DON'T", "&amp;", "&lt;b&gt;", "&amp;quot;", "a-b/c"),
    *("\u00e9", "e\u0301", "\ufb01", "\u2019s", "\u00c3\u00a9", "1940", "\u4e2d\u6587", "!!!"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "[PAD]", "#hash"),
)
TEXTS = st.lists(
    st.sampled_from(PIECES) | st.sampled_from(CHARACTERS) | st.characters(max_codepoint=127)
).map("".join)


def spelled(vocabulary: Vocabulary, caption: str, length: int = 25) -> list[str]:
    """The entries of a caption, padding left out."""
    tokenizer = CaptionTokenizer(vocabulary, length)
    ids = tokenizer(caption)
    return [vocabulary.words[i] for i in ids[tokenizer.attention_mask(ids) == 1]]


# What holds for every kind


@every_kind
@many
@given(caption=TEXTS, length=st.integers(2, 40))
def test_a_caption_becomes_ids_of_one_length(kind: str, caption: str, length: int) -> None:
    vocabulary = learned(kind)
    tokenizer = CaptionTokenizer(vocabulary, length)
    ids = tokenizer(caption)
    assert ids.shape == (length,) and ids.dtype == np.int64
    assert ids.min() >= 0 and ids.max() < len(vocabulary)
    mask = tokenizer.attention_mask(ids)
    used = int(mask.sum())
    assert list(mask) == [1] * used + [0] * (length - used)
    special = vocabulary.special_ids
    assert (ids[used:] == special["[PAD]"]).all()
    assert ids[0] == special["[CLS]"]
    inner = ids[1:used] if kind == "albef" else ids[1 : used - 1]
    assert kind == "albef" or ids[used - 1] == special["[SEP]"]
    hidden = {i for name, i in special.items() if name != "[UNK]"} - (
        {special["[PAD]"]} if kind == "clip" else set()
    )
    assert not hidden & set(inner.tolist())


@every_kind
@many
@given(caption=TEXTS, length=st.integers(2, 40))
def test_a_long_caption_loses_its_end_alone(kind: str, caption: str, length: int) -> None:
    vocabulary = learned(kind)
    whole = CaptionTokenizer(vocabulary, 1500)
    ids = whole(caption)
    tokens = list(ids[whole.attention_mask(ids) == 1])
    if len(tokens) > length:
        tokens = tokens[:length] if kind == "albef" else [*tokens[: length - 1], tokens[-1]]
    padding = [vocabulary.special_ids["[PAD]"]] * (length - len(tokens))
    assert list(CaptionTokenizer(vocabulary, length)(caption)) == tokens + padding


@every_kind
def test_a_mask_of_many_is_a_mask_of_each(kind: str) -> None:
    tokenizer = CaptionTokenizer(learned(kind), 12)
    ids = np.stack([tokenizer(caption) for caption in CAPTIONS])
    masks = [tokenizer.attention_mask(row) for row in ids]
    assert (tokenizer.attention_mask(ids) == np.stack(masks)).all()
    assert tokenizer.attention_mask(ids).dtype == np.int64


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("albef", ["[CLS]"]),
        ("bert", ["[CLS]", "[SEP]"]),
        ("blip", ["[CLS]", "[SEP]"]),
        ("roberta", ["<s>", "</s>"]),
        ("clip", ["<start_of_text>", "<end_of_text>"]),
    ],
)
def test_an_empty_caption_is_its_special_tokens(kind: str, tokens: list[str]) -> None:
    assert spelled(learned(kind), "") == tokens


@every_kind
def test_a_caption_cannot_name_a_special_token(kind: str) -> None:
    vocabulary = learned(kind)
    names = [*KINDS[kind].specials, *KINDS[kind].specials.values()]
    hidden = {entry for entry in KINDS[kind].specials.values() if entry not in ("[UNK]", "!")}
    for name in names:
        assert not set(spelled(vocabulary, f"a {name} dog {name}")[1:-1]) & hidden


# One by one


def test_albef_puts_no_token_behind_a_caption() -> None:
    words = spelled(learned("albef"), CAPTIONS[0])
    assert words[0] == "[CLS]" and "[SEP]" not in words
    cleaned = KINDS["albef"].clean(CAPTIONS[0])
    assert "".join(words[1:]).replace("##", "") == cleaned.replace(" ", "")


def test_an_entry_s_place_is_its_id_as_in_bert() -> None:
    # bert-base-uncased: [PAD] 0, [unused0..98] 1..99, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["dog", "##s", "'"]
    for kind, ids in {
        "albef": [101, 104, 105, 100, 0, 0],
        "bert": [101, 106, 104, 105, 100, 102],
        "blip": [101, 106, 104, 105, 100, 102],
    }.items():
        vocabulary = Vocabulary.of_words(words, kind)
        assert list(CaptionTokenizer(vocabulary, 6)("'Dogs xyz")) == ids
    assert vocabulary.special_ids["[DEC]"] == 107 and vocabulary.special_ids["[ENC]"] == 108


def test_clip_s_padding_is_a_word_too() -> None:
    vocabulary = Vocabulary.of_merges([], "clip")
    tokenizer = CaptionTokenizer(vocabulary, 8)
    ids = tokenizer("!!!")
    assert list(ids) == [512, 0, 0, 256, 513, 0, 0, 0]
    assert list(tokenizer.attention_mask(ids)) == [1, 1, 1, 1, 1, 0, 0, 0]


# Against published code


def padded(ids: list[int], end: int, pad: int, length: int) -> list[int]:
    cut = ids if len(ids) <= length else [*ids[: length - 1], end]
    return cut + [pad] * (length - len(cut))


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one in plain Python."""
    try:
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy as Bert
    except ImportError:
        from transformers import BertTokenizer as Bert
    return Bert(str(write_words(tmp_path_factory.mktemp("bert"), learned("bert"))))


@many
@given(caption=TEXTS, length=st.sampled_from([8, 25, 50]))
def test_meter_s_captions_become_bert_s_ids(bert_tokenizer: Any, caption: str, length: int) -> None:
    if any(special in caption for special in SPECIALS):
        return  # to transformers these are the special tokens
    theirs = padded(bert_tokenizer(caption)["input_ids"], 3, 0, length)
    assert list(CaptionTokenizer(learned("bert"), length)(caption)) == theirs


@pytest.fixture(scope="module")
def blip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As BLIP's init_tokenizer makes it."""
    from transformers import BertTokenizer

    words = [word for word in learned("blip").words if word not in ("[DEC]", "[ENC]")]
    path = write_words(tmp_path_factory.mktemp("blip"), Vocabulary.of_words(words, "bert"))
    fast = importlib.util.find_spec("transformers.models.bert.tokenization_bert_legacy")
    vocab = {word: i for i, word in enumerate(words)} if fast else str(path)
    tokenizer = BertTokenizer(vocab)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def blip_s_pre_caption(caption: str, max_words: int = 30) -> str:
    caption = regex.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = regex.sub(r"\s{2,}", " ", caption)
    words = caption.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])


@many
@given(caption=TEXTS)
def test_blip_s_captions_become_blip_s_ids(blip_tokenizer: Any, caption: str) -> None:
    caption = " ".join(caption.split())  # to BLIP a lone tab parts no words
    if any(special.lower() in caption.lower() for special in (*SPECIALS, "[DEC]", "[ENC]")):
        return
    theirs = blip_tokenizer(blip_s_pre_caption(caption))["input_ids"]
    assert list(CaptionTokenizer(learned("blip"), 30)(caption)) == padded(theirs, 3, 0, 30)


def test_blip_s_two_tokens_have_blip_s_ids(blip_tokenizer: Any) -> None:
    for name in ("[DEC]", "[ENC]"):
        theirs = blip_tokenizer.convert_tokens_to_ids(name)
        assert learned("blip").special_ids[name] == theirs


@pytest.fixture(scope="module")
def roberta_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import RobertaTokenizer

    folder = write_pair(tmp_path_factory.mktemp("roberta"), learned("roberta"))
    return RobertaTokenizer.from_pretrained(str(folder), local_files_only=True)


@many
@given(caption=TEXTS, length=st.sampled_from([8, 25, 50]))
@example(caption="  two  spaces ", length=25)
def test_meter_s_captions_become_roberta_s_ids(
    roberta_tokenizer: Any, caption: str, length: int
) -> None:
    if any(special in caption for special in KINDS["roberta"].specials.values()):
        return
    theirs = roberta_tokenizer(caption)["input_ids"]
    assert list(CaptionTokenizer(learned("roberta"), length)(caption)) == padded(
        theirs, 2, 1, length
    )


GPT2_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def plain_bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Joins the pair of lowest rank, leftmost first, until none has one."""
    characters = sorted({*range(33, 127), *range(161, 173), *range(174, 256)})
    named = {byte: chr(byte) for byte in characters}
    for byte in sorted({*range(256)} - {*characters}):
        named[byte] = chr(256 + len(named) - len(characters))
    parts = [named[byte] for byte in word.encode()]
    while len(parts) > 1:
        rank, at = min((ranks.get((a, b), 10**9), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == 10**9:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@many
@given(caption=TEXTS)
def test_roberta_s_ids_are_those_of_plain_byte_pair_encoding(caption: str) -> None:
    vocabulary = learned("roberta")
    ranks = {pair: i for i, pair in enumerate(vocabulary.merges)}
    parts = [part for word in GPT2_WORDS.findall(caption) for part in plain_bpe(word, ranks)]
    assert spelled(vocabulary, caption, 5000) == ["<s>", *parts, "</s>"]


@cache
def open_clip_module() -> Any:
    """open_clip's tokenizer.py by itself: the package loads all its models."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    spec.loader.exec_module(module)
    if before is None:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
    return module


@pytest.fixture(scope="module")
def open_clip_ids() -> Callable[[str], list[int]]:
    theirs = open_clip_module().SimpleTokenizer()
    return lambda caption: theirs([caption])[0].tolist()


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CaptionTokenizer:
    """With the published vocabulary, which open_clip brings along."""
    return CaptionTokenizer(load_vocabulary("clip", "clip", tmp_path_factory.mktemp("none")), 77)


@settings(many, max_examples=300)
@given(caption=TEXTS)
@example(caption="a photo of a cat. " * 30)
@example(caption="x" * 500)
@example(caption="&amp;lt;br&amp;gt; isn\u00e2\u0080\u0099t it? IT'S")
@example(caption="a man's '90s DON'T'LL \u017fs '\u017f 1\u00bd2 \u0130stanbul \ufb01sh")
@example(
    caption="\U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f1e9\U0001f1ea \u4e2d\u6587"
)
def test_clip_s_captions_become_open_clip_s_ids(
    clip_tokenizer: CaptionTokenizer, open_clip_ids: Callable[[str], list[int]], caption: str
) -> None:
    assert clip_tokenizer(caption).tolist() == open_clip_ids(caption)


@pytest.mark.slow
def test_every_character_has_open_clip_s_ids(
    clip_tokenizer: CaptionTokenizer, open_clip_ids: Callable[[str], list[int]]
) -> None:
    for i in range(0, len(CHARACTERS), 8):
        # As a word, inside one, and behind an apostrophe.
        caption = " ".join(f"{c} a{c}a '{c}" for c in CHARACTERS[i : i + 8])
        assert clip_tokenizer(caption).tolist() == open_clip_ids(caption)


def test_a_learned_vocabulary_is_numbered_as_open_clip_numbers_it(tmp_path: Path) -> None:
    vocabulary = learned("clip")
    path = write_clip_merges(tmp_path, vocabulary)
    theirs = open_clip_module().SimpleTokenizer(bpe_path=str(path))
    assert theirs.encoder == vocabulary.ids
    for caption in CAPTIONS:
        assert CaptionTokenizer(vocabulary, 77)(caption).tolist() == theirs([caption])[0].tolist()


def test_bytes_are_numbered_as_open_clip_numbers_them() -> None:
    assert list(BYTES) == list(open_clip_module().bytes_to_unicode().values())
