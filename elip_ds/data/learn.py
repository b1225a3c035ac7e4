"""A vocabulary learned from captions. The same captions give the same one, in any order.

The trainers of the tokenizers library alone do not see to that. They settle ties between pairs by
the entries' numbers, and number whatever they meet beyond single characters, WordPiece's ##x and
CLIP's x</w>, as a hash table yields it. So these are handed to them in order, as if they were
special tokens. Entries numbered beforehand or by merging are numbered alike in every process.
"""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, trainers

from elip_ds.data.vocabulary import BYTES, KINDS, SPECIALS, WORD_END, Vocabulary, build_pipeline
from elip_ds.errors import UserError


def learn_vocabulary(captions: Iterable[str], size: int, kind: str = "albef") -> Vocabulary:
    """A vocabulary of at most size entries, those that the kind cannot do without among them.

    Raises UserError when these are more than size.
    """
    check_size(size, kind)
    words = _count_words(captions, kind)
    if KINDS[kind].model == "wordpiece":
        return Vocabulary.of_words(_learn_pieces(words, size - len(KINDS[kind].added)), kind)
    return Vocabulary.of_merges(_learn_merges(words, size, kind), kind, size)


def check_size(size: int, kind: str) -> None:
    """Raises UserError when no vocabulary of the kind can have so few entries."""
    least = KINDS[kind].min_entries
    if size < least:
        raise UserError(
            f"model.text.vocab_size={size}: a vocabulary of data.tokenizer={kind} has {least} "
            "entries at least"
        )


def _count_words(captions: Iterable[str], kind: str) -> dict[str, int]:
    """How often each word comes, in the form in which the kind's model sees words, in order."""
    raw: Counter[str] = Counter()
    for caption in captions:
        first, *others = KINDS[kind].clean(caption).split() or [""]
        raw[first] += 1
        raw.update(f" {word}" for word in others)  # to byte-level BPE the space belongs to the word
    pipeline = build_pipeline(kind)
    normalize = pipeline.normalizer.normalize_str if pipeline.normalizer else str
    words: Counter[str] = Counter()
    for word, count in sorted(raw.items()):
        for piece, _ in pipeline.pre_tokenizer.pre_tokenize_str(normalize(word)):
            words[piece] += count
    return dict(words)


def _learn_pieces(words: dict[str, int], size: int) -> list[str]:
    """WordPiece entries, the special ones first."""
    frequencies: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            frequencies[character] += count
    room = (size - len(SPECIALS)) // 2  # each may be needed twice, as x and as ##x
    alphabet = sorted(sorted(frequencies, key=lambda c: (-frequencies[c], c))[:room])
    inner = {character for word in words for character in word[1:]}
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIALS, *(f"##{c}" for c in alphabet if c in inner)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.train_from_iterator(Counter(words).elements(), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=lambda word: ids[word])


def _learn_merges(words: dict[str, int], size: int, kind: str) -> list[tuple[str, str]]:
    """Byte-level merges, at least as many as a vocabulary of size entries has room for."""
    ends: dict[str, Any] = {"end_of_word_suffix": WORD_END} if KINDS[kind].model == "clip" else {}
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[f"{byte}{WORD_END}" for byte in BYTES] if ends else [],
        initial_alphabet=list(BYTES),
        show_progress=False,
        **ends,
    )
    tokenizer = Tokenizer(models.BPE(**ends))
    tokenizer.train_from_iterator(Counter(words).elements(), trainer)
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]
