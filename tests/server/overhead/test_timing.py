import pytest

from server.evaluation.api import ApiFailure, Refused
from server.overhead.prompts import Tokens
from server.overhead.timing import timed

pytestmark = pytest.mark.anyio
PROMPTS = Tokens([1, 2, 3], 7, seed=0)


async def ask(connect, calibration=None, tokens=3, **options):
    fake, api = await connect(**options)
    found = await timed(api, PROMPTS, PROMPTS.fields(), calibration, tokens)
    return fake, found


async def test_times_are_those_of_the_first_token_and_of_further_ones(connect):
    _, found = await ask(connect, "act", tokens=5, slower={"act": 2.0})

    assert found.ttft == 2.0
    assert found.tpot == pytest.approx(0.2)
    assert (found.prompt_tokens, found.output_tokens) == (7, 5)
    assert found.digest == "0123456789ab"


async def test_one_token_has_no_further_ones(connect):
    _, found = await ask(connect, tokens=1)

    assert (found.ttft, found.tpot, found.digest) == (1.0, None, None)


async def test_lengths_and_choice_of_tokens_are_fixed(connect):
    fake, _ = await ask(connect, tokens=3)
    ((path, body),) = fake.requests

    assert path == "/v1/completions"
    assert len(body.pop("prompt")) == 7
    assert body == {
        "model": "fake",
        "temperature": 0,
        "calibration": "none",
        "max_tokens": 3,
        "min_tokens": 3,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("calibration", "flaw", "message"),
    [
        (None, "calibrated", "a plain request came back calibrated"),
        (None, "too short", "7 prompt tokens gave 2 in 2 chunks"),
        (None, "fails", "the stream ends with an error: not finite"),
        (None, "bad chunk", "a chunk that is no JSON object: nonsense"),
        (None, "breaks", "the request failed: ReadError"),
        (None, "no JSON", "/v1/completions answers 502: <html>"),
        ("act", "no receipt", "came back without a receipt"),
        ("act", "skips", "left alone by a method: no word with a meaning"),
        ("act", "nothing", "counts no calibrated token"),
    ],
)
async def test_an_answer_that_is_not_as_asked_is_no_figure(connect, calibration, flaw, message):
    with pytest.raises(ApiFailure, match=message) as caught:
        await ask(connect, calibration, flaws={calibration or "none": flaw})
    assert not isinstance(caught.value, Refused)


async def test_a_refusal_is_told_apart(connect):
    with pytest.raises(Refused, match=r"^status 400: calibration: more is needed$"):
        await ask(connect, "act", flaws={"act": "refused"})
