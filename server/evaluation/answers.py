"""Free text matched to one of the choices."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_NO_WORD = re.compile(r"\W+")


def normalised(text: str) -> str:
    """Words in lower case with single spaces between them; punctuation is left out."""
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def matched(text: str, choices: Sequence[str]) -> str | None:
    """The choice that `text` names, None where it names none or more than one.

    A choice at the start counts, whatever follows. Otherwise exactly one of the choices has to
    occur, as whole words. Where one choice begins like another, the longer one is meant.
    """
    by_text = {normalised(choice): choice for choice in choices}
    longest_first = sorted(by_text, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    answer = normalised(text)
    found = list(re.finditer(pattern, answer))
    if found and found[0].start() == 0:
        return by_text[found[0].group()]
    named = {match.group() for match in found}
    return by_text[named.pop()] if len(named) == 1 else None
