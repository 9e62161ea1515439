from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.interface import Span
from calibrators.words import FUNCTION_WORDS, content_words


def words(text):
    return [text[span.start : span.stop] for span in content_words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What color is the cat?", "color cat"),
        ("Is there a dog in the image?", "dog image"),
        ("Please describe this image in detail.", "describe image detail"),
        ("How many people are standing behind the old car?", "people standing old car"),
        ("Are the two men wearing the same red hats", "two men wearing same red hats"),
        ("WHERE IS IT", ""),
        ("Don't you see what's on the dog's bed?", "see dog's bed"),
        ("I can\u2019t tell; they\u2019re Sam\u2019s", "tell Sam\u2019s"),
        ("a well-known X-ray", "well known X ray"),
        ("'quoted' and ''twice''", "quoted twice"),
        ("3 cats, 12.5 % of 1_000", "3 cats 12 5 1 000"),
        ("Was ist auf dem Bild?", "ist auf dem Bild"),
        ("caf\u00e9 cafe\u0301 \u0939\u093f\u0928\u094d\u0926\u0940", None),
        ("\u56fe\u7247\u91cc\u6709\u4ec0\u4e48\uff1f", "\u56fe\u7247\u91cc\u6709\u4ec0\u4e48"),
        ("", ""),
        ("?! \n\t", ""),
    ],
)
def test_words_with_a_meaning_of_their_own(text, expected):
    assert words(text) == (text if expected is None else expected).split()


def test_spans_are_of_characters():
    assert content_words("the cat's \U0001f408 sleeps") == (Span(4, 9), Span(12, 18))


@pytest.mark.parametrize("word", ["won't", "shan't", "ain't", "isn't", "I'm", "who'd", "we've"])
def test_contractions_of_function_words(word):
    assert words(f"cat {word} DOG {word.upper()}") == ["cat", "DOG"]


@given(st.text())
def test_any_text_is_divided_into_words(text):
    spans = content_words(text)
    for before, after in pairwise(spans):
        assert before.stop < after.start
    for span in spans:
        word = text[span.start : span.stop]
        assert word
        assert not any(character.isspace() for character in word)
        assert word.lower() not in FUNCTION_WORDS


@given(st.lists(st.sampled_from(sorted(FUNCTION_WORDS)), max_size=8), st.booleans())
def test_function_words_alone_have_no_content(chosen, capitals):
    text = " ".join(chosen)
    assert content_words(text.title() if capitals else text) == ()
