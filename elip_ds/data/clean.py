"""What each published model does to a caption's text before it is tokenized.

Sources: ALBEF's and BLIP's `pre_caption`, open_clip's `clean='lower'`.
"""

import html
import re

import ftfy

MAX_WORDS = 30
"ALBEF and BLIP keep so many words of a caption, in pre-training and in retrieval."

_ALBEF_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_ALBEF_TO_SPACE = re.compile(r"[-/]")
_BLIP_TO_SPACE = re.compile(r"[.!\"()*#:;~]")


def clean_albef(text: str) -> str:
    """Lower case, punctuation removed or spaced out, single spaces, the first MAX_WORDS words."""
    text = _ALBEF_DELETED.sub("", text.lower())
    text = _ALBEF_TO_SPACE.sub(" ", text).replace("<person>", "person")
    return " ".join(text.split()[:MAX_WORDS])


def clean_blip(text: str) -> str:
    """Lower case, less punctuation, single spaces, the first MAX_WORDS words.

    Commas, apostrophes, question marks, hyphens and slashes stay.
    """
    return " ".join(_BLIP_TO_SPACE.sub(" ", text.lower()).split()[:MAX_WORDS])


def clean_clip(text: str) -> str:
    """Mis-decoded characters repaired, HTML entities resolved (even if escaped twice), single
    spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def keep(text: str) -> str:
    """The text itself: METER cleans nothing."""
    return text
