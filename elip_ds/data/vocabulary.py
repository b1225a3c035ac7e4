"""Kinds of tokenizer, and the vocabulary of one kind: its entries and its byte-pair merges.

A kind is all that a published model does to a caption, so that no part of it can be combined with
a part of another. What a run keeps, tokenizer.json, is the whole pipeline behind the cleaning as
the tokenizers library writes it.

Sources: ALBEF's own BertTokenizer, which adds no [SEP]; BLIP's `init_tokenizer`; METER with BERT or
RoBERTa as Hugging Face has them; open_clip's SimpleTokenizer.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from elip_ds.data.clean import clean_albef, clean_blip, clean_clip, keep
from elip_ds.errors import UserError

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
"One printable character for each byte, in the order in which GPT-2 and CLIP number them."
WORD_END = "</w>"
"What marks a word's last piece in CLIP's vocabulary."

# differs from open_clip: a caption that spells <end_of_text> is text like any other; code points
# that Unicode has not assigned, and U+0345, are classed otherwise than its regex library does.
_CLIP_WORDS = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


@dataclass(frozen=True)
class Kind:
    """clean: caption -> text to tokenize.
    model: wordpiece; bytes, GPT-2's byte-level BPE; or clip, byte-level BPE with word ends.
    template: the tokens put around the text, which is $A.
    specials: BERT's names -> the entries that stand for them.
    added: entries behind the published ones.
    """

    clean: Callable[[str], str]
    model: str
    template: str
    specials: dict[str, str] = field(default_factory=lambda: {name: name for name in SPECIALS})
    added: tuple[str, ...] = ()

    @property
    def min_entries(self) -> int:
        """Entries without which no vocabulary of this kind can be."""
        return {
            "wordpiece": len(SPECIALS) + len(self.added),
            "bytes": len(self.specials) + len(BYTES),
            "clip": 2 + 2 * len(BYTES),
        }[self.model]


_ROBERTA = {
    "[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"
}  # fmt: skip
_CLIP = {"[PAD]": "!", "[CLS]": "<start_of_text>", "[SEP]": "<end_of_text>"}  # it pads with id 0
_BLIP = {name: name for name in (*SPECIALS, "[DEC]", "[ENC]")}

KINDS = {
    "albef": Kind(clean_albef, "wordpiece", "[CLS] $A"),
    "bert": Kind(keep, "wordpiece", "[CLS] $A [SEP]"),
    "blip": Kind(clean_blip, "wordpiece", "[CLS] $A [SEP]", _BLIP, added=("[DEC]", "[ENC]")),
    "roberta": Kind(keep, "bytes", "<s> $A </s>", _ROBERTA),
    "clip": Kind(clean_clip, "clip", "<start_of_text> $A <end_of_text>", _CLIP),
}
"data.tokenizer -> what it means."


@dataclass(frozen=True)
class Vocabulary:
    """kind: a key of KINDS.  ids: entry -> id, 0 to len - 1.  merges: pairs that BPE joins, in
    order; none for WordPiece. Equal where all three are.

    Raises UserError when an entry is missing that the kind needs.
    """

    kind: str
    ids: dict[str, int]
    merges: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if sorted(self.ids.values()) != list(range(len(self.ids))):
            raise UserError("its entries are not numbered 0, 1, 2, ...; one may be there twice")
        needed = [*self._kind.specials.values()]
        if self._kind.model != "wordpiece":
            needed += BYTES
        if self._kind.model == "clip":
            needed += [f"{byte}{WORD_END}" for byte in BYTES]
        needed += [entry for a, b in self.merges for entry in (a, b, a + b)]
        missing = next((entry for entry in needed if entry not in self.ids), None)
        if missing is not None:
            raise UserError(f"the entry {missing} is missing")
        if self.kind == "clip":
            _check_clip(self.ids)
        if "[ENC]" in self.ids and not self._kind.added:
            raise UserError("it has BLIP's entry [ENC]; set data.tokenizer=blip")

    @classmethod
    def of_words(cls, words: Sequence[str], kind: str = "albef") -> "Vocabulary":
        """A WordPiece vocabulary; an entry's place is its id, what the kind adds comes last."""
        ids = {word: i for i, word in enumerate(words)}
        for entry in KINDS[kind].added:
            ids.setdefault(entry, len(ids))
        return cls(kind, ids)

    @classmethod
    def of_merges(
        cls, merges: Iterable[tuple[str, str]], kind: str, size: int | None = None
    ) -> "Vocabulary":
        """A byte-level vocabulary of at most size entries, numbered as CLIP's published one is."""
        specials = KINDS[kind].specials
        if kind == "clip":
            last = [specials["[CLS]"], specials["[SEP]"]]
            entries = dict.fromkeys([*BYTES, *(f"{byte}{WORD_END}" for byte in BYTES)])
        else:
            first = [specials[name] for name in ("[CLS]", "[PAD]", "[SEP]", "[UNK]")]
            last = [specials["[MASK]"]]
            entries = dict.fromkeys([*first, *BYTES])
        room = None if size is None else size - len(last)
        used = []
        for a, b in merges:
            if len(entries) == room:
                break
            entries[a + b] = None
            used.append((a, b))
        return cls(kind, {entry: i for i, entry in enumerate([*entries, *last])}, tuple(used))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The entries, each at the place that is its id."""
        return tuple(sorted(self.ids, key=self.ids.__getitem__))

    @property
    def special_ids(self) -> dict[str, int]:
        """[PAD], [CLS], ... -> id, as many as the kind has, by these names for every kind."""
        return {name: self.ids[entry] for name, entry in self._kind.specials.items()}

    @property
    def end_id(self) -> int | None:
        """The token that the kind puts behind a text; None: it puts none."""
        last = self._kind.template.split()[-1]
        return None if last == "$A" else self.ids[last]

    @property
    def json(self) -> str:
        """What a run keeps as tokenizer.json."""
        return self.build_tokenizer().to_str()

    def build_tokenizer(self) -> Tokenizer:
        """Cleaned text -> ids with the kind's tokens around them, neither cut nor padded."""
        tokenizer = build_pipeline(self.kind, self.ids, self.merges)
        entries = [part for part in self._kind.template.split() if part != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=self._kind.template, special_tokens=[(e, self.ids[e]) for e in entries]
        )
        return tokenizer


def build_pipeline(
    kind: str, ids: dict[str, int] | None = None, merges: Iterable[tuple[str, str]] = ()
) -> Tokenizer:
    """How a kind splits text into entries; without ids, how it splits text into words."""
    match KINDS[kind].model:
        case "wordpiece":
            tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
        case "bytes":
            tokenizer = Tokenizer(models.BPE(ids or {}, list(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        case _:
            model = models.BPE(ids or {}, list(merges), end_of_word_suffix=WORD_END)
            tokenizer = Tokenizer(model)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(_CLIP_WORDS, behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            tokenizer.decoder = decoders.Sequence(
                [decoders.ByteLevel(), decoders.Replace(WORD_END, " ")]
            )
    return tokenizer


def _check_clip(ids: dict[str, int]) -> None:
    """The text tower pools where the id is highest, and pads with 0."""
    if ids["<end_of_text>"] != len(ids) - 1:
        raise UserError("the entry <end_of_text> must be the last one")
    if ids["!"] != 0:
        raise UserError("the entry ! must be the first one")


class Entries(NamedTuple):
    """What a file holds, whatever kind it is meant for. model: as in Kind."""

    model: str
    ids: dict[str, int]
    merges: tuple[tuple[str, str], ...] = ()


def parse_tokenizer(text: str) -> Entries:
    """A tokenizer.json of ours or of Hugging Face. Raises ValueError or LookupError for others."""
    tree = json.loads(text)
    model = tree["model"]
    if model["type"] not in ("WordPiece", "BPE"):
        raise ValueError(f"a model of type {model['type']}")
    ids = {**model["vocab"], **{added["content"]: added["id"] for added in tree["added_tokens"]}}
    if model["type"] == "WordPiece":
        return Entries("wordpiece", ids)
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    name = "clip" if model.get("end_of_word_suffix") == WORD_END else "bytes"
    return Entries(name, ids, tuple((a, b) for a, b in merges))


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer.json that a run or a checkpoint keeps. Raises UserError when it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        entries = parse_tokenizer(text)
        return Vocabulary(_kind_of(text, entries), entries.ids, entries.merges)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"it is no tokenizer.json of a run: {error}"
        raise UserError(f"{path}: {reason}") from None


def _kind_of(text: str, entries: Entries) -> str:
    """The tokenizers library has no field for it, but no two kinds have all of these in common."""
    parts = json.loads(text)["post_processor"]["single"]
    template = " ".join(part.get("SpecialToken", {"id": "$A"})["id"] for part in parts)
    for name, kind in KINDS.items():
        has_blips = ("[ENC]" in entries.ids) == ("[ENC]" in kind.added)
        if (kind.model, kind.template) == (entries.model, template) and has_blips:
            return name
    raise ValueError(f"no kind puts {template}")
