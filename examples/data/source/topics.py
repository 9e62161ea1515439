"""One-sentence news on four topics; the words are in `topics.toml`."""

from __future__ import annotations

import random
import re
import tomllib
from pathlib import Path

LABELS = ("sports", "business", "science", "politics")
WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def sentence(topic: str, rng: random.Random) -> str:
    """A sentence of news."""
    town, other = rng.sample(WORDS["towns"], 2)
    filled = rng.choice(WORDS["events"][topic]).format(
        name=rng.choice(WORDS["names"]),
        past=rng.choice(WORDS["pasts"]),
        place=rng.choice(WORDS["places"]),
        town=town,
        other=other,
    )
    return re.sub(r",(?=[.,])", "", filled)
