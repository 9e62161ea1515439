"""Which words of a question carry its meaning.

GIFT looks at the attention of nouns, names, verbs, adjectives, adverbs and numbers. A tagger would
tell them; here a word counts unless it is on a list of English function words, the classes that
take no new members: articles and determiners, pronouns, prepositions, conjunctions, auxiliary
verbs, particles, question words, and interjections of a dialogue. A word of any other language
counts.
"""

from __future__ import annotations

import re
import unicodedata

from calibrators.interface import Span

_DETERMINERS = """
a an the this that these those some any no every each either neither both all half such another
other others which what whichever whatever whose my your his her its our their much many more most
few fewer fewest less least several enough
"""
_PRONOUNS = """
i me mine myself you yours yourself yourselves he him himself she hers herself it itself we us ours
ourselves they them theirs themselves themself one ones oneself who whom whoever whomever
someone somebody something anyone anybody anything everyone everybody everything nobody nothing none
there
"""
_PREPOSITIONS = """
about above across after against along alongside amid amidst among amongst around as at atop before
behind below beneath beside besides between beyond by despite down during except for from in inside
into like near of off on onto out outside over past per regarding since than through throughout till
to toward towards under underneath unlike until up upon versus via vs with within without
"""
_CONJUNCTIONS = """
and but or nor so yet although because if lest once though unless whereas whether while
"""
_AUXILIARIES = """
am is are was were be been being do does did done doing have has had having can could may might must
shall should will would ought
"""
_PARTICLES_AND_QUESTIONS = """
not how when where why whenever wherever however
"""
_INTERJECTIONS = """
please yes no yeah oh ok okay hello hi hey thanks
"""

FUNCTION_WORDS = frozenset(
    " ".join(
        (
            _DETERMINERS,
            _PRONOUNS,
            _PREPOSITIONS,
            _CONJUNCTIONS,
            _AUXILIARIES,
            _PARTICLES_AND_QUESTIONS,
            _INTERJECTIONS,
        )
    ).split()
)
"""Lower case, without contractions."""

# What is left of "can't", "won't" and "shan't" without its "n't".
_CLIPPED = frozenset({"ca", "wo", "sha", "ai"})
_NEGATED = re.compile(r"(.+)n't")
_CONTRACTED = re.compile(r"(.+)'(?:s|re|ve|ll|d|m)")
_APOSTROPHES = "'’"  # noqa: RUF001 - both are in use


def content_words(text: str) -> tuple[Span, ...]:
    """The words of a text that are not function words, as spans of its characters, in order.

    A word is a longest stretch of letters, marks and digits, with apostrophes inside. Hyphens
    divide words. A contraction counts as what it is a contraction of: "don't" and "what's" are
    function words, "dog's" is not.
    """
    return tuple(span for span in _words(text) if not _is_function(text[span.start : span.stop]))


def _words(text: str) -> list[Span]:
    spans, start = [], None
    for index in range(len(text) + 1):
        inside = index < len(text) and _belongs(text, index)
        if inside and start is None:
            start = index
        elif not inside and start is not None:
            spans.append(Span(start, index))
            start = None
    return spans


def _belongs(text: str, index: int) -> bool:
    """Whether a character is part of a word."""
    if text[index] not in _APOSTROPHES:
        return _of_word(text[index])
    return 0 < index < len(text) - 1 and _of_word(text[index - 1]) and _of_word(text[index + 1])


def _of_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def _is_function(word: str) -> bool:
    plain = word.lower().translate(str.maketrans(_APOSTROPHES, "''"))
    if plain in FUNCTION_WORDS:
        return True
    negated, contracted = _NEGATED.fullmatch(plain), _CONTRACTED.fullmatch(plain)
    if negated is not None:
        return negated[1] in FUNCTION_WORDS or negated[1] in _CLIPPED
    return contracted is not None and contracted[1] in FUNCTION_WORDS
