import pytest

from benchmarks.examination import Asked, examine, prepare
from benchmarks.objects import CATEGORIES
from examples.shapes_llava.questions import caption


@pytest.fixture(scope="module")
def examination():
    return prepare(12, seed=5)


def answer(examination, reply):
    return examine(examination, [reply(asked) for asked in examination.questions])


def knowing(examination):
    """An answer to everything that is true."""
    about = {"usual.caption": examination.usual, "broken.caption": examination.broken}
    return lambda a: caption(about[a.part][a.scene]) if a.part in about else a.wanted


def test_examinations_come_from_their_seed(examination):
    again, other = prepare(12, 5), prepare(12, 6)

    assert again.broken == examination.broken != other.broken
    assert [a.text for a in again.questions] == [a.text for a in examination.questions]


def test_true_answers_score_full_marks(examination):
    values = {n: s.value for n, s in answer(examination, knowing(examination)).items()}

    wrong = {"usual.chair_s", "usual.chair_i", "broken.chair_s", "broken.chair_i"}
    assert {values[name] for name in wrong} == {0}
    assert {values.pop(f"{category}.yes") for category in CATEGORIES} == {0.5}
    assert {value for name, value in values.items() if name not in wrong} == {1}


def test_who_always_says_yes_is_right_half_the_time(examination):
    shares = answer(examination, lambda asked: "Yes")

    for category in CATEGORIES:
        assert shares[f"{category}.accuracy"].value == 0.5
        assert shares[f"{category}.f1"].value == pytest.approx(2 / 3)


def test_who_expects_companions_fails_where_they_are_missing(examination):
    """Says what is there, and also what usually comes along."""
    truth = knowing(examination)

    def expecting(asked: Asked):
        scene = examination.broken[asked.scene]
        invented = any(str(kind) in asked.text for kind in scene.missing)
        if asked.part == "broken.caption":
            return truth(asked) + " and a ".join(["", *map(str, scene.missing)])
        return "Yes" if asked.part == "adversarial" and invented else truth(asked)

    shares = answer(examination, expecting)

    assert shares["broken.chair_s"].value == 1
    assert shares["usual.chair_s"].value == 0
    assert shares["adversarial.accuracy"].value < shares["random.accuracy"].value == 1


def test_missing_companions_are_asked_for(examination):
    for index, scene in enumerate(examination.broken):
        about = (a for a in examination.questions if a.scene == index)
        asked = [a.text for a in about if a.part == "adversarial"]
        assert any(str(kind) in text for kind in scene.missing for text in asked)
