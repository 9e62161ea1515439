import base64
import io

import pytest
from PIL import Image

from server.evaluation.api import ApiFailure
from server.overhead.prompts import CHAT, COMPLETIONS, SIDE, Pictures, Tokens, source

pytestmark = pytest.mark.anyio


def picture(fields):
    url = fields["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def text(fields):
    return fields["messages"][0]["content"][1]["text"]


def test_prompts_have_their_length_in_tokens_of_the_vocabulary():
    prompt = Tokens([3, 5, 8], 500, seed=0).fields()["prompt"]

    assert len(prompt) == 500
    assert set(prompt) == {3, 5, 8}


@pytest.mark.parametrize("make", [lambda seed: Tokens([1, 2], 40, seed), lambda s: Pictures(9, s)])
def test_prompts_are_new_each_time_and_the_same_for_a_seed(make):
    one, same, other = make(1), make(1), make(2)
    drawn = [one.fields() for _ in range(3)]

    assert [same.fields() for _ in range(3)] == drawn
    assert drawn[0] not in drawn[1:] and other.fields() not in drawn


def test_a_picture_is_a_png_beside_words():
    prompts = Pictures(7, seed=0)
    first, second = prompts.fields(), prompts.fields()

    assert len(text(first).split()) == 7
    assert (picture(first).format, picture(first).size) == ("PNG", (SIDE, SIDE))
    assert len(picture(first).getcolors(1 << 20)) > 32
    assert picture(first).tobytes() != picture(second).tobytes()


async def test_tokens_are_those_that_the_server_has_for_words(connect):
    fake, api = await connect()
    prompts = await source(api, 12, 0, pictures=False)

    assert (prompts.path, prompts.length) == (COMPLETIONS, 12)
    assert max(prompts.fields()["prompt"]) < len(fake.tokenise("word " * 100))


async def test_words_beside_a_picture_are_about_as_many_tokens(connect):
    _, api = await connect(vision=True)
    prompts = await source(api, 12, 0, pictures=True)

    # The fake has two tokens for each word.
    assert (prompts.path, prompts.length, len(text(prompts.fields()).split())) == (CHAT, None, 6)


async def test_a_prompt_has_a_word_however_short_it_shall_be(connect):
    _, api = await connect(vision=True)

    assert text((await source(api, 1, 0, pictures=True)).fields())


async def test_no_tokens_are_a_failure(connect):
    _, api = await connect(flaws={"empty": True})

    with pytest.raises(ApiFailure, match="no tokens"):
        await source(api, 12, 0, pictures=False)
