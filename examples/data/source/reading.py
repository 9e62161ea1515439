"""A passage of two or three sentences and a question whose answer is yes or no.

Every form of question is asked both ways, so that the words of passage and question are those of
either answer; which it is follows from how the passage was made.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LABELS = ("yes", "no")
PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Elif", "Frank", "Gina", "Hugo", "Irene", "Jonas", "Karim",
    "Lena", "Marco", "Nina", "Oscar", "Paula", "Rosa", "Stefan", "Tara", "Viktor",
)  # fmt: skip
OBJECTS = ("keys", "letters", "scissors", "gloves", "glasses", "tickets", "batteries", "stamps")
SPOTS = ("in the drawer", "on the shelf", "under the bed", "in the car", "behind the clock",
         "in the blue box", "on the piano", "in the garden shed")  # fmt: skip
SHOPS = ("bakery", "bank", "library", "pharmacy", "post office", "bookshop", "barber", "museum")
HOURS = ("seven", "eight", "nine", "ten", "eleven")
ANIMALS = ("a cat", "a parrot", "a rabbit", "two goldfish", "an old dog", "a tortoise")
CITIES = ("Lisbon", "Oslo", "Naples", "Vienna", "Dublin", "Prague", "Athens", "Bruges")
JOBS = ("nurse", "carpenter", "pilot", "cook", "gardener", "judge", "painter", "dentist")
REASONS = ("heavy snow", "a strike", "a burst pipe", "a power cut", "a gas leak", "a broken lift")
EVENTS = ("concert", "market", "lecture", "parade", "wedding", "auction")
FOODS = ("plums", "eggs", "candles", "apples", "rolls", "onions")
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
    return rng.choice(FORMS)(answer == "yes", rng)


def _moved(yes: bool, rng: random.Random) -> Item:
    (first, second), (before, after) = rng.sample(PEOPLE, 2), rng.sample(SPOTS, 2)
    thing = rng.choice(OBJECTS)
    passage = (
        f"{first} left the {thing} {before}. {rng.choice(FILLERS)} "
        f"Later {second} put the {thing} {after}."
    )
    return Item(passage, f"Are the {thing} {after if yes else before} now?")


def _opening(yes: bool, rng: random.Random) -> Item:
    (one, two), hours = rng.sample(SHOPS, 2), rng.sample(range(len(HOURS)), 2)
    early, late = sorted(hours)
    passage = (
        f"The {one} opens at {HOURS[early]}. The {two} across the road opens at {HOURS[late]}."
    )
    pair = (one, two) if yes else (two, one)
    return Item(passage, f"Does the {pair[0]} open before the {pair[1]}?")


def _pets(yes: bool, rng: random.Random) -> Item:
    (one, two), (his, hers) = rng.sample(PEOPLE, 2), rng.sample(ANIMALS, 2)
    passage = f"{one} keeps {his} in a small flat. {rng.choice(FILLERS)} {two}, who lives upstairs, has {hers}."
    return Item(passage, f"Does {one} have {his if yes else hers}?")


def _jobs(yes: bool, rng: random.Random) -> Item:
    (one, two), (city, town) = rng.sample(PEOPLE, 2), rng.sample(CITIES, 2)
    job, other = rng.sample(JOBS, 2)
    passage = f"{one} works as a {job} in {city}. {two} is a {other} in {town}."
    who, where = rng.choice(((one, city), (two, town)))
    asked = where if yes else (town if where == city else city)
    return Item(passage, f"Does {who} work in {asked}?")


def _cancelled(yes: bool, rng: random.Random) -> Item:
    event, (true, wrong) = rng.choice(EVENTS), rng.sample(REASONS, 2)
    city = rng.choice(CITIES)
    passage = (
        f"The {event} in {city} was called off because of {true}. "
        f"People had first thought that {wrong} was to blame."
    )
    return Item(passage, f"Was the {event} called off because of {true if yes else wrong}?")


def _ordered(yes: bool, rng: random.Random) -> Item:
    one, two, three = rng.sample(PEOPLE, 3)
    passage = (
        f"{one} reached the hut before {two}. {two} was there before {three}. {rng.choice(FILLERS)}"
    )
    pair = (one, three) if yes else (three, one)
    return Item(passage, f"Was {pair[0]} at the hut before {pair[1]}?")


def _everyone_but(yes: bool, rng: random.Random) -> Item:
    one, two, three = rng.sample(PEOPLE, 3)
    event = rng.choice(EVENTS)
    passage = (
        f"{one}, {two} and {three} had tickets for the {event}. "
        f"All of them went, except {two}, who had caught a cold."
    )
    return Item(passage, f"Did {rng.choice((one, three)) if yes else two} go to the {event}?")


def _counted(yes: bool, rng: random.Random) -> Item:
    who, food = rng.choice(PEOPLE), rng.choice(FOODS)
    had, gone = rng.randint(8, 20), rng.randint(2, 6)
    left = had - gone
    asked = left if yes else left + rng.choice((-1, 1, 2))
    passage = f"There were {had} {food} in the basket. {who} took {gone} of them to a neighbour."
    return Item(passage, f"Are {asked} {food} left in the basket?")


def _gave(yes: bool, rng: random.Random) -> Item:
    one, two = rng.sample(PEOPLE, 2)
    thing = rng.choice(OBJECTS)
    passage = f"{one} lent {two} the {thing} on Monday. {rng.choice(FILLERS)} On Friday {two} still had them."
    giver, taker = (one, two) if yes else (two, one)
    return Item(passage, f"Did {giver} lend the {thing} to {taker}?")


def _promised(yes: bool, rng: random.Random) -> Item:
    (one, two), (city, other) = rng.sample(PEOPLE, 2), rng.sample(CITIES, 2)
    passage = (
        f"{one} wanted to spend the summer in {city}. {two} talked about {other} until {one} gave in, "
        f"and they booked two seats."
    )
    return Item(passage, f"Did they book seats to {other if yes else city}?")


FORMS: tuple[Callable[[bool, random.Random], Item], ...] = (
    _moved, _opening, _pets, _jobs, _cancelled, _ordered, _everyone_but, _counted, _gave, _promised,
)  # fmt: skip
