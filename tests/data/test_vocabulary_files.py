"""data.vocabulary: files of every form, and published names found on this machine only."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from made_vocabularies import learned, write_clip_merges, write_pair, write_words

from elip_ds.data import Vocabulary
from elip_ds.data.vocabulary import KINDS, SPECIALS
from elip_ds.data.vocabulary_files import PUBLISHED, load_vocabulary
from elip_ds.errors import UserError


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of Hugging Face's, whatever the machine has."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def load(path: Path | str, kind: str, root: str = "no-such-folder") -> Vocabulary:
    return load_vocabulary(str(path), kind, Path(root))


def error_of(path: Path | str, kind: str, root: Path = Path("no-such-folder")) -> str:
    with pytest.raises(UserError) as caught:
        load_vocabulary(str(path), kind, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files


@pytest.mark.parametrize("kind", ["albef", "bert", "blip"])
def test_a_word_list(kind: str, tmp_path: Path) -> None:
    path = write_words(tmp_path, learned(kind))
    assert load(path, kind) == load(tmp_path, kind) == learned(kind)


def test_bert_s_word_list_gets_blip_s_two_tokens(tmp_path: Path) -> None:
    words = learned("bert").words
    path = write_words(tmp_path, learned("bert"))
    assert load(path, "blip").words == (*words, "[DEC]", "[ENC]")


def test_a_line_of_a_word_list_is_an_entry(tmp_path: Path) -> None:
    words = (*SPECIALS, "\u2028", "\x85", "dog")  # splitlines() would split there
    path = write_words(tmp_path, Vocabulary.of_words(words))
    assert load(path, "albef").words == words


@pytest.mark.parametrize("kind", ["roberta", "clip"])
def test_a_pair_of_entries_and_merges(kind: str, tmp_path: Path) -> None:
    folder = write_pair(tmp_path, learned(kind))
    for path in (folder, folder / "vocab.json", folder / "merges.txt"):
        assert load(path, kind) == learned(kind)


def test_clip_s_merges(tmp_path: Path) -> None:
    path = write_clip_merges(tmp_path, learned("clip"))
    assert load(path, "clip") == load(tmp_path, "clip") == learned("clip")


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_run_keeps(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(learned(kind).json)
    assert load(path, kind) == load(tmp_path, kind) == learned(kind)


def test_a_tokenizer_of_hugging_face(tmp_path: Path) -> None:
    """It may keep special tokens apart, name CLIP's otherwise, and write a merge as one text."""
    tree = json.loads(learned("clip").json)
    start, end = (tree["model"]["vocab"].pop(f"<{name}_of_text>") for name in ("start", "end"))
    tree["added_tokens"] = [
        {"id": start, "content": "<|startoftext|>"}, {"id": end, "content": "<|endoftext|>"}
    ]  # fmt: skip
    tree["model"]["merges"] = [f"{a} {b}" for a, b in tree["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert load(tmp_path, "clip") == learned("clip")


@pytest.mark.parametrize(
    ("made", "kind", "reason"),
    [
        ("albef", "clip", "it is a WordPiece vocabulary; set data.tokenizer to its kind"),
        ("albef", "roberta", "it is a WordPiece vocabulary"),
        ("clip", "albef", "it is a BPE vocabulary as CLIP's"),
        ("clip", "roberta", "it is a BPE vocabulary as CLIP's"),
        ("roberta", "clip", "it is a byte-level BPE vocabulary as RoBERTa's"),
        ("roberta", "bert", "it is a byte-level BPE vocabulary as RoBERTa's"),
        ("blip", "bert", "it has BLIP's entry [ENC]; set data.tokenizer=blip"),
    ],
)
def test_a_vocabulary_of_another_kind(made: str, kind: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(learned(made).json)
    files = [path]
    if learned(made).merges:
        files += [write_pair(tmp_path, learned(made)) / "vocab.json"]
    else:
        files += [write_words(tmp_path, learned(made))]
    for file in files:
        assert error_of(file, kind).startswith(f"data.vocabulary={file}: {reason}")


def test_an_error_says_what_would_work(tmp_path: Path) -> None:
    assert error_of("no/vocab.txt", "albef") == (
        "data.vocabulary=no/vocab.txt: No such file or directory; data.tokenizer=albef takes "
        "vocab.txt or tokenizer.json, the name bert-base-uncased, or 'auto' to learn one from the "
        "training captions"
    )
    line = error_of(tmp_path, "clip")
    assert line.startswith(
        f"data.vocabulary={tmp_path}: there is no vocabulary file in this folder"
    )
    assert "bpe_simple_vocab_16e6.txt.gz" in line and "the name clip" in line


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("vocab.txt", b"", "albef"),
        ("vocab.txt", b"\xff\xfe", "albef"),
        ("vocab.txt", b"[PAD]\n[UNK]", "bert"),
        ("tokenizer.json", b"", "clip"),
        ("tokenizer.json", b"[1]", "clip"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": []}}', "roberta"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}, "added_tokens": []}', "roberta"),
        ("vocab.json", b"{}", "roberta"),  # merges.txt is missing
        ("merges.txt", b"a b c", "roberta"),
        ("x.txt.gz", b"no gzip", "clip"),
        ("x.txt.gz", gzip.compress(b"#version\na b", mtime=0)[:-4], "clip"),
        ("x.txt.gz", gzip.compress(b"#version\na b c", mtime=0), "clip"),
        ("x.txt.gz", gzip.compress(b"#version\nab c", mtime=0), "clip"),
    ],
)
def test_a_broken_file(name: str, data: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    if name == "merges.txt":
        (tmp_path / "vocab.json").write_text("{}")
    assert error_of(path, kind).startswith(f"data.vocabulary={path}: ")


# Published ones


def fake_bert(folder: Path, size: int = 30522) -> Path:
    folder.mkdir(parents=True)
    words = [*SPECIALS, *(f"w{i}" for i in range(size - len(SPECIALS)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def test_a_published_name_is_looked_up_in_the_data_folder(tmp_path: Path) -> None:
    fake_bert(tmp_path / "vocabularies" / "bert-base-uncased")
    for kind, size in {"albef": 30522, "bert": 30522, "blip": 30524}.items():
        vocabulary = load_vocabulary("bert-base-uncased", kind, tmp_path)
        assert (vocabulary.kind, len(vocabulary)) == (kind, size)
    assert vocabulary.special_ids["[DEC]"] == 30522
    assert vocabulary.special_ids["[ENC]"] == 30523


@pytest.mark.parametrize("where", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize("repo", ["bert-base-uncased", "google-bert--bert-base-uncased"])
def test_a_published_name_is_looked_up_in_hugging_face_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, repo: str
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(where, str(tmp_path))
    under = {"HF_HOME": "hub", "HF_HUB_CACHE": ".", "XDG_CACHE_HOME": "huggingface/hub"}
    cache = tmp_path / under.get(where, ".cache/huggingface/hub")
    (cache / f"models--{repo}" / "snapshots" / "000").mkdir(parents=True)  # another file of it
    fake_bert(cache / f"models--{repo}" / "snapshots" / "86b5e0934494bd15c9632b12f734a8a67f723594")
    assert len(load("bert-base-uncased", "bert")) == 30522


def test_roberta_in_hugging_face_s_cache(no_cache: Path) -> None:
    folder = no_cache / "models--FacebookAI--roberta-base" / "snapshots" / "e2da8e2f"
    folder.mkdir(parents=True)
    write_pair(folder, learned("roberta"))
    assert error_of("roberta-base", "roberta") == (
        f"data.vocabulary=roberta-base: {folder}/vocab.json has {len(learned('roberta'))} entries, "
        "the published one 50265; replace the file, or give it as data.vocabulary=PATH"
    )


def test_clip_comes_with_open_clip(tmp_path: Path) -> None:
    vocabulary = load("clip", "clip")
    assert len(vocabulary) == 49408
    assert vocabulary.special_ids == {"[PAD]": 0, "[CLS]": 49406, "[SEP]": 49407}
    assert vocabulary.ids["a</w>"] == 320 and vocabulary.ids["dog</w>"] == 1929
    write_pair(tmp_path, vocabulary)
    assert load(tmp_path, "clip") == vocabulary


def test_the_data_folder_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "vocabularies" / "clip"
    folder.mkdir(parents=True)
    path = write_clip_merges(folder, learned("clip"))
    line = error_of("clip", "clip", tmp_path)
    assert line.startswith(f"data.vocabulary=clip: {path} has {len(learned('clip'))} entries")
    shutil.rmtree(folder)
    assert len(load_vocabulary("clip", "clip", tmp_path)) == 49408


def test_a_published_vocabulary_that_is_not_here(tmp_path: Path, no_cache: Path) -> None:
    assert error_of("bert-base-uncased", "albef", tmp_path) == (
        f"data.vocabulary=bert-base-uncased is not on this machine, neither in {tmp_path}/"
        f"vocabularies/bert-base-uncased nor in {no_cache}; place vocab.txt in the first, or run: "
        "huggingface-cli download google-bert/bert-base-uncased vocab.txt"
    )
    assert error_of("roberta-base", "roberta", tmp_path).endswith(
        "place vocab.json and merges.txt in the first, or run: huggingface-cli download "
        "FacebookAI/roberta-base vocab.json merges.txt"
    )


def test_the_package_is_named_where_it_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = PUBLISHED["clip"]._replace(package="no_such_package")
    monkeypatch.setitem(PUBLISHED, "clip", published)
    assert ", package no_such_package; place" in error_of("clip", "clip", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "advice"),
    [
        ("roberta-base", "albef", "data.vocabulary=bert-base-uncased, or data.tokenizer=roberta"),
        ("clip", "roberta", "data.vocabulary=roberta-base, or data.tokenizer=clip"),
        (
            "bert-base-uncased",
            "clip",
            "data.vocabulary=clip, or data.tokenizer=albef or bert or blip",
        ),
    ],
)
def test_a_published_vocabulary_of_another_kind(name: str, kind: str, advice: str) -> None:
    line = f"data.vocabulary={name} is not for data.tokenizer={kind}; set {advice}"
    assert error_of(name, kind) == line
