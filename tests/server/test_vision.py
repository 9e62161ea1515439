import pytest

from calibrators.interface import Bound, Prompt, Span
from server.admission import Admitted, Refusal
from server.engine.geometry import Geometry
from server.vision import check_images

IMAGES = (Span(1, 5),)


@pytest.fixture
def offer(make_calibrator):
    return {
        "text": make_calibrator("text"),
        "sees": make_calibrator("sees", modality="vision"),
        "reads": make_calibrator("reads", modality="vision", reads_query=True),
    }


def admitted(*names):
    bounds = tuple(Bound(name, {}, 1, 1) for name in names)
    paths = tuple(f"calibration[{index}]" for index in range(len(names)))
    return Admitted(bounds, "ab" * 32, True, True, paths=paths)


def test_text_methods_need_nothing(offer):
    check_images(offer, admitted("text"), Geometry(Prompt(9)))


@pytest.mark.parametrize("names", [("sees",), ("reads", "text"), ("sees", "reads")])
def test_a_prompt_with_image_and_question_has_all(offer, names):
    check_images(offer, admitted(*names), Geometry(Prompt(9, IMAGES), question=True))


@pytest.mark.parametrize("question", [True, False])
def test_without_an_image_a_vision_method_is_refused(offer, question):
    with pytest.raises(Refusal, match=r"Sees needs an image.*image_url") as caught:
        check_images(offer, admitted("text", "sees"), Geometry(Prompt(9), question))
    refusal = caught.value
    assert (refusal.reason, refusal.param, refusal.method) == ("no_image", "calibration[1]", "sees")


def test_without_the_question_only_a_method_that_reads_it_is_refused(offer):
    geometry = Geometry(Prompt(9, IMAGES), question=False)
    check_images(offer, admitted("sees"), geometry)
    with pytest.raises(Refusal, match="Reads looks at the text of the last user message") as caught:
        check_images(offer, admitted("sees", "reads"), geometry)
    assert (caught.value.reason, caught.value.param) == ("unsupported_feature", "calibration[1]")
