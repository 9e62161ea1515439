"""Geometry of a prompt that is ready for the engine: images, question and content words in it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from calibrators.interface import Prompt, Span
from calibrators.words import content_words

if TYPE_CHECKING:
    from vllm.multimodal.inputs import PlaceholderRange

Encode: TypeAlias = Callable[[str, bool], "tuple[Sequence[int], Sequence[tuple[int, int]]] | None"]
"""Token ids of a text, with special tokens around it or not, and the characters of each; None
where the tokenizer does not tell."""

# The most tokens that stand for one image before it is expanded; most models have one.
_MARKER = 16


def images_of(placeholders: Mapping[str, Sequence[PlaceholderRange]]) -> Prompt:
    """A prompt of length 0 with the image tokens of placeholders, in order.

    A placeholder may hold other tokens, such as marks between the rows of an image.
    """
    found = sorted(placeholders.get("image", ()), key=lambda each: each.offset)
    by_image = [
        [Span(start, last + 1) for start, last in each.extract_embeds_range()] for each in found
    ]
    images = tuple(span for spans in by_image for span in spans)
    extents = tuple(Span(spans[0].start, spans[-1].stop) for spans in by_image if spans)
    return Prompt(0, images, extents=() if extents == images else extents)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is known of a prompt on its way to the engine.

    Attributes:
        prompt: what calibrators get to see.
        question: whether the last user message's text was found in it.
    """

    prompt: Prompt
    question: bool = False


def geometry_of(
    engine_input: Mapping[str, Any], words: Sequence[Span] | None, encode: Encode
) -> Geometry:
    """The geometry of a prompt.

    Args:
        engine_input: what the engine gets: token ids, placeholders and the text they came from.
        words: spans of characters of that text that are the question; None where nobody knows.
        encode: of the tokenizer.
    """
    tokens = engine_input.get("prompt_token_ids") or ()
    placeholders = engine_input.get("mm_placeholders") or {}
    prompt = replace(images_of(placeholders), length=len(tokens))
    text = engine_input.get("prompt") or ""
    if not words or not prompt.images:
        return Geometry(prompt, words is not None)
    taken = [Span(p.offset, p.offset + p.length) for each in placeholders.values() for p in each]
    places = _places(text, tokens, sorted(taken, key=lambda span: span.start), encode)
    if places is None:
        return Geometry(prompt)
    query = _merged(position for part in words for position in places.of(part))
    return Geometry(replace(prompt, query=query, content=_content(text, words, places)), True)


def _content(text: str, words: Sequence[Span], places: _Places) -> tuple[Span, ...]:
    """Token spans of the content words."""
    spans = [
        places.of(Span(part.start + word.start, part.start + word.stop))
        for part in words
        for word in content_words(text[part.start : part.stop])
    ]
    return tuple(Span(span[0], span[-1] + 1) for span in spans if span)


class _Places:
    """Where characters of a text ended up among the tokens of the prompt.

    Args:
        known: characters from and to of each token, and its position; in order.
    """

    def __init__(self, known: Iterable[tuple[int, int, int]]) -> None:
        # Special tokens have no characters.
        held = [each for each in known if each[0] < each[1]]
        self._starts = [start for start, _, _ in held]
        self._stops = [stop for _, stop, _ in held]
        self._positions = [position for _, _, position in held]

    def of(self, span: Span) -> list[int]:
        """Positions of the tokens that have any of these characters."""
        first, last = bisect_right(self._stops, span.start), bisect_left(self._starts, span.stop)
        return self._positions[first:last]


def _places(
    text: str, tokens: Sequence[int], taken: Sequence[Span], encode: Encode
) -> _Places | None:
    """Where the text ended up; None where the prompt is not made of its tokens."""
    for special in (False, True):
        encoded = encode(text, special)
        if encoded is None:
            return None
        ids, characters = encoded
        position_of = _expanded(ids, tokens, taken)
        if position_of is not None:
            return _Places((*characters[token], place) for token, place in position_of)
    return None


def _expanded(
    ids: Sequence[int], tokens: Sequence[int], taken: Sequence[Span]
) -> list[tuple[int, int]] | None:
    """Pairs of a token before expansion and its position after it; None where they do not fit.

    What is outside the placeholders has to be the same before and after. How many tokens stood for
    a placeholder is found by trying.
    """
    edges = [0, *(edge for span in taken for edge in (span.start, span.stop)), len(tokens)]
    parts = [Span(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    dead: set[tuple[int, int]] = set()

    def starts(part: int, at: int) -> list[int] | None:
        """Where this part and those after it start among `ids`, this one at `at`."""
        span = parts[part]
        end = at + span.stop - span.start
        if (part, at) in dead or [*ids[at:end]] != [*tokens[span.start : span.stop]]:
            return None
        if part == len(parts) - 1:
            return [at] if end == len(ids) else None
        for skipped in range(_MARKER + 1):
            rest = starts(part + 1, end + skipped)
            if rest is not None:
                return [at, *rest]
        dead.add((part, at))
        return None

    found = starts(0, 0)
    if found is None:
        return None
    return [
        (at + offset, span.start + offset)
        for at, span in zip(found, parts, strict=True)
        for offset in range(span.stop - span.start)
    ]


def _merged(positions: Iterable[int]) -> tuple[Span, ...]:
    """Spans that hold exactly these positions."""
    ordered = sorted(set(positions))
    cuts = [index for index, (a, b) in enumerate(pairwise(ordered), 1) if b != a + 1]
    edges = pairwise([0, *cuts, len(ordered)])
    return tuple(Span(ordered[a], ordered[b - 1] + 1) for a, b in edges if a < b)
