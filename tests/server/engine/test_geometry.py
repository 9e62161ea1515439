import random
import re

import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange

from calibrators.interface import Prompt, Span
from server.engine.geometry import Geometry, geometry_of, images_of

IMAGE = 900


def encode(text, special=False):
    """A token per word with the space before it, per mark and per image; `<s>` in front."""
    ids, characters = ([1], [(0, 0)]) if special else ([], [])
    for match in re.finditer(r"<image>| ?\w+|.", text, re.DOTALL):
        ids.append(IMAGE if match[0] == "<image>" else 100 + len(match[0]))
        characters.append(match.span())
    return ids, characters


def expanded(text, size=4, special=False, marker=1):
    """What the engine gets for a text: each image as `size` tokens."""
    tokens, ranges = [], []
    for token in encode(text, special)[0]:
        if token != IMAGE:
            tokens.append(token)
        else:
            ranges.append(PlaceholderRange(len(tokens), size))
            tokens += [IMAGE] * size
    return {"prompt_token_ids": tokens, "prompt": text, "mm_placeholders": {"image": ranges}}


def at(text, *words):
    """Spans of characters of these words, the last occurrence of each."""
    return tuple(Span(text.rindex(word), text.rindex(word) + len(word)) for word in words)


def test_images_question_and_content_words():
    text = "USER: <image>\nWhat is the colour? ASSISTANT:"
    found = geometry_of(expanded(text), at(text, "What is the colour?"), encode)
    # USER : space i i i i newline What is the colour ? ASSISTANT :
    prompt = Prompt(15, (Span(3, 7),), (Span(8, 13),), (Span(11, 12),))
    assert found == Geometry(prompt, True)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_text_around_several_images(special, size):
    text = "U: <image>\nold A: B U: near <image><image> far A:"
    engine_input = expanded(text, size, special)
    found = geometry_of(engine_input, at(text, "near", "far"), encode).prompt
    tokens = engine_input["prompt_token_ids"]
    assert [len(range(s.start, s.stop)) for s in found.images] == [size] * 3
    assert all(tokens[s.start : s.stop] == [IMAGE] * size for s in found.images)
    near, far = found.query
    assert (near.stop - near.start, tokens[near.start]) == (1, 105)
    # A space stands between the first and the images.
    assert near.stop + 1 == found.images[1].start
    assert far.start == found.images[2].stop
    # "near" is a preposition.
    assert found.content == (far,)
    assert found.length == len(tokens)


def test_an_image_with_marks_in_it_is_several_spans():
    mask = torch.tensor([False, True, True, False, True, True, False])
    ranges = [PlaceholderRange(20, 3), PlaceholderRange(2, 7, is_embed=mask)]
    found = images_of({"image": ranges, "audio": [PlaceholderRange(40, 2)]})
    assert found.images == (Span(3, 5), Span(6, 8), Span(20, 23))
    assert found.extents == (Span(3, 8), Span(20, 23))


def test_images_without_marks_are_their_own_extents():
    found = images_of({"image": [PlaceholderRange(9, 2), PlaceholderRange(2, 3)]})
    assert (found.images, found.extents) == ((Span(2, 5), Span(9, 11)), ())


def test_tokens_in_a_placeholder_are_no_question():
    text = "say <image> it"
    engine_input = expanded(text)
    found = geometry_of(engine_input, (Span(0, len(text)),), encode).prompt
    assert found.query == (Span(0, 2), Span(6, 7))


def test_a_word_in_pieces_is_one_content_word():
    def pieces(text, special):
        return ([7, 8, 9, IMAGE], [(0, 3), (3, 5), (5, 8), (8, 15)])

    engine_input = {
        "prompt_token_ids": [7, 8, 9, IMAGE, IMAGE],
        "prompt": "elephant<image>",
        "mm_placeholders": {"image": [PlaceholderRange(3, 2)]},
    }
    found = geometry_of(engine_input, (Span(0, 8),), pieces).prompt
    assert found.content == found.query == (Span(0, 3),)


def test_several_tokens_may_stand_for_an_image_and_none():
    for marker in ([], [51, 52, 53]):
        engine_input = {
            "prompt_token_ids": [IMAGE, IMAGE, 5, 5, 6],
            "prompt": "x",
            "mm_placeholders": {"image": [PlaceholderRange(0, 2)]},
        }
        ids = [*marker, 5, 5, 6]
        characters = [(i, i + 1) for i in range(len(ids))]
        words = (Span(len(marker), len(marker) + 2),)
        found = geometry_of(engine_input, words, lambda *_, i=ids, c=characters: (i, c))
        assert found.prompt.query == (Span(2, 4),)


@pytest.mark.parametrize("words", [None, ()])
def test_without_words_there_are_images(words):
    found = geometry_of(expanded("a <image> b"), words, encode)
    assert found == Geometry(Prompt(7, (Span(2, 6),)), words is not None)


@pytest.mark.parametrize(
    "changed", [{"prompt": "other text <image>"}, {"prompt": ""}, {"prompt_token_ids": [1, 2, 3]}]
)
def test_tokens_of_another_text_are_no_question(changed):
    text = "a <image> b"
    found = geometry_of(expanded(text) | changed, at(text, "b"), encode)
    assert (found.question, found.prompt.query) == (False, ())
    assert found.prompt.images == (Span(2, 6),)


def test_a_tokenizer_without_offsets_tells_nothing():
    text = "a <image> b"
    assert not geometry_of(expanded(text), at(text, "b"), lambda *_: None).question


def test_text_alone_has_no_geometry():
    found = geometry_of({"prompt_token_ids": [1, 2], "prompt": "a b"}, at("a b", "b"), encode)
    assert found == Geometry(Prompt(2), True)


def test_long_conversations_are_aligned_quickly():
    draw = random.Random(0)
    turns = ["<image>" * draw.randrange(3) + " aaa" * draw.randrange(40) for _ in range(60)]
    text = "\n".join(turns) + "\nwhy"
    found = geometry_of(expanded(text, 7), at(text, "why"), encode)
    assert found.question
    assert found.prompt.query[-1].stop == found.prompt.length
