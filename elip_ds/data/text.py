"""Captions in, token ids out: cleaning, the WordPiece vocabulary, and tokenizing as ALBEF does.

Source: ALBEF's `pre_caption` and its own BertTokenizer, which puts [CLS] first and adds no [SEP].
"""

import re
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
    """Lower case, ALBEF's punctuation removed, runs of spaces collapsed, the first max_words words."""
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
                raise UserError(f"data.vocabulary: the entry {special} is missing")

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
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.vocabulary={path}: {getattr(error, 'strerror', None) or error}; give a WordPiece "
            "vocab.txt, or 'auto' to learn one from the training captions"
        ) from None
    return Vocabulary(tuple(lines))


def learn_vocabulary(captions: Iterable[str], size: int) -> Vocabulary:
    """A WordPiece vocabulary of at most size entries, the five special ones first."""
    tokenizer = _wordpiece(models.WordPiece(unk_token="[UNK]"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    ids = tokenizer.get_vocab()
    return Vocabulary(tuple(sorted(ids, key=lambda word: ids[word])))


def _wordpiece(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


class CaptionTokenizer:
    """Cleans and tokenizes captions to a fixed length: [CLS], word pieces, padding."""

    def __init__(self, vocabulary: Vocabulary, length: int) -> None:
        self.length, self._special = length, vocabulary.special_ids
        self._tokenizer = _wordpiece(models.WordPiece(vocab=vocabulary.ids, unk_token="[UNK]"))

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
