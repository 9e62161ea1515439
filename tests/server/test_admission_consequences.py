"""What follows from an admitted calibration, and whom a refusal names."""

from __future__ import annotations

import pytest

from calibrators.interface import ColumnMeans, Prefill
from server.admission import Admission, Refusal
from server.presets import Preset


@pytest.fixture
def make_admission(make_facts, make_calibrator):
    """Admission with a method for text, one for images, one that scales heads, one in vain."""

    def make(modality="vision", **options):
        fakes = [
            make_calibrator("words"),
            make_calibrator("sight", modality="vision"),
            make_calibrator("heads", reweights=False),
            make_calibrator(
                "vain",
                observe=lambda self, bound, prompt: [ColumnMeans((), 0)],
                prefill=lambda self, bound: Prefill.SPLIT_LAST,
            ),
        ]
        return Admission({f.name: f for f in fakes}, make_facts(modality=modality), "m", **options)

    return make


def refused(admission, field):
    with pytest.raises(Refusal) as caught:
        admission.admit(field)
    return caught.value


@pytest.mark.parametrize(
    ("field", "vision", "paths"),
    [
        ("words", False, ("calibration",)),
        ("sight", True, ("calibration",)),
        (["words", "heads"], False, ("calibration[0]", "calibration[1]")),
        (["heads", "words"], False, ("calibration[1]", "calibration[0]")),
        (["heads", "sight"], True, ("calibration[1]", "calibration[0]")),
    ],
)
def test_what_is_admitted_says_where_it_was_asked_for_and_what_it_needs(
    make_admission, field, vision, paths
):
    admitted = make_admission().admit(field)
    assert (admitted.vision, admitted.paths) == (vision, paths)


@pytest.mark.parametrize(
    ("field", "question"), [("sight", False), ("asks", True), (["heads", "asks"], True)]
)
def test_words_are_looked_for_where_a_method_reads_them(
    make_calibrator, make_facts, field, question
):
    fakes = [
        make_calibrator("sight", modality="vision"),
        make_calibrator("asks", modality="vision", reads_query=True),
        make_calibrator("heads", reweights=False),
    ]
    admission = Admission({f.name: f for f in fakes}, make_facts(modality="vision"), "m")
    assert admission.admit(field).question is question


def test_no_more_than_two_are_let_in_where_nothing_else_is_said(make_admission):
    admission = make_admission()
    assert refused(admission, ["words", "heads", "heads"]).reason == "malformed"


@pytest.mark.parametrize("name", ["words", "sight", "vain"])
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_what_is_unavailable_is_what_is_refused(make_admission, name, modality):
    admission = make_admission(modality)
    reason = admission.unavailable(admission.calibrators[name])
    if name == "vain" or (name == "sight" and modality == "text"):
        refusal = refused(admission, name)
        assert (refusal.message, refusal.param, refusal.method) == (reason, "calibration", name)
    else:
        assert reason is None
        assert admission.admit(name).methods == (name,)


def test_an_unknown_name_is_answered_with_all_that_is_known(make_admission):
    preset = Preset(name="calm", calibration="words")
    admission = make_admission(presets={"calm": preset})
    known = "this server offers: heads, sight, vain, words"
    assert known in refused(admission, "x").message
    assert refused(admission, "x").message.endswith("words; presets: calm")
    message = refused(admission, ["calm"]).message
    assert message.endswith(f"{known}; the preset of that name stands alone")
