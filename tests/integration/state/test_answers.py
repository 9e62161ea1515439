"""Where an answer ends and where a prompt begins: text as vLLM's own, receipts to the token."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.serving import Server
from tests.integration.state.calls import (
    SETTING,
    applied,
    body,
    complete,
    counts,
    prompt,
    streamed,
    wait_until,
    wait_until_idle,
)

IDENTITY = {"method": "zerotuning", "gamma": 1}
TEXT = "The quick brown fox jumps over the lazy dog. The"
STOP_AT = 7


@pytest.fixture(scope="module")
def whole(server: Server) -> Any:
    """A calibrated answer that nothing cuts short, and calibrated rows to its end."""
    answer = complete(server, body(TEXT, SETTING, max_tokens=24, temperature=0))
    assert answer["usage"]["completion_tokens"] == 24
    return answer


@pytest.fixture(scope="module")
def length(whole: Any) -> int:
    """Tokens of the prompt."""
    tokens: int = whole["usage"]["prompt_tokens"]
    return tokens


def last(events: list[Any]) -> tuple[str, Any, Any]:
    """Text, the event that finishes, and the usage of a streamed answer."""
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    (finish,) = [e for e in events if any(c["finish_reason"] for c in e["choices"])]
    return text, finish, events[-1]["usage"]


def test_a_stop_string_between_two_tokens(server, whole, length):
    tokens = whole["choices"][0]["logprobs"]["tokens"]
    stop = tokens[STOP_AT - 2][-2:] + tokens[STOP_AT - 1][:2]
    text = whole["choices"][0]["text"]
    needed = next(n for n in range(25) if stop in "".join(tokens[:n]))
    request = body(TEXT, SETTING, max_tokens=24, stop=[stop])
    answer = complete(server, request)
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == text[: text.index(stop)]
    assert answer["usage"]["completion_tokens"] == needed
    assert counts(answer) == (length, needed - 1)
    text, finish, usage = last(streamed(server, request))
    assert (text, usage["completion_tokens"]) == (choice["text"], needed)
    assert counts(finish) == (length, needed - 1)


@pytest.mark.parametrize("fields", [{}, {"include_stop_str_in_output": True}, {"min_tokens": 12}])
def test_stopping_is_vllms_own(server, fields):
    plain = complete(server, body(TEXT, max_tokens=24))
    stop = [plain["choices"][0]["logprobs"]["tokens"][4]]
    cut, same = (
        complete(server, body(TEXT, setting, max_tokens=24, stop=stop, **fields))
        for setting in (None, IDENTITY)
    )
    shown = ("text", "finish_reason", "stop_reason", "token_ids")
    assert [cut["choices"][0][key] for key in shown] == [same["choices"][0][key] for key in shown]
    assert cut["usage"] == same["usage"]
    assert cut["usage"]["completion_tokens"] >= fields.get("min_tokens", 1)
    assert counts(same)[1] == same["usage"]["completion_tokens"] - 1


def test_a_stop_token(server, whole, length):
    tokens = whole["choices"][0]["token_ids"]
    stop = tokens[STOP_AT]
    needed = tokens.index(stop) + 1
    answer = complete(server, body(TEXT, SETTING, max_tokens=24, stop_token_ids=[stop]))
    assert answer["choices"][0]["stop_reason"] == stop
    assert answer["choices"][0]["token_ids"] == tokens[:needed]
    assert counts(answer) == (length, needed - 1)


def test_choices_that_stop_at_different_tokens(server, length):
    sampling = {"n": 4, "temperature": 1, "seed": 2, "stop": [".", "e"], "max_tokens": 40}
    request = body(TEXT, SETTING, **sampling)
    answer = complete(server, request)
    numbers = [len(choice["token_ids"]) for choice in answer["choices"]]
    assert len(set(numbers)) > 1
    entry = applied(answer)
    expected = [(index, length, number - 1) for index, number in enumerate(numbers)]
    found = [tuple(c.values())[:3] for c in entry["choices"]]
    assert found == expected
    assert counts(answer) == (4 * length, sum(numbers) - 4)
    events = [event for event in streamed(server, request) if "calibration" in event]
    assert [applied(event)["choices"] for event in events] == [entry["choices"]]


@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 65])
@pytest.mark.parametrize("new", [1, 2])
def test_short_prompts_and_answers(server, tokens, new):
    request = body(prompt(60 + tokens, tokens), SETTING, max_tokens=new)
    answer = complete(server, request)
    assert counts(answer) == (tokens, new - 1)
    text, finish, _ = last(streamed(server, request))
    assert (text, counts(finish)) == (answer["choices"][0]["text"], (tokens, new - 1))
    if tokens == new == 1:
        # One key: its weight is 1 with any gamma.
        plain = complete(server, {**request, "calibration": None})
        assert answer["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]


def test_an_echoed_prompt(server, whole, length):
    fields = {"echo": True, "max_tokens": 24, "return_token_ids": False}
    echoed = complete(server, body(TEXT, SETTING, **fields))
    scored = complete(server, body(TEXT, SETTING, max_tokens=24, prompt_logprobs=0))
    assert echoed["choices"][0]["text"] == TEXT + whole["choices"][0]["text"]
    assert counts(echoed) == counts(scored) == (length, 23)
    given = [next(iter(e.values()))["logprob"] for e in scored["choices"][0]["prompt_logprobs"][1:]]
    logprobs = echoed["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert logprobs[1:length] == given
    plain = complete(server, body(TEXT, **fields))["choices"][0]["logprobs"]["token_logprobs"]
    assert max(abs(a - b) for a, b in zip(plain[2:length], given[1:], strict=True)) > 0.01
    text, finish, _ = last(streamed(server, body(TEXT, SETTING, **fields)))
    assert (text, counts(finish)) == (echoed["choices"][0]["text"], (length, 23))


def test_an_echo_without_an_answer(server, length):
    fields = {"echo": True, "max_tokens": 0, "return_token_ids": False}
    answer = complete(server, body(TEXT, SETTING, **fields))
    assert answer["choices"][0]["text"] == TEXT
    assert counts(answer) == (length, 0)
    events = streamed(server, body(TEXT, SETTING, **fields))
    assert "".join(c["text"] for event in events for c in event["choices"]) == TEXT
    assert [counts(event) for event in events if "calibration" in event] == [(length, 0)]


def test_a_receipt_comes_with_the_last_token(server):
    events = streamed(server, body(TEXT, SETTING, max_tokens=24))
    stamped = ["calibration" in event for event in events if event["choices"]]
    assert stamped == [False] * (len(stamped) - 1) + [True]


def test_vllm_is_told_of_every_end(server):
    """vLLM counts a request as load until its answer is out, whatever the answer is."""

    def load() -> int:
        with server.client() as client:
            number: int = client.get("/load").json()["server_load"]
        return number

    wait_until_idle(server)
    before = load()
    for setting in (None, SETTING):
        complete(server, body(TEXT, setting))
        streamed(server, body(TEXT, setting))
        with server.client() as client:
            refused = client.post("/v1/completions", json=body(TEXT, setting, model="another"))
        assert refused.status_code == 404
    # vLLM counts down when the answer is out already.
    wait_until(lambda: load() == before, "somebody is still counted as load")
