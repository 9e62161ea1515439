"""The embedded checkpoint, asked about fixed pictures."""

import pytest

from examples.shapes_llava.ask import Model
from examples.shapes_llava.questions import DESCRIBE
from examples.shapes_llava.scenes import SIZE, Kind, Scene, Thing, draw
from server.models import VISION_MODEL, prepare


@pytest.fixture(scope="module")
def model():
    return Model(prepare(VISION_MODEL, report=lambda text: None))


@pytest.fixture(scope="module")
def picture():
    placed = [("red", "circle", 0.2, 0.15), ("blue", "square", 0.85, 0.8)]
    things = (
        Thing(Kind(colour, shape), x * SIZE, y * SIZE, 11.0, 0.0, (0, 0, 0))
        for colour, shape, x, y in placed
    )
    return draw(Scene(tuple(things), background=4))


def test_checkpoint_is_small_and_of_the_usual_kind(model):
    config = model.network.config

    assert model.network.num_parameters() < 10_000_000
    assert (config.model_type, config.vision_config.model_type) == ("llava", "clip_vision_model")
    assert config.text_config.head_dim % 32 == 0


def test_fixed_questions_are_answered_right(model, picture):
    expected = {
        "Is there a red circle in the image?": "Yes",
        "Is there a blue square in the image?": "Yes",
        "Is there a green triangle in the image?": "No",
        "How many objects are there?": "2",
        "What colour is the square?": "Blue",
        "What shape is the red object?": "Circle",
        "Where is the red circle?": "Top left",
        DESCRIBE: "There is a red circle and a blue square.",
    }

    assert model.answers([picture] * len(expected), list(expected)) == [*expected.values()]


def test_answers_do_not_depend_on_the_batch(model, picture):
    questions = [DESCRIBE, "Is there a red circle in the image?"]
    alone = [answer for each in questions for answer in model.answers([picture], [each])]

    assert model.answers([picture, picture], questions) == alone
