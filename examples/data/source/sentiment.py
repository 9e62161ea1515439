"""Short reviews whose writer was pleased or not.

Merits and faults are listed for each kind of thing, and reviews of either label draw on both lists:
a pleased writer admits a fault, an annoyed one a merit, and what others say or what was expected
goes the other way. The writer's own mind decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LABELS = ("positive", "negative")


@dataclass(frozen=True)
class Kind:
    """A kind of thing that is reviewed: its merits and faults, as clauses."""

    thing: str
    merits: tuple[str, ...]
    faults: tuple[str, ...]


KINDS = (
    Kind(
        "restaurant",
        (
            "the soup tasted as if somebody's grandmother had made it",
            "our waiter remembered every order without writing it down",
            "the bread came warm from the oven",
            "we got a table by the window without booking",
            "the bill was smaller than I had feared",
            "they made a separate plate for my daughter, who cannot eat nuts",
        ),
        (
            "we waited fifty minutes for a salad",
            "the fish was cold in the middle",
            "the music was so loud that we had to shout",
            "they charged us for water we never ordered",
            "the table wobbled all evening",
            "half of the menu had run out by eight",
        ),
    ),
    Kind(
        "hotel",
        (
            "the bed was the softest I have slept in for years",
            "breakfast was served until noon",
            "the porter carried our bags up four flights of stairs",
            "you can see the harbour from the bath",
            "the rooms stayed cool even in August",
            "they let us keep the room until the evening",
        ),
        (
            "the walls are so thin that I heard my neighbour's alarm clock",
            "there was hair in the shower",
            "the lift was out of order for our whole stay",
            "the pool had been closed since spring",
            "the receptionist did not look up from her phone",
            "they lost our booking twice",
        ),
    ),
    Kind(
        "film",
        (
            "the last twenty minutes had me holding my breath",
            "the two leads play off each other like old friends",
            "every frame could hang on a wall",
            "I laughed until my sides ached",
            "the score stayed with me for days",
            "it trusts the audience to work things out",
        ),
        (
            "the plot falls apart after an hour",
            "half of the jokes are older than I am",
            "the dialogue sounds as if a committee wrote it",
            "I looked at my watch four times",
            "the villain has no reason to do anything he does",
            "it steals its best scene from another picture",
        ),
    ),
    Kind(
        "phone",
        (
            "the battery lasts two full days",
            "photos come out sharp even at night",
            "it survived a fall down the stairs",
            "it starts in a few seconds",
            "calls are clear even on the train",
            "it took ten minutes to move everything over from my old one",
        ),
        (
            "the screen scratched within a week",
            "it gets hot when I make a video call",
            "the speaker crackles",
            "it froze three times on the first day",
            "the buttons are where my thumb always hits them by accident",
            "the charger was not in the box",
        ),
    ),
    Kind(
        "novel",
        (
            "I read the second half in one night",
            "the narrator is somebody I would like to meet",
            "the ending made me turn back to page one",
            "you can smell the sea in every chapter",
            "the dialogue sounds like people I know",
            "not a single sentence is wasted",
        ),
        (
            "nothing happens before page two hundred",
            "the translation is full of mistakes",
            "all the characters talk in the same voice",
            "the mystery is solved by a coincidence",
            "it repeats itself as if we had forgotten",
            "the middle could have been cut by half",
        ),
    ),
    Kind(
        "course",
        (
            "the teacher answered every question the same evening",
            "I could use what I learned the next morning at work",
            "the exercises build on each other",
            "the group was small enough for everyone to speak",
            "the slides can be downloaded and kept",
            "hard things were explained with everyday examples",
        ),
        (
            "the videos stopped halfway through",
            "the teacher read from the slides",
            "we spent the first two hours on introductions",
            "the homework was never looked at",
            "the examples were ten years out of date",
            "it ended without the certificate they had promised",
        ),
    ),
    Kind(
        "vacuum cleaner",
        (
            "it picks up dog hair in one go",
            "it is quiet enough to use while the baby sleeps",
            "it weighs next to nothing on the stairs",
            "emptying it takes five seconds",
            "it reaches under the sofa without moving it",
            "spare parts are easy to find",
        ),
        (
            "the cable is too short for one room",
            "the handle came off in the second month",
            "it pushes crumbs around instead of lifting them",
            "it smells of burning rubber",
            "the filter clogs every week",
            "it will not stand up by itself",
        ),
    ),
    Kind(
        "train journey",
        (
            "we arrived four minutes early",
            "the seats had room for long legs",
            "the conductor held the door for a running family",
            "the view over the valley was worth getting up for",
            "the wireless network worked even in the tunnels",
            "the carriage was clean down to the windows",
        ),
        (
            "our reserved seats did not exist",
            "the heating could not be turned off",
            "we missed our connection and had to wait two hours",
            "no announcement told us why we had stopped",
            "the only toilet was locked",
            "the snack trolley never came past",
        ),
    ),
)

VERDICTS = {
    "positive": (
        "I would do it all over again.",
        "I have told all my friends about it.",
        "It was money well spent.",
        "We left with a smile.",
        "I could not ask for more at this price.",
        "It has won me over.",
        "I will be back before the year is out.",
        "I have no regrets.",
    ),
    "negative": (
        "I would not do it again.",
        "I have warned all my friends about it.",
        "I want my money back.",
        "We left with a headache.",
        "I expected far more at this price.",
        "It has lost me.",
        "I will not be back in a hurry.",
        "I regret it.",
    ),
}


def review(label: str, rng: random.Random) -> str:
    """A review by a writer of this mind."""
    kind = rng.choice(KINDS)
    own, other = kind.merits, kind.faults
    if label == "negative":
        own, other = other, own
    write = rng.choice(FORMS)
    return write(kind.thing, rng.sample(own, 2), rng.choice(other), rng.choice(VERDICTS[label]))


def _agreed(thing: str, own: Sequence[str], _: str, verdict: str) -> str:
    return f"A few words on the {thing}: {own[0]}, and {own[1]}. {verdict}"


def _conceded(thing: str, own: Sequence[str], other: str, verdict: str) -> str:
    return f"It is true of this {thing} that {other}. But {own[0]}. {verdict}"


def _admitted_late(thing: str, own: Sequence[str], other: str, verdict: str) -> str:
    return f"{verdict} The {thing} in short: {own[0]}, even if {other}."


def _expected(thing: str, own: Sequence[str], other: str, verdict: str) -> str:
    return f"I had read about this {thing} that {other}. I found that {own[0]}. {verdict}"


def _disputed(thing: str, own: Sequence[str], other: str, verdict: str) -> str:
    return (
        f"Of the same {thing} my sister says that {other}. I can only say that {own[0]}. {verdict}"
    )


def _first_weighs(thing: str, own: Sequence[str], other: str, _: str) -> str:
    return (
        f"Two things about the {thing}. One is that {own[0]}, the other that {other}. "
        "For me the first outweighs the second by far."
    )


def _second_weighs(thing: str, own: Sequence[str], other: str, _: str) -> str:
    return (
        f"Two things about the {thing}. One is that {other}, the other that {own[0]}. "
        "For me the second outweighs the first by far."
    )


FORMS: tuple[Callable[[str, Sequence[str], str, str], str], ...] = (
    _agreed,
    _conceded,
    _admitted_late,
    _expected,
    _disputed,
    _first_weighs,
    _second_weighs,
)
