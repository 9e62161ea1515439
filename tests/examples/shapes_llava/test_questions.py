import re

import numpy as np
import pytest

from examples.shapes_llava.questions import DESCRIBE, caption, presence, turns, with_article
from examples.shapes_llava.scenes import SIZE, Kind, Scene, Thing, scenes

CIRCLE, STAR = Kind("yellow", "circle"), Kind("orange", "star")
SQUARE = Kind("green", "square")


def scene(*placed):
    things = (Thing(kind, x * SIZE, y * SIZE, 10.0, 0.0, (0, 0, 0)) for kind, x, y in placed)
    return Scene(tuple(things), background=0)


def asked(about, count=60):
    """Everything that is asked about a scene, sooner or later."""
    rng = np.random.default_rng(0)
    return {t.question: t.answer for _ in range(count) for t in turns(about, rng)}


@pytest.mark.parametrize(
    ("placed", "expected"),
    [
        ([(STAR, 0.1, 0.1)], "There is an orange star."),
        ([(SQUARE, 0.9, 0.1), (STAR, 0.1, 0.1)], "There is an orange star and a green square."),
        (
            [(CIRCLE, 0.9, 0.9), (SQUARE, 0.1, 0.6), (STAR, 0.1, 0.1)],
            "There is an orange star, a yellow circle and a green square.",
        ),
        ([(SQUARE, 0.1, 0.9), (CIRCLE, 0.1, 0.1)], "There is a yellow circle and a green square."),
    ],
)
def test_captions_list_row_by_row_and_companions_after_what_they_belong_to(placed, expected):
    assert caption(scene(*placed)) == expected


def test_captions_name_every_object_once():
    for each in scenes(0, 100):
        words = caption(each)
        assert all(words.count(with_article(kind)) == 1 for kind in each.kinds)


def test_answers_are_true():
    answers = asked(scene((CIRCLE, 0.2, 0.8), (STAR, 0.8, 0.1)))

    assert answers[presence(CIRCLE)] == "Yes"
    assert answers["Is there an orange star?"] == "Yes"
    assert answers["Can you see an orange circle?"] == "No"
    assert answers["How many objects are there?"] == "2"
    assert answers["How many stars are there?"] == "1"
    assert answers["How many crosses are there?"] == "0"
    assert answers["How many yellow objects are there?"] == "1"
    assert answers["What colour is the star?"] == "Orange"
    assert answers["What shape is the yellow object?"] == "Circle"
    assert answers["Where is the yellow circle?"] == "Bottom left"
    assert answers["Where is the orange star?"] == "Top right"
    assert answers[DESCRIBE] == "There is an orange star and a yellow circle."


def test_nothing_is_asked_whose_answer_is_not_one():
    answers = asked(scene((CIRCLE, 0.2, 0.8), (Kind("yellow", "star"), 0.8, 0.1)))

    assert "What shape is the yellow object?" not in answers


def test_presence_is_answered_yes_and_no_alike_often_and_truly():
    rng = np.random.default_rng(1)
    said = []
    for each in scenes(1, 300):
        for turn in turns(each, rng):
            found = re.match(r"(?:Is there|Can you see) an? (\w+) (\w+)", turn.question)
            if found:
                said.append(turn.answer)
                assert turn.answer == ("Yes" if Kind(*found.groups()) in each.kinds else "No")

    assert 0.4 < said.count("Yes") / len(said) < 0.6


def test_turns_are_of_different_questions_one_of_them_a_caption():
    made = turns(next(scenes(0, 1)), np.random.default_rng(0), 5)

    assert len({turn.question for turn in made}) == 6
    assert sum(turn.answer.startswith("There is") for turn in made) == 1
