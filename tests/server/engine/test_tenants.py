from types import SimpleNamespace

import pytest

from server.engine.tenants import separate


@pytest.fixture
def generate():
    """An engine client's `generate` that gives back its arguments, separated by a salt."""
    client = SimpleNamespace(generate=lambda *args, **kwargs: (args, kwargs))
    separate(client, lambda salt: None if salt == "keep" else f"{salt}!")
    return client.generate


@pytest.mark.parametrize(("given", "made"), [("mine", "mine!"), (None, "None!")])
def test_every_prompt_gets_a_salt_and_keeps_the_rest(generate, given, made):
    prompt = {"prompt_token_ids": [1], "cache_salt": given}
    args, kwargs = generate(prompt, "params", request_id="r")
    assert args == ({"prompt_token_ids": [1], "cache_salt": made}, "params")
    assert kwargs == {"request_id": "r"}
    assert prompt["cache_salt"] == given


def test_a_prompt_without_a_salt_gets_one(generate):
    assert generate({"prompt_token_ids": [1]})[0] == (
        {"prompt_token_ids": [1], "cache_salt": "None!"},
    )


def test_what_needs_no_other_salt_is_the_same_object():
    client = SimpleNamespace(generate=lambda prompt: prompt)
    separate(client, lambda salt: salt)
    prompt = {"prompt_token_ids": [1]}
    assert client.generate(prompt) is prompt


def test_what_is_no_object_passes(generate):
    assert generate("text")[0] == ("text",)
