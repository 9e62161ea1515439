"""Limits on the fields of a request."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bounds import NUMBERS, RULES, check
from server.errors import ApiError
from server.limits import Limits, flag_of

TIGHT = replace(
    Limits(),
    max_n=3,
    max_prompts=3,
    max_logprobs_per_token=3,
    max_stop_strings=3,
    max_stop_chars=3,
    max_stop_token_ids=3,
    max_allowed_token_ids=3,
    max_bad_words=3,
    max_logit_bias=3,
    max_tools=3,
    max_schema_chars=30,
    max_messages=3,
    max_media=3,
    max_cache_salt_chars=3,
)
USER = {"role": "user", "content": "x"}


def image(kind="image_url"):
    return {"type": kind, kind: {"url": "data:,"}}


def listed(count, entry="x"):
    return [entry] * count


# Field, and its value by how much is asked for.
CASES = {
    "n": lambda k: k,
    "best_of": float,
    "prompt": listed,
    "prompts": lambda k: listed(k, [1, 2, 3, 4]),
    "logprobs": lambda k: k,
    "top_logprobs": str,
    "prompt_logprobs": lambda k: k,
    "stop": listed,
    "stop_sequences": listed,
    "stop_token_ids": lambda k: listed(k, 5),
    "allowed_token_ids": lambda k: listed(k, 5),
    "bad_words": lambda k: listed(k, "ab"),
    "logit_bias": lambda k: {str(i): 1.0 for i in range(k)},
    "tools": lambda k: listed(k, {}),
    "functions": lambda k: listed(k, {}),
    "messages": lambda k: listed(k, USER),
    "input": lambda k: listed(k, USER),
    "cache_salt": lambda k: "x" * k,
}


def refusal(body, limits=TIGHT):
    with pytest.raises(ApiError) as caught:
        check(body, limits)
    assert (caught.value.status, caught.value.code) == (400, "limit_exceeded")
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_the_limit_itself_is_allowed_and_one_more_is_not(name):
    check({name: CASES[name](3)}, TIGHT)
    error = refusal({name: CASES[name](4)})
    flags = [f"({flag_of(rule.limit)})" for rule in RULES if name in rule.fields]
    assert error.param == name
    assert error.message.startswith(f"{name} ")
    assert " 4" in error.message
    assert any(error.message.endswith(f" 3 are allowed {flag}") for flag in flags)


@pytest.mark.parametrize("name", CASES)
def test_sampling_parameters_one_level_down_are_seen(name):
    check({"sampling_params": {name: CASES[name](3)}}, TIGHT)
    error = refusal({"sampling_params": {name: CASES[name](4)}})
    assert error.param == f"sampling_params.{name}"


@pytest.mark.parametrize("name", ["stop", "stop_sequences", "bad_words"])
def test_strings_are_bounded_in_length(name):
    check({name: ["abc", 5]}, TIGHT)
    error = refusal({name: ["a", "abcd"]})
    assert (error.param, "4 characters" in error.message) == (name, True)
    if name == "stop":
        check({name: "abc"}, TIGHT)
        refusal({name: "abcd"})


@pytest.mark.parametrize("name", ["response_format", "structured_outputs", "tools", "functions"])
def test_schemas_are_bounded_as_they_are_written(name):
    check({name: {"a": "b" * 20}}, TIGHT)
    assert refusal({name: {"a": "b" * 30}}).param == name


@pytest.mark.parametrize("value", [-1, -0.5, "-1", -(10**30), 10**30, "1e9", " 7 "])
@pytest.mark.parametrize("name", ["n", "prompt_logprobs", "top_logprobs"])
def test_numbers_are_bounded_however_they_are_written(name, value):
    error = refusal({name: value})
    assert (error.param, str(value)[:20] in error.message) == (name, True)


@pytest.mark.parametrize(
    "body",
    [
        {"n": None, "stop": None, "messages": None, "logit_bias": None, "cache_salt": None},
        {
            "n": "many",
            "stop": 5,
            "messages": "x",
            "logit_bias": [],
            "tools": "t",
            "input": "a" * 99,
        },
        {"prompt": "a long prompt", "logprobs": True, "stop": "abc"},
        {"prompt": [1] * 1000, "n": []},
        {"messages": [{"role": "user", "content": 5}, 7, None], "sampling_params": "x"},
        {},
    ],
    ids=range(6),
)
def test_what_has_no_size_is_left_to_the_route(body):
    check(body, TIGHT)


def test_conversations_and_their_messages_are_counted():
    check({"messages": [[USER], [USER], [USER]]}, TIGHT)
    assert "4 conversations" in refusal({"messages": [[], [], [], []]}).message
    assert "4 messages" in refusal({"messages": [[USER, USER], [USER, USER]]}).message


@pytest.mark.parametrize("kind", ["image_url", "input_image", "video_url", "input_audio"])
def test_media_are_counted_wherever_they_lie(kind):
    user = USER | {"content": [image(kind), {"type": "text", "text": "an image"}]}
    check({"messages": listed(3, user)}, TIGHT)
    error = refusal({"messages": [user, USER | {"content": [image(kind)] * 3}]})
    assert (error.param, "4 images" in error.message) == ("messages", True)
    untyped = USER | {"content": [{kind: "data:,"}] * 4}
    assert "4 images" in refusal({"input": [untyped]}).message
    result = {"type": "tool_result", "content": [{"type": "image", "source": {}}] * 4}
    assert "4 images" in refusal({"messages": [USER | {"content": [result]}]}).message


def test_arguments_of_a_tool_call_are_no_media():
    call = {"type": "tool_use", "input": {"image_url": "https://x", "all": [image()] * 9}}
    check({"messages": [USER | {"content": [call]}]}, TIGHT)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-inf", "1e400", "infinity"])
def test_strings_that_would_become_no_finite_number_are_refused(name, value):
    with pytest.raises(ApiError, match=name) as caught:
        check({name: value}, Limits())
    assert caught.value.param == name


def test_so_are_those_in_a_bias():
    with pytest.raises(ApiError, match="logit_bias is no finite number"):
        check({"logit_bias": {"5": "nan"}}, Limits())


def test_every_limit_of_requests_has_a_rule():
    elsewhere = {"max_body_bytes", "header_timeout", "body_timeout", "request_timeout"}
    elsewhere |= {"max_queued_requests", "max_sequences"}
    assert {rule.limit for rule in RULES} == {f.name for f in fields(Limits)} - elsewhere


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = sorted({name for rule in RULES for name in rule.fields} | {*NUMBERS, "sampling_params"})


@given(body=st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_no_body_breaks_the_checks(body):
    try:
        check(body, TIGHT)
    except ApiError as error:
        assert (error.status, error.param is None) == (400, False)


@pytest.mark.parametrize("value", ["", "a" * 129, "a b", "a\nb", "ä", "<script>"])
def test_ids_that_do_not_fit_logs_are_refused(value):
    with pytest.raises(ApiError) as caught:
        check({"request_id": value}, Limits())
    assert (caught.value.param, caught.value.status) == ("request_id", 400)


@pytest.mark.parametrize("value", ["a", "a" * 128, "A-b_c.9", None, 3])
def test_other_ids_are_left_to_the_route(value):
    check({"request_id": value}, Limits())


@given(value=st.integers() | st.floats(allow_nan=False) | st.sampled_from([inf]))
def test_no_number_beyond_the_limit_gets_through(value):
    if 0 <= value <= 3:
        check({"n": value}, TIGHT)
    else:
        refusal({"n": value})


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"prompt": listed(3), "n": 2}, 6),
        ({"prompt": listed(3), "best_of": "2", "n": 1}, 6),
        ({"messages": [[USER]] * 2, "n": 3}, 6),
        ({"prompt": [1, 2, 3], "n": 3}, 3),
        ({"prompt": "x"}, 1),
        ({"n": 0}, 1),
    ],
)
def test_prompts_and_choices_multiply(body, asked):
    check(body, replace(TIGHT, max_sequences=asked))
    if asked > 1:
        error = refusal(body, replace(TIGHT, max_sequences=asked - 1))
        assert error.param == "n"
        assert f"{asked} sequences; at most {asked - 1} are allowed (--max-sequences)" in str(error)
