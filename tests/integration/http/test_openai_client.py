"""The stock `openai` client against a real server."""

from __future__ import annotations

from typing import Any

import openai
import pytest

GAMMA = {"method": "zerotuning", "gamma": 0.3}
MESSAGES = [{"role": "user", "content": "Name three colours of the rainbow."}]


def chat(client: openai.OpenAI, name: str, calibration: Any = None, **options: Any) -> Any:
    extra = {} if calibration is None else {"calibration": calibration}
    defaults = {"messages": MESSAGES, "temperature": 0, "max_tokens": 16, "extra_body": extra}
    return client.chat.completions.create(model=name, **{**defaults, **options})


def test_chat_with_and_without_calibration(client, name):
    plain = chat(client, name)
    calibrated = chat(client, name, GAMMA)
    off = chat(client, name, "none")
    assert plain.choices[0].message.content
    assert calibrated.choices[0].message.content != plain.choices[0].message.content
    assert off.choices[0].message.content == plain.choices[0].message.content
    assert "calibration" not in plain.model_extra
    assert "calibration" not in off.model_extra


def test_receipt_of_a_chat(client, name):
    answer = chat(client, name, GAMMA)
    receipt = answer.model_extra["calibration"]
    (applied,) = receipt["applied"]
    assert len(receipt["digest"]) == 12
    assert int(receipt["digest"], 16) >= 0
    assert applied["method"] == "zerotuning"
    assert applied["params"] == {"gamma": 0.3, "layers": "all", "heads": "all"}
    assert applied["profile"] is None
    assert (applied["layers"], applied["heads"]) == (30, 270)
    assert applied["prompt_tokens"] == answer.usage.prompt_tokens
    assert applied["completion_tokens"] == answer.usage.completion_tokens - 1
    assert applied["skipped"] is None
    assert "choices" not in applied
    before = applied["statistics"]["key0_mass_before"]
    after = applied["statistics"]["key0_mass_after"]
    assert 0 < after < before < 1


def test_header_names_methods_and_digest(client, name):
    raw = client.chat.completions.with_raw_response.create(
        model=name, messages=MESSAGES, max_tokens=2, extra_body={"calibration": GAMMA}
    )
    digest = raw.parse().model_extra["calibration"]["digest"]
    assert raw.headers["X-Calibration"] == f"zerotuning;digest={digest}"
    plain = client.chat.completions.with_raw_response.create(
        model=name, messages=MESSAGES, max_tokens=2
    )
    assert "X-Calibration" not in plain.headers


def test_streamed_chat_carries_the_receipt_once_at_the_end(client, name):
    chunks = list(chat(client, name, GAMMA, stream=True, stream_options={"include_usage": True}))
    whole = chat(client, name, GAMMA)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    stamped = [c for c in chunks if c.model_extra.get("calibration")]
    assert [c.choices[0].finish_reason for c in stamped] == ["length"]
    streamed = stamped[0].model_extra["calibration"]
    assert streamed["digest"] == whole.model_extra["calibration"]["digest"]
    assert streamed["applied"][0]["completion_tokens"] == 15
    assert chunks[-1].usage.completion_tokens == 16


def test_streamed_plain_chat_has_no_receipt(client, name):
    assert not any(c.model_extra.get("calibration") for c in chat(client, name, stream=True))


def test_completions_of_several_prompts_and_choices(client, name):
    prompts = ["The capital of France is", "Water boils at a temperature of"]
    answer = client.completions.create(
        model=name,
        prompt=prompts,
        n=2,
        max_tokens=6,
        temperature=0.9,
        seed=3,
        extra_body={"calibration": GAMMA, "ignore_eos": True},
    )
    (applied,) = answer.model_extra["calibration"]["applied"]
    assert [choice["index"] for choice in applied["choices"]] == [0, 1, 2, 3]
    assert all(choice["completion_tokens"] == 5 for choice in applied["choices"])
    assert applied["completion_tokens"] == 20
    assert applied["prompt_tokens"] == 2 * answer.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_chat_have_numbers_of_their_own(client, name, stream):
    answer = chat(client, name, GAMMA, n=3, temperature=1.2, seed=5, stream=stream)
    if stream:
        stamped = [c for c in answer if c.model_extra.get("calibration")]
        assert len(stamped) == 1
        answer = stamped[0]
    (applied,) = answer.model_extra["calibration"]["applied"]
    assert [choice["index"] for choice in applied["choices"]] == [0, 1, 2]
    total = sum(choice["completion_tokens"] for choice in applied["choices"])
    assert applied["completion_tokens"] == total > 0


def test_a_stop_string_ends_the_count(client, name):
    whole = chat(client, name, GAMMA, logprobs=True)
    words = whole.choices[0].message.content.split()
    stopped = chat(client, name, GAMMA, stop=[words[3]], logprobs=True)
    assert stopped.choices[0].finish_reason == "stop"
    (applied,) = stopped.model_extra["calibration"]["applied"]
    assert applied["completion_tokens"] == stopped.usage.completion_tokens - 1


def test_logprobs_and_structured_output_work(client, name):
    answer = chat(
        client,
        name,
        GAMMA,
        logprobs=True,
        top_logprobs=2,
        max_tokens=40,
        extra_body={
            "calibration": GAMMA,
            "structured_outputs": {"choice": ["red", "green", "blue"]},
        },
    )
    assert answer.choices[0].message.content in ("red", "green", "blue")
    assert answer.choices[0].logprobs.content
    assert answer.model_extra["calibration"]["applied"][0]["completion_tokens"] >= 0


def test_a_profile_gives_each_head_its_own_strength(client, server, name):
    answer = chat(client, name, {"method": "zerotuning", "profile": "by-head"})
    (applied,) = answer.model_extra["calibration"]["applied"]
    assert (applied["profile"], applied["layers"], applied["heads"]) == ("by-head", 2, 3)
    assert applied["params"] == {
        "gamma": {"3": {"0": 0.3, "8": 2.0}, "20": {"4": 0.6}},
        "layers": [3, 20],
        "heads": {"3": [0, 8], "20": [4]},
    }
    assert applied["completion_tokens"] == answer.usage.completion_tokens - 1
    assert server.metric("trimtab_profile_loads_total", outcome="loaded") == 1


def test_a_preset_is_a_model(client, name):
    listed = [model.id for model in client.models.list()]
    assert listed == [name, f"{name}:calm"]
    whole = chat(client, name, GAMMA)
    answer = chat(client, f"{name}:calm")
    assert answer.model == f"{name}:calm"
    assert answer.choices[0].message.content == whole.choices[0].message.content
    digest = whole.model_extra["calibration"]["digest"]
    assert answer.model_extra["calibration"]["digest"] == digest
    chunks = list(chat(client, f"{name}:calm", stream=True))
    assert {chunk.model for chunk in chunks} == {f"{name}:calm"}
    stamped = [c for c in chunks if c.model_extra.get("calibration")]
    assert [c.model_extra["calibration"]["digest"] for c in stamped] == [digest]
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=f"{name}:calm", input="hi")


def test_error_classes(client, name):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, name, {"method": "zerotuning", "gamma": 1000})
    assert refused.value.param == "calibration.gamma"
    assert refused.value.code == "invalid_calibration"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        chat(client, "another-model", GAMMA)
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing-here", cast_to=object)
    with pytest.raises(openai.BadRequestError):
        chat(client, name, GAMMA, temperature=-1)
