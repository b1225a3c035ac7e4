"""Vocabularies of every kind: what they must have, what the run keeps of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_vocabulary
from made_vocabularies import learned
from tokenizers import Tokenizer

from elip_ds.config.schema import TOKENIZERS
from elip_ds.data import Vocabulary, read_vocabulary
from elip_ds.data.vocabulary import KINDS, SPECIALS
from elip_ds.errors import UserError

every_kind = pytest.mark.parametrize("kind", KINDS)


def test_the_configuration_knows_every_kind() -> None:
    assert tuple(KINDS) == TOKENIZERS


@every_kind
def test_what_a_run_keeps_reads_back_equal(kind: str, tmp_path: Path) -> None:
    for vocabulary in (learned(kind), tiny_vocabulary(kind)):
        path = tmp_path / "tokenizer.json"
        path.write_text(vocabulary.json)
        again = read_vocabulary(path)
        assert again == vocabulary
        assert (again.kind, len(again), again.json) == (kind, len(vocabulary), vocabulary.json)


@every_kind
def test_what_a_run_keeps_is_a_whole_tokenizer(kind: str) -> None:
    vocabulary = learned(kind)
    tokenizer = Tokenizer.from_str(vocabulary.json)
    ids = tokenizer.encode("two dogs").ids
    assert ids == vocabulary.build_tokenizer().encode("two dogs").ids
    assert ids[0] == vocabulary.special_ids["[CLS]"]
    text = tokenizer.decode([i for i in ids if i not in vocabulary.special_ids.values()])
    assert text.strip() == "two dogs"


@every_kind
def test_equal_means_equal_in_kind_entries_and_merges(kind: str) -> None:
    vocabulary = learned(kind)
    assert vocabulary == replace(vocabulary, ids=dict(vocabulary.ids))
    if vocabulary.merges:
        assert vocabulary != replace(vocabulary, merges=vocabulary.merges[:-1])
    else:
        words = (*SPECIALS, "dog", "cat")
        vocabulary = Vocabulary.of_words(words, kind)
        assert vocabulary != Vocabulary.of_words(words, "bert" if kind == "albef" else "albef")
        assert vocabulary != Vocabulary.of_words((*SPECIALS, "cat", "dog"), kind)


@every_kind
def test_special_tokens_go_by_bert_s_names(kind: str) -> None:
    vocabulary = learned(kind)
    names = {"clip": ("[PAD]", "[CLS]", "[SEP]"), "blip": (*SPECIALS, "[DEC]", "[ENC]")}
    special_ids = vocabulary.special_ids
    assert tuple(special_ids) == names.get(kind, SPECIALS)
    entries = {name: vocabulary.words[i] for name, i in special_ids.items()}
    if kind == "roberta":
        assert list(entries.values()) == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
        assert [special_ids[name] for name in ("[CLS]", "[PAD]", "[SEP]", "[UNK]")] == [0, 1, 2, 3]
    elif kind == "clip":
        assert special_ids["[PAD]"] == 0
        assert (entries["[CLS]"], entries["[SEP]"]) == ("<start_of_text>", "<end_of_text>")
        assert special_ids["[SEP]"] == special_ids["[CLS]"] + 1 == len(vocabulary) - 1
    else:
        assert all(name == entry for name, entry in entries.items())
        assert [special_ids[name] for name in SPECIALS] == [0, 1, 2, 3, 4]


def test_blip_s_two_tokens_come_last() -> None:
    vocabulary = Vocabulary.of_words((*SPECIALS, "dog"), "blip")
    assert vocabulary.words == (*SPECIALS, "dog", "[DEC]", "[ENC]")
    assert Vocabulary.of_words(vocabulary.words, "blip") == vocabulary
    with pytest.raises(UserError, match=r"BLIP's entry \[ENC\]; set data.tokenizer=blip"):
        Vocabulary.of_words(vocabulary.words, "bert")


@every_kind
def test_the_tiny_vocabulary_is_tiny(kind: str) -> None:
    size = {"roberta": 261, "clip": 514}.get(kind, 64)
    assert len(tiny_vocabulary(kind)) == size
    assert KINDS[kind].min_entries <= size


@pytest.mark.parametrize("missing", SPECIALS)
def test_a_word_list_without_a_special_token(missing: str) -> None:
    with pytest.raises(UserError, match=rf"^the entry \{missing} is missing$"):
        Vocabulary.of_words([special for special in SPECIALS if special != missing])


@pytest.mark.parametrize("kind", ["roberta", "clip"])
def test_a_byte_level_vocabulary_needs_every_byte(kind: str) -> None:
    vocabulary = tiny_vocabulary(kind)
    swapped = {"new" if entry == "~" else entry: i for entry, i in vocabulary.ids.items()}
    with pytest.raises(UserError, match=r"^the entry ~ is missing$"):
        replace(vocabulary, ids=swapped)
    with pytest.raises(UserError, match=r"^the entry ab is missing$"):
        replace(vocabulary, merges=(("a", "b"),))


@pytest.mark.parametrize("kind", ["blip", "bert"])
def test_no_entry_may_be_there_twice(kind: str) -> None:
    for words in (("dog", *SPECIALS, "dog"), (*SPECIALS, "a", "dog", "dog")):
        with pytest.raises(UserError, match="one may be there twice"):
            Vocabulary.of_words(words, kind)


def test_clip_s_end_must_have_the_highest_id() -> None:
    vocabulary = tiny_vocabulary("clip")
    ids = vocabulary.ids | {"<end_of_text>": 512, "<start_of_text>": 513}
    with pytest.raises(UserError, match="<end_of_text> must be the last one"):
        replace(vocabulary, ids=ids)
    ids = vocabulary.ids | {"!": 1, '"': 0}
    with pytest.raises(UserError, match="the entry ! must be the first one"):
        replace(vocabulary, ids=ids)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no tokenizer.json of a run: Expecting value"),
        ("[PAD]\n[UNK]", "it is no tokenizer.json of a run: "),
        ("{}", "it is no tokenizer.json of a run: 'model'"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "a model of type Unigram"),
    ],
)
def test_a_file_that_no_run_keeps(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_vocabulary(path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)


def test_a_tokenizer_of_no_kind(tmp_path: Path) -> None:
    tree = json.loads(learned("bert").json)
    tree["post_processor"]["single"] = tree["post_processor"]["single"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"no kind puts \$A \[SEP\]"):
        read_vocabulary(tmp_path / "tokenizer.json")


def test_a_kept_vocabulary_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file or directory$"):
        read_vocabulary(tmp_path / "tokenizer.json")
