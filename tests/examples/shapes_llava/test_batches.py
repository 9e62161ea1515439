import numpy as np
import pytest
import torch

from examples.shapes_llava.batches import Source
from examples.shapes_llava.scenes import PATCH, SIZE, draw, sample
from examples.shapes_llava.tokens import IMAGE, build_processor, build_tokenizer

PATCHES = (SIZE // PATCH) ** 2


@pytest.fixture(scope="module")
def processor():
    return build_processor(build_tokenizer())


def answers(batch, processor):
    """What a batch wants learnt, answer by answer."""
    text = "".join(processor.tokenizer.decode(row[row >= 0]) for row in batch.targets)
    return [answer.strip() for answer in text.split("</s>") if answer]


def test_batches_come_from_their_seed(processor):
    first, again = (Source(processor, 5, 0.9).conversations(2, 3) for _ in range(2))

    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.pixels, again.pixels)


def test_pixels_are_those_of_the_image_processor(processor):
    source = Source(processor, 3, 0.9)
    pixels, _, _ = source.patches(1)
    picture = draw(sample(np.random.default_rng(3), 0.9))
    expected = processor.image_processor(picture, return_tensors="pt")["pixel_values"]

    torch.testing.assert_close(pixels, expected)


def test_patches_are_labelled_with_colour_and_shape_or_nothing(processor):
    _, colours, shapes = Source(processor, 0, 0.9).patches(8)

    assert colours.shape == shapes.shape == (8, PATCHES)
    assert torch.equal(colours > 0, shapes > 0)
    assert (colours.max(dim=1).values > 0).all()
    assert (colours == 0).float().mean() > 0.5


def test_every_answer_is_learnt_to_its_end(processor):
    batch = Source(processor, 0, 0.9).conversations(4, 5)
    learnt = answers(batch, processor)

    assert len(learnt) == 4 * 6
    assert sum(answer.startswith("There is") for answer in learnt) == 4
    after = processor.tokenizer.decode(batch.tokens[0][batch.targets[0] >= 0])
    assert after.startswith(":")


def test_the_image_has_its_place_in_every_row(processor):
    batch = Source(processor, 0, 0.9).conversations(3, 2)
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)

    assert ((batch.tokens == image).sum(dim=1) == PATCHES).all()


def test_rows_see_no_later_token_and_questions_by_themselves_no_other(processor):
    batch = Source(processor, 0, 0.9).conversations(8, 4)
    visible = batch.visible[:, 0]

    assert not visible.triu(1).any()
    assert visible.diagonal(dim1=1, dim2=2).all()
    for row, seen in zip(batch.positions, visible, strict=True):
        real = int((row > 0).sum()) + 1
        # A row by itself sees as many keys as its position says, whatever comes before it.
        assert torch.equal(seen[:real].sum(dim=1), row[:real] + 1)


def test_some_conversations_are_connected_and_some_are_not(processor):
    batch = Source(processor, 0, 0.9).conversations(24, 4)
    longest = batch.positions.max(dim=1).values
    lengths = batch.visible[:, 0].shape[1]

    assert longest.min() < 0.8 * longest.max() <= lengths
