"""Captions in, token ids out: cleaning, the WordPiece vocabulary, and tokenizing as ALBEF does.

Source: ALBEF's `pre_caption` and its own BertTokenizer, which puts [CLS] first and adds no [SEP].
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from elip_ds.errors import UserError

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORDS = 30

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_TO_SPACE = re.compile(r"[-/]")


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """Lower case, ALBEF's punctuation removed, single spaces, the first max_words words."""
    text = _DELETED.sub("", text.lower())
    text = _TO_SPACE.sub(" ", text).replace("<person>", "person")
    return " ".join(text.split()[:max_words])


@dataclass(frozen=True)
class Vocabulary:
    """words: WordPiece entries; an entry's place is its id."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        for special in SPECIALS:
            if special not in self.ids:
                raise UserError(f"the entry {special} is missing")

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @property
    def special_ids(self) -> dict[str, int]:
        return {special: self.ids[special] for special in SPECIALS}


def read_vocabulary(path: Path) -> Vocabulary:
    """path: a vocab.txt, one entry a line, as BERT's. Raises UserError when it is not there."""
    try:
        with path.open(encoding="utf-8") as file:  # splitlines() would split inside some entries
            return Vocabulary(tuple(line.rstrip("\n") for line in file))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(
            f"data.vocabulary={path}: {getattr(error, 'strerror', None) or error}; give a "
            "WordPiece vocab.txt, or 'auto' to learn one from the training captions"
        ) from None


def learn_vocabulary(captions: Iterable[str], size: int) -> Vocabulary:
    """A WordPiece vocabulary of at most size entries, the five special ones first.

    The same captions give the same vocabulary, in any order. The trainer alone does not see to
    that: it numbers the word-inner characters as a hash table yields them, and settles ties by
    number. So they are handed to it in order, as if they were special.
    """
    normalizer, splitter = _wordpiece().normalizer, _wordpiece().pre_tokenizer
    raw = Counter(word for caption in captions for word in clean_caption(caption).split())
    words: Counter[str] = Counter()
    for word, count in sorted(raw.items()):
        for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word)):
            words[piece] += count
    frequencies: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            frequencies[character] += count
    room = max(0, size - len(SPECIALS)) // 2  # each may be needed twice, as x and as ##x
    alphabet = sorted(sorted(frequencies, key=lambda c: (-frequencies[c], c))[:room])
    inner = {character for word in words for character in word[1:]}
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIALS, *(f"##{c}" for c in alphabet if c in inner)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer = _wordpiece()
    tokenizer.train_from_iterator(words.elements(), trainer)
    ids = tokenizer.get_vocab()
    return Vocabulary(tuple(sorted(ids, key=lambda word: ids[word])))


def _wordpiece(vocabulary: dict[str, int] | None = None) -> Tokenizer:
    """BERT's uncased tokenizer; without a vocabulary, one to be trained."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


class CaptionTokenizer:
    """Cleans and tokenizes captions to a fixed length: [CLS], word pieces, padding."""

    def __init__(self, vocabulary: Vocabulary, length: int) -> None:
        self.length, self._special = length, vocabulary.special_ids
        self._tokenizer = _wordpiece(vocabulary.ids)

    def __call__(self, caption: str) -> np.ndarray:
        """One caption -> ids (L,), int64."""
        pieces = self._tokenizer.encode(clean_caption(caption), add_special_tokens=False).ids
        ids = np.full(self.length, self._special["[PAD]"], dtype=np.int64)
        pieces = pieces[: self.length - 1]
        ids[0] = self._special["[CLS]"]
        ids[1 : 1 + len(pieces)] = pieces
        return ids

    def attention_mask(self, input_ids: np.ndarray) -> np.ndarray:
        """1 where there is a token, 0 on padding; any shape."""
        return (input_ids != self._special["[PAD]"]).astype(np.int64)
