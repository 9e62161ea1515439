import numpy as np
import pytest

from benchmarks.objects import (
    Judged,
    Occurrences,
    caption_shares,
    exact_share,
    mentioned,
    question_shares,
    yes_or_no,
)
from examples.shapes_llava.scenes import Kind, Scene, Thing, scenes

STAR, CIRCLE, SQUARE = Kind("red", "star"), Kind("yellow", "circle"), Kind("blue", "square")


def scene(*kinds):
    return Scene(tuple(Thing(kind, 10, 10, 5, 0, (0, 0, 0)) for kind in kinds), background=0)


def values(shares):
    return {name: share.value for name, share in shares.items()}


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("There is a red star and a yellow circle.", {STAR, CIRCLE}),
        ("A Red  Star, a red star", {STAR}),
        ("a red and yellow circle", {CIRCLE}),
        ("a redstar, a red starfish", set()),
        ("nothing", set()),
    ],
)
def test_kinds_are_found_in_captions(text, kinds):
    assert mentioned(text) == kinds


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes", True), (" no.", False), ("Yes, there is", True), ("Nothing", None), ("", None)],
)
def test_answers_begin_with_yes_or_no(text, said):
    assert yes_or_no(text) is said


def test_captions_are_scored_by_what_they_name():
    shares = caption_shares(
        ["a red star and a yellow circle", "a blue square"],
        [scene(STAR, SQUARE), scene(SQUARE)],
    )

    assert values(shares) == {"chair_s": 0.5, "chair_i": 1 / 3, "recall": 2 / 3}


def test_an_empty_caption_invents_nothing_and_recalls_nothing():
    assert values(caption_shares(["?"], [scene(STAR)])) == {
        "chair_s": 0,
        "chair_i": 0,
        "recall": 0,
    }


def test_questions_are_scored_as_a_classification():
    judged = [
        Judged(0, wanted=True, given=True),
        Judged(0, wanted=True, given=False),
        Judged(1, wanted=False, given=True),
        Judged(1, wanted=False, given=False),
        Judged(1, wanted=False, given=None),
    ]

    # One hit, one missed, one false: F1 is 2 / (2 + 1 + 1).
    assert values(question_shares(judged, 2)) == {
        "accuracy": 2 / 5,
        "f1": 1 / 2,
        "yes": 2 / 5,
        "valid": 4 / 5,
    }


def test_an_answer_that_is_neither_yes_nor_no_misses_what_is_there():
    shares = values(question_shares([Judged(0, wanted=True, given=None)], 1))

    assert (shares["accuracy"], shares["f1"]) == (0, 0)


def test_answers_are_compared_without_case_and_full_stop():
    share = exact_share([["red", "Top left"], ["2"]], [["Red.", "Top right"], ["2"]])

    assert share.parts == (1, 1)
    assert share.wholes == (2, 1)


def test_answers_have_to_be_complete():
    with pytest.raises(ValueError):
        exact_share([["a"]], [["a", "b"]])


def test_absent_kinds_are_absent_and_different():
    occurrences = Occurrences(scenes(0, 300))
    rng = np.random.default_rng(0)
    for each in scenes(1, 50):
        for category in ("random", "popular", "adversarial"):
            absent = occurrences.absent(each, category, 3, rng)
            assert len(set(absent)) == 3
            assert not set(absent) & each.kinds


def test_adversarial_kinds_are_those_that_usually_come_along():
    occurrences = Occurrences(scenes(0, 1000))
    rng = np.random.default_rng(0)

    assert occurrences.absent(scene(STAR), "adversarial", 1, rng) == [CIRCLE]


def test_popular_kinds_are_frequent_ones():
    occurrences = Occurrences([scene(STAR), scene(STAR, CIRCLE), scene(SQUARE)])
    drawn = {
        occurrences.absent(scene(SQUARE), "popular", 1, np.random.default_rng(seed))[0]
        for seed in range(60)
    }

    assert {STAR, CIRCLE} <= drawn
    assert len(drawn) == 6
