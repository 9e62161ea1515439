"""Write the evaluation sets next to this file: `python examples/data/make.py`.

The same seed gives the same bytes. Items are distinct, and each answer comes equally often in
either split, in an order that is drawn.
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

SENTIMENT = "Review: {}\nSentiment:"
TOPIC = "News: {}\nTopic:"
READING = "{}\nQuestion: {}\nAnswer:"
# Without examples SmolLM2-135M answers "No" to all of these, and leans that way with as many
# examples of either answer, too. With one "No" in eight it leans to neither side.
EXAMPLES = (
    ("Leo bought a horse and Kim bought a goat.", "Did Kim buy a goat?", "Yes"),
    ("May went to Rome on a Sunday.", "Did May go to Rome?", "Yes"),
    ("Tom put the milk in the fridge.", "Did the milk go into the oven?", "No"),
    ("Pam sold a saw and some rope.", "Did Pam sell some rope?", "Yes"),
    ("The boots were brown and the hat was pink.", "Did the hat have a pink colour?", "Yes"),
    ("Ed left before Liz did.", "Did Ed leave before Liz?", "Yes"),
    ("Sue worked in a mill. Her uncle was a priest.", "Did Sue work in a mill?", "Yes"),
    ("Amy gave Rob a pear.", "Did Amy give a pear to Rob?", "Yes"),
)

Make = Callable[[str, random.Random], str]


def make_sentiment(label: str, rng: random.Random) -> str:
    """A review."""
    return SENTIMENT.format(sentiment.review(label, rng))


def make_topic(label: str, rng: random.Random) -> str:
    """A sentence of news."""
    return TOPIC.format(topics.sentence(label, rng))


def make_reading(label: str, rng: random.Random) -> str:
    """A passage with a question, behind some that are answered."""
    shown = [f"{READING.format(passage, question)} {a}\n\n" for passage, question, a in EXAMPLES]
    item = reading.item(label, rng)
    return "".join(shown) + READING.format(item.passage, item.question)


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
            line = {
                "id": f"{name}-{number:03}",
                "split": split,
                "prompt": distinct(make, answer, rng, seen),
                "answer": f" {answer}",
                "labels": [f" {label}" for label in labels],
            }
            yield json.dumps(line) + "\n"


def distinct(make: Make, answer: str, rng: random.Random, seen: set[str]) -> str:
    """An item that was not made before."""
    while (prompt := make(answer, rng)) in seen:
        pass
    seen.add(prompt)
    return prompt


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
