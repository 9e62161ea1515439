import asyncio
import json

import pytest
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask

from server.aliases import Alias, aliases, answered_as
from server.presets import PresetError

NAME = 'served"\\:calm'


def test_every_served_name_under_every_preset():
    assert aliases(["m", "n"], ["calm", "mild"]) == {
        "m:calm": Alias("m", "calm"),
        "n:calm": Alias("n", "calm"),
        "m:mild": Alias("m", "mild"),
        "n:mild": Alias("n", "mild"),
    }
    assert aliases(["m"], []) == {}


def test_a_served_name_that_would_be_an_alias_is_refused():
    with pytest.raises(PresetError, match="preset 'calm': a model is served as m:calm"):
        aliases(["m", "m:calm"], ["mild", "calm"])


def test_an_answer_keeps_all_but_its_model():
    task = BackgroundTask(lambda: None)
    body = {"id": "1", "model": "served", "choices": [{"text": '"model":"served"'}]}
    response = JSONResponse(body, headers={"X-Load": "3"}, background=task)
    renamed = answered_as(response, NAME)
    assert json.loads(renamed.body) == body | {"model": NAME}
    assert (renamed.headers["X-Load"], renamed.background) == ("3", task)
    assert renamed.headers["content-length"] == str(len(renamed.body))


@pytest.mark.parametrize(
    "response", [None, JSONResponse({"error": {}}, 404), PlainTextResponse("text")]
)
def test_errors_and_other_answers_stay(response):
    assert answered_as(response, NAME) is response


def stream(*chunks):
    async def lines():
        for chunk in chunks:
            yield chunk

    async def collect():
        return [
            chunk async for chunk in answered_as(StreamingResponse(lines()), NAME).body_iterator
        ]

    return asyncio.run(collect())


@pytest.mark.parametrize("text", ["word", '"model":"served"', '\\"model":"served', '{"model":"x"}'])
@pytest.mark.parametrize("before", [{}, {"id": 'a"model":"served"'}])
def test_every_chunk_of_a_stream_is_renamed_and_no_text(text, before):
    bodies = [
        {**before, "model": "served", "choices": [{"text": text}]},
        {**before, "choices": [{"text": text}], "model": 'ser"ved\\'},
    ]
    chunks = [f"data: {json.dumps(body, separators=(',', ':'))}\n\n" for body in bodies]
    found = stream(*chunks, ": ping\n\n", "data: [DONE]\n\n")
    assert found[2:] == [": ping\n\n", "data: [DONE]\n\n"]
    for body, chunk in zip(bodies, found, strict=False):
        assert json.loads(chunk.removeprefix("data: ")) == body | {"model": NAME}
