import base64
import io

import numpy as np
import pytest
from PIL import Image

from examples.shapes_llava import samples
from examples.shapes_llava.questions import presence
from examples.shapes_llava.scenes import draw, scenes
from server.evaluation.samples import read

COUNT = 6


@pytest.fixture
def written(tmp_path):
    file = tmp_path / "shapes.jsonl"
    assert samples.main(["--scenes", str(COUNT), "--seed", "3", "--out", str(file)]) == 0
    return read(file, images=True)


def parts(sample):
    """URL of the picture, and the question."""
    image, text = sample.messages[0]["content"]
    return image["image_url"]["url"], text["text"]


def test_each_scene_is_asked_about_what_is_missing_and_what_is_there(written):
    asked = [(parts(sample)[1], sample.answer) for sample in written.samples]

    for index, scene in enumerate(scenes(3, COUNT, broken=True)):
        absent, present = asked[2 * index : 2 * index + 2]
        assert absent == (presence(scene.missing[0]), "No")
        assert present in [(presence(kind), "Yes") for kind in scene.kinds]


def test_pictures_are_those_of_the_scenes(written):
    for index, scene in enumerate(scenes(3, COUNT, broken=True)):
        for sample in written.samples[2 * index : 2 * index + 2]:
            content = base64.b64decode(parts(sample)[0].removeprefix("data:image/png;base64,"))
            shown = Image.open(io.BytesIO(content)).convert("RGB")
            np.testing.assert_array_equal(np.asarray(shown), np.asarray(draw(scene)))


def test_no_scene_is_in_both_splits(written):
    splits = {split: written.part(split) for split in ("search", "report")}
    search, report = ({parts(sample)[0] for sample in each} for each in splits.values())

    assert len(search) == len(report) == COUNT // 2
    assert not search & report
    assert written.scoring == "logprob"
