import json

import numpy as np
import pytest

from examples.shapes_llava.questions import turns
from examples.shapes_llava.scenes import PATCH, SIZE, draw, scenes
from examples.shapes_llava.tokens import build_processor, build_tokenizer, prefix, question_text
from server.models import VISION_MODEL, prepare

PATCHES = (SIZE // PATCH) ** 2


@pytest.fixture(scope="module")
def processor():
    return build_processor(build_tokenizer())


def conversation(*texts):
    """Messages of user and assistant in turn, an image in the first."""
    content = [{"type": "image"}, {"type": "text", "text": texts[0]}]
    messages = [{"role": "user", "content": content}]
    for index, text in enumerate(texts[1:]):
        messages.append({"role": ("assistant", "user")[index % 2], "content": text})
    return messages


def test_words_of_questions_are_single_tokens(processor):
    rng = np.random.default_rng(3)
    for scene in scenes(3, 50):
        for turn in turns(scene, rng):
            text = f"{turn.question} {turn.answer}"
            words = text.replace("?", " ?").replace(".", " .").replace(",", " ,").split()
            assert len(processor.tokenizer(text, add_special_tokens=False).input_ids) == len(words)


@pytest.mark.parametrize("text", ["Grüße, 漢字 🙂", "tabs\tand\nlines", "  spaces  "])
def test_any_text_comes_back(processor, text):
    tokens = processor.tokenizer(text, add_special_tokens=False).input_ids

    assert processor.tokenizer.decode(tokens) == text


def test_template_writes_what_was_learnt(processor):
    text = processor.apply_chat_template(
        conversation("Is there a star?", "Yes", "Where?"), add_generation_prompt=True
    )
    expanded = processor(images=draw(next(scenes(0, 1))), text=text, add_special_tokens=False)

    learnt = (
        f"<s>{prefix()}{question_text('Is there a star?', True)} Yes</s>"
        f"{question_text('Where?', False)}"
    )
    assert processor.tokenizer.decode(expanded["input_ids"][0]) == learnt


def test_a_picture_of_any_size_takes_as_many_tokens(processor):
    picture = draw(next(scenes(0, 1))).resize((200, 150))
    text = processor.apply_chat_template(conversation("What?"), add_generation_prompt=True)
    read = processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")

    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((read["input_ids"] == image).sum()) == PATCHES
    assert read["pixel_values"].shape == (1, 3, SIZE, SIZE)


def test_the_embedded_tokenizer_is_the_one_that_is_built(processor):
    file = prepare(VISION_MODEL, report=lambda _: None) / "tokenizer.json"
    embedded = json.loads(file.read_text(encoding="utf-8"))
    built = json.loads(processor.tokenizer.backend_tokenizer.to_str())

    assert embedded["model"] == built["model"]
    assert embedded["added_tokens"] == built["added_tokens"]
