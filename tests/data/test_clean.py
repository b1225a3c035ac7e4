"""What the published models do to a caption's text."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.data.clean import clean_albef, clean_blip, clean_clip
from elip_ds.data.vocabulary import KINDS

FORTY = " ".join(str(i) for i in range(40))
THIRTY = " ".join(str(i) for i in range(30))


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
        (FORTY, THIRTY),
    ],
)
def test_a_caption_is_cleaned_as_albef_does(caption: str, cleaned: str) -> None:
    assert clean_albef(caption) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Dog", "a dog"),
        ('a. b! c" d( e) f* g# h: i; j~', "a b c d e f g h i j"),
        ("a.b", "a b"),
        ("it's, is it?", "it's, is it?"),
        ("black-and-white and/or", "black-and-white and/or"),
        ("<person>", "<person>"),
        ("a  b   c", "a b c"),
        ("  a dog \n", "a dog"),
        ("", ""),
        ("...", ""),
        (FORTY, THIRTY),
    ],
)
def test_a_caption_is_cleaned_as_blip_does(caption: str, cleaned: str) -> None:
    assert clean_blip(caption) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Dog", "a dog"),
        ("a, b. c' d!", "a, b. c' d!"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("<b> &amp;amp;amp;", "<b> &amp;"),
        ("Z\u00c3\u00bcrich", "z\u00fcrich"),  # UTF-8 read as Latin-1
        ("\ufb01sh", "fish"),
        ("a \n\t b\u00a0c ", "a b c"),
        ("<person>", "<person>"),
        (FORTY, FORTY),
    ],
)
def test_a_caption_is_cleaned_as_clip_does(caption: str, cleaned: str) -> None:
    assert clean_clip(caption) == cleaned


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_meter_cleans_nothing(kind: str) -> None:
    caption = " A  dog, <person>\n"
    assert KINDS[kind].clean(caption) == caption


@pytest.mark.parametrize("clean", [clean_albef, clean_blip])
@settings(deadline=None, derandomize=True)
@given(caption=st.text())
def test_cleaning_twice_changes_nothing(clean: Callable[[str], str], caption: str) -> None:
    once = clean(caption)
    if "<person>" not in once:  # '<<person>>' leaves one
        assert clean(once) == once
    assert len(once.split()) <= 30
