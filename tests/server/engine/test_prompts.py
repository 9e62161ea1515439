import asyncio
from types import SimpleNamespace

import pytest
from vllm.multimodal.inputs import PlaceholderRange

from calibrators.interface import Prompt, Span
from server.engine import wording
from server.engine.geometry import Geometry
from server.engine.payload import KEY, Payload
from server.engine.prompts import inspect

TOKENS = {"type": "token", "prompt_token_ids": [1, 2, 3]}
CALIBRATED = {KEY: Payload("ticket", ()).to_extra_args()}


@pytest.fixture
def engine():
    """An engine client that notes when its output is read."""

    class Engine:
        def __init__(self):
            self.calls = []
            model = SimpleNamespace(is_encoder_decoder=False)
            self.vllm_config = SimpleNamespace(model_config=model)

        async def generate(self, *args, **kwargs):
            self.calls.append((args, kwargs))
            yield "output"

    return Engine()


def sampling(extra_args):
    return SimpleNamespace(extra_args=extra_args)


def read(outputs):
    async def collect():
        return [output async for output in outputs]

    return asyncio.run(collect())


def test_prompts_are_seen_and_passed_on(engine):
    seen = []
    inspect(engine, lambda ticket, geometry: seen.append((ticket, geometry)))
    params = sampling(CALIBRATED)
    assert read(engine.generate(TOKENS, params, "id", priority=1)) == ["output"]
    assert read(engine.generate(prompt=TOKENS, sampling_params=params, request_id="id"))
    assert seen == [("ticket", Geometry(Prompt(3)))] * 2
    assert engine.calls[0] == ((TOKENS, params, "id"), {"priority": 1})
    assert params.extra_args == CALIBRATED


def test_images_and_words_travel_with_a_request_that_wants_them(engine):
    class Tokenizer:
        is_fast = True

        def __call__(self, text, *, add_special_tokens, return_offsets_mapping):
            assert (text, return_offsets_mapping) == ("<i>red?", True)
            ids, offsets = [9, 5, 6], [(0, 3), (3, 6), (6, 7)]
            return {
                "input_ids": [1, *ids] if add_special_tokens else ids,
                "offset_mapping": [(0, 0), *offsets] if add_special_tokens else offsets,
            }

    engine.renderer = SimpleNamespace(get_tokenizer=Tokenizer)
    prompt = {
        "prompt_token_ids": [1, 9, 9, 9, 5, 6],
        "prompt": "<i>red?",
        "mm_placeholders": {"image": [PlaceholderRange(1, 3)]},
    }
    seen = []
    inspect(engine, lambda ticket, geometry: seen.append(geometry))
    first, second = sampling(CALIBRATED), sampling(CALIBRATED)
    with wording.wanted() as words:
        words.spans = (Span(3, 7),)
        engine.generate(prompt, first, "id")
        engine.generate({**prompt, "prompt_token_ids": None, "prompt_embeds": [0] * 4}, second, "i")
    image, query = (Span(1, 4),), (Span(4, 6),)
    assert seen[0] == Geometry(Prompt(6, image, query, (Span(4, 5),)), True)
    assert Payload.from_extra_args(first.extra_args) == Payload("ticket", (), prompt=seen[0].prompt)
    assert seen[1] == Geometry(Prompt(4))
    assert Payload.from_extra_args(second.extra_args).prompt == Prompt(4)


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_plain_prompts_are_not_looked_at(engine, extra_args):
    inspect(engine, lambda ticket, length: pytest.fail("a plain prompt"))
    assert read(engine.generate(object(), sampling(extra_args), "id")) == ["output"]


def test_a_refusal_comes_before_anything_is_read(engine):
    def refuse(ticket, length):
        raise ValueError("too long")

    inspect(engine, refuse)
    with pytest.raises(ValueError, match="too long"):
        engine.generate(TOKENS, sampling(CALIBRATED), "id")
    assert engine.calls == []
