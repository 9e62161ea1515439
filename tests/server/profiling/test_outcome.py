import pytest

from server.evaluation.statistics import paired_difference, proportion
from server.profiling.outcome import Accuracies


def outcome(before, after):
    """Of strings with a letter per sample: r right, w wrong, i not valid."""
    sides = [
        [{"accuracy": float(c == "r"), "valid": float(c != "i")} for c in side]
        for side in (before, after)
    ]
    return Accuracies.of(*sides, seed=3)


def test_shares_and_difference_are_those_of_the_samples():
    found = outcome("rrwwi", "rwrri")

    assert found.baseline.accuracy == proportion(2, 5)
    assert found.result.accuracy == proportion(3, 5)
    assert found.baseline.valid == proportion(4, 5)
    assert found.result.among_valid == proportion(3, 4)
    assert found.difference == paired_difference(
        [True, True, False, False, False], [True, False, True, True, False], 3
    )


def test_without_valid_answers_there_is_no_share_of_them():
    assert outcome("ii", "rr").baseline.among_valid is None


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("w" * 20, "r" * 20, "The profile helps"),
        ("w" * 20, "w" * 19 + "r", "No help was shown"),
        ("rw", "wr", "did not help: accuracy on the report samples is the same"),
        ("rr", "rw", "did not help: accuracy on the report samples is lower."),
        ("r" * 20, "w" * 20, "did not help: accuracy on the report samples is lower, signif"),
    ],
)
def test_the_verdict_is_plain(before, after, told):
    assert told in outcome(before, after).verdict
