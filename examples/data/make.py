"""Write the evaluation sets next to this file: `python examples/data/make.py`.

The same seed gives the same bytes. Items are distinct, labels come equally often in both splits, and
neighbouring lines are shuffled.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from source import reading, sentiment, topics

SEED = 20251
SPLITS = {"search": 160, "report": 240}

SENTIMENT = """\
Review: {}
Does the writer of this review feel positive or negative about it? Answer with one word."""
TOPIC = """\
{}
Is this news about sports, business, science or politics? Answer with one word."""
READING = """\
{}
Question: {} Answer yes or no."""

Make = Callable[[str, random.Random], dict[str, object]]


def chat(text: str) -> dict[str, object]:
    """A question in one turn."""
    return {"messages": [{"role": "user", "content": text}]}


def make_sentiment(label: str, rng: random.Random) -> dict[str, object]:
    """A review."""
    return chat(SENTIMENT.format(sentiment.review(label, rng)))


def make_topic(label: str, rng: random.Random) -> dict[str, object]:
    """A sentence of news."""
    return chat(TOPIC.format(topics.sentence(label, rng)))


def make_reading(label: str, rng: random.Random) -> dict[str, object]:
    """A passage with a question."""
    item = reading.item(label, rng)
    return chat(READING.format(item.passage, item.question))


SETS: dict[str, tuple[Make, Sequence[str]]] = {
    "sentiment": (make_sentiment, sentiment.LABELS),
    "topic": (make_topic, topics.LABELS),
    "reading": (make_reading, reading.LABELS),
}


def lines(name: str, seed: int) -> Iterator[str]:
    """The lines of a set."""
    make, labels = SETS[name]
    rng = random.Random(f"{name} {seed}")
    seen: set[str] = set()
    number = 0
    for split, size in SPLITS.items():
        answers = [labels[i % len(labels)] for i in range(size)]
        rng.shuffle(answers)
        for answer in answers:
            number += 1
            asked = distinct(make, answer, rng, seen)
            line = {
                "id": f"{name}-{number:03}",
                "split": split,
                **asked,
                "answer": answer.capitalize(),
                "labels": [label.capitalize() for label in labels],
            }
            yield json.dumps(line) + "\n"


def distinct(make: Make, answer: str, rng: random.Random, seen: set[str]) -> dict[str, object]:
    """An item that was not made before."""
    while True:
        asked = make(answer, rng)
        text = json.dumps(asked)
        if text not in seen:
            seen.add(text)
            return asked


def main() -> int:
    """Write all sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    for name in SETS:
        (args.out / f"{name}.jsonl").write_text("".join(lines(name, args.seed)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
