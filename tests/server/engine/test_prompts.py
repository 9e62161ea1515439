import asyncio
from types import SimpleNamespace

import pytest

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
    inspect(engine, lambda ticket, length: seen.append((ticket, length)))
    params = sampling(CALIBRATED)
    assert read(engine.generate(TOKENS, params, "id", priority=1)) == ["output"]
    assert read(engine.generate(prompt=TOKENS, sampling_params=params, request_id="id"))
    assert seen == [("ticket", 3)] * 2
    assert engine.calls[0] == ((TOKENS, params, "id"), {"priority": 1})


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
