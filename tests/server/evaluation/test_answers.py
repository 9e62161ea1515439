import pytest

from server.evaluation.answers import matched, normalised


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  Yes.\n", "yes"),
        ("SCI / TECH", "sci tech"),
        ("ﬁne", "fine"),
        ("STRASSE", "strasse"),
        ("...", ""),
    ],
)
def test_case_and_punctuation_do_not_count(text, plain):
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Positive", " positive"),
        ("**positive**, not negative", " positive"),
        ("The review is Negative!", " negative"),
        ("negative or positive?", " negative"),
        ("It is positive, not negative", None),
        ("positively not", None),
        ("nonpositive", None),
        ("It is positive, yes, positive", " positive"),
        ("", None),
        ("I cannot say", None),
    ],
)
def test_a_text_names_one_choice_or_none(text, choice):
    assert matched(text, [" positive", " negative"]) == choice


def test_the_longer_of_two_that_begin_alike_is_meant():
    choices = ["science", "science fiction"]
    assert matched("It is science fiction", choices) == "science fiction"
    assert matched("It is science", choices) == "science"


def test_signs_in_choices_are_no_pattern():
    assert matched("it is (a)", ["(a)", "(b)"]) == "(a)"
