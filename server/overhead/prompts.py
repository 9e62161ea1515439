"""Prompts that no cache has seen before."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping
from typing import Any, Protocol

from server.evaluation.api import Api, ApiFailure

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Pixels of a picture's side: what CLIP towers take, and a whole number of patches for others.
SIDE = 336
_TILES = 8
# They carry meaning of their own, which GIFT looks for.
_WORDS = (
    "river stone bright morning garden window yellow paper seven horses winter road silver clock "
    "mountain village green kitchen music letter summer ocean quiet forest copper bridge market "
    "orange planet teacher station little castle purple engine shadow doctor island square circle"
).split()


class Source(Protocol):
    """Where prompts come from.

    Attributes:
        path: of the route that takes them.
        length: tokens that each has exactly; None where only the server can tell.
    """

    path: str
    length: int | None

    def fields(self) -> Mapping[str, Any]:
        """Fields of a request body with a fresh prompt."""


class Tokens:
    """Random tokens of ordinary words, sent as token ids.

    Args:
        vocabulary: ids to draw from.
        length: tokens of each prompt.
        seed: of the generator.
    """

    path = COMPLETIONS

    def __init__(self, vocabulary: list[int], length: int, seed: int) -> None:
        self._vocabulary = vocabulary
        self._random = random.Random(seed)
        self.length: int | None = length

    def fields(self) -> Mapping[str, Any]:
        """See `Source`."""
        return {"prompt": self._random.choices(self._vocabulary, k=self.length or 0)}


class Pictures:
    """Random words beside a picture of random tiles.

    Args:
        words: in each prompt.
        seed: of the generator.
    """

    path = CHAT
    length: int | None = None

    def __init__(self, words: int, seed: int) -> None:
        self._words = words
        self._random = random.Random(seed)

    def fields(self) -> Mapping[str, Any]:
        """See `Source`."""
        text = " ".join(self._random.choices(_WORDS, k=self._words))
        parts = [
            {"type": "image_url", "image_url": {"url": self._picture()}},
            {"type": "text", "text": text},
        ]
        return {"messages": [{"role": "user", "content": parts}]}

    def _picture(self) -> str:
        from PIL import Image

        tiles = Image.frombytes("RGB", (_TILES, _TILES), self._random.randbytes(3 * _TILES**2))
        stream = io.BytesIO()
        tiles.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(stream, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


async def source(api: Api, length: int, seed: int, *, pictures: bool) -> Source:
    """Prompts for a server's model.

    Args:
        api: the server, which tells the tokens of words.
        length: tokens of a prompt; about as many beside a picture.
        seed: of the generator.
        pictures: whether there is one in each prompt.

    Raises:
        ApiFailure: the server has no tokens for words.
    """
    tokens = await api.tokens(prompt=" ".join(_WORDS), add_special_tokens=False)
    if not tokens:
        raise ApiFailure("/tokenize answers with no tokens")
    if not pictures:
        return Tokens(sorted(set(tokens)), length, seed)
    return Pictures(max(1, round(length * len(_WORDS) / len(tokens))), seed)
