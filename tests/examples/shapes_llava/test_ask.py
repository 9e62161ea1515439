"""The embedded checkpoint, asked about fixed pictures."""

import numpy as np
import pytest

from examples.shapes_llava.ask import Model
from examples.shapes_llava.questions import DESCRIBE, turns
from examples.shapes_llava.scenes import SIZE, Kind, Scene, Thing, draw, scenes
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


def test_most_questions_about_usual_scenes_are_answered_right(model):
    rng = np.random.default_rng(1)
    asked = [(draw(scene), turn) for scene in scenes(1, 40) for turn in turns(scene, rng, 4)]

    answers = model.answers([shown for shown, _ in asked], [turn.question for _, turn in asked])

    right = sum(answer == turn.answer for answer, (_, turn) in zip(answers, asked, strict=True))
    # docs/hallucination.md has the figures.
    assert right / len(asked) > 0.78


def test_answers_do_not_depend_on_the_batch(model, picture):
    questions = [DESCRIBE, "Is there a red circle in the image?"]
    alone = [answer for each in questions for answer in model.answers([picture], [each])]

    assert model.answers([picture, picture], questions) == alone
