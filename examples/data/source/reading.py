"""A passage of two or three sentences and a question whose answer is yes or no.

Every form of question is asked both ways, so that the words of passage and question are those of
either answer; which it is follows from how the passage was made.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LABELS = ("Yes", "No")
PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Elif", "Frank", "Gina", "Hugo", "Irene", "Jonas", "Karim",
    "Lena", "Marco", "Nina", "Oscar", "Paula", "Rosa", "Stefan", "Tara", "Viktor",
)  # fmt: skip
OBJECTS = ("keys", "letters", "scissors", "gloves", "glasses", "tickets", "batteries", "stamps")
SHOPS = ("bakery", "bank", "library", "pharmacy", "post office", "bookshop", "barber", "museum")
HOURS = ("seven", "eight", "nine", "ten", "eleven")
ANIMALS = ("a cat", "a parrot", "a rabbit", "two goldfish", "an old dog", "a tortoise")
CITIES = ("Lisbon", "Oslo", "Naples", "Vienna", "Dublin", "Prague", "Athens", "Bruges")
JOBS = ("nurse", "carpenter", "pilot", "cook", "gardener", "judge", "painter", "dentist")
PAINTED = ("door", "fence", "boat", "kitchen", "bicycle", "garden chair")
PET_NAMES = ("Biscuit", "Captain", "Daisy", "Monty", "Pepper", "Saffron")
COLOURS = ("red", "white", "green", "yellow", "grey", "blue", "black")
FILLERS = (
    "It was a grey afternoon.", "The radio was playing in the next room.",
    "Nobody else was at home.", "The street was quiet at that hour.",
    "They had known each other since school.", "It had rained all morning.",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A passage, and a question about it."""

    passage: str
    question: str


def item(answer: str, rng: random.Random) -> Item:
    """A passage and a question with this answer."""
    return rng.choice(FORMS)(answer == "Yes", rng)


def _opening(yes: bool, rng: random.Random) -> Item:
    (one, two), hours = rng.sample(SHOPS, 2), rng.sample(range(len(HOURS)), 2)
    early, late = sorted(hours)
    passage = (
        f"The {one} opened at {HOURS[early]}. The {two} across the road opened at {HOURS[late]}."
    )
    pair = (one, two) if yes else (two, one)
    return Item(passage, f"Did the {pair[0]} open before the {pair[1]}?")


def _pets(yes: bool, rng: random.Random) -> Item:
    (one, two), (his, hers, other) = rng.sample(PEOPLE, 2), rng.sample(ANIMALS, 3)
    passage = (
        f"{one} kept {his} in a small flat. {rng.choice(FILLERS)} "
        f"{two}, who lived upstairs, had {hers}."
    )
    return Item(passage, f"Did {one} keep {his if yes else other}?")


def _jobs(yes: bool, rng: random.Random) -> Item:
    (one, two), (city, town, other) = rng.sample(PEOPLE, 2), rng.sample(CITIES, 3)
    passage = "{} worked as a {} in {}. {} was a {} in {}.".format(
        *(one, rng.choice(JOBS), city), *(two, rng.choice(JOBS), town)
    )
    who, where = rng.choice(((one, city), (two, town)))
    return Item(passage, f"Did {who} work in {where if yes else other}?")


def _ordered(yes: bool, rng: random.Random) -> Item:
    one, two, three = rng.sample(PEOPLE, 3)
    passage = (
        f"{one} reached the hut before {two}. {two} was there before {three}. {rng.choice(FILLERS)}"
    )
    pair = (one, three) if yes else (three, one)
    return Item(passage, f"Did {pair[0]} reach the hut before {pair[1]}?")


def _coloured(yes: bool, rng: random.Random) -> Item:
    who, (before, after, other) = rng.choice(PEOPLE), rng.sample(COLOURS, 3)
    what = rng.choice(PAINTED)
    passage = (
        f"{who} painted the {what} {after}. It had been {before} for twenty years. "
        f"{rng.choice(FILLERS)}"
    )
    return Item(passage, f"Did {who} paint the {what} {after if yes else other}?")


def _lent(yes: bool, rng: random.Random) -> Item:
    one, two = rng.sample(PEOPLE, 2)
    thing = rng.choice(OBJECTS)
    passage = (
        f"{one} lent {two} the {thing} on Monday. {rng.choice(FILLERS)} "
        f"On Friday {two} still had them."
    )
    lender, borrower = (one, two) if yes else (two, one)
    return Item(passage, f"Did {lender} lend the {thing} to {borrower}?")


def _named(yes: bool, rng: random.Random) -> Item:
    owner = rng.choice(PEOPLE)
    one, two = rng.sample(("dog", "horse", "donkey", "goat"), 2)
    name, other = rng.sample(PET_NAMES, 2)
    third = rng.choice([each for each in PET_NAMES if each not in (name, other)])
    passage = (
        f"{owner} called the {one} {name}. {rng.choice(FILLERS)} "
        f"The {two} came with the name {other}."
    )
    return Item(passage, f"Did {owner} call the {one} {name if yes else third}?")


def _travelled(yes: bool, rng: random.Random) -> Item:
    who, (start, end, other) = rng.choice(PEOPLE), rng.sample(CITIES, 3)
    how, instead = rng.sample(("by train", "by bus", "by ship", "by bicycle", "on foot"), 2)
    passage = f"{who} travelled from {start} to {end} {how}. {rng.choice(FILLERS)}"
    if rng.random() < 0.5:
        return Item(passage, f"Did {who} travel to {end if yes else other}?")
    return Item(passage, f"Did {who} travel {how if yes else instead}?")


FORMS: tuple[Callable[[bool, random.Random], Item], ...] = (
    _opening, _pets, _jobs, _ordered, _coloured, _lent, _named, _travelled,
)  # fmt: skip
