"""What requests may not bring along."""

from __future__ import annotations

from argparse import Namespace

import pytest

from server.errors import ApiError
from server.settings import Settings
from server.trust import Trust


def trust(**args):
    return Trust.from_args(Namespace(**args), Settings())


def said(content):
    return {"messages": [{"role": "user", "content": [content]}]}


def refused(body, given=None):
    with pytest.raises(ApiError) as caught:
        (given or trust()).check(body)
    assert (caught.value.status, caught.value.code) == (400, "not_allowed")
    return caught.value


REFUSED = [
    ({"chat_template": "{{ 1 }}"}, "chat_template", {"trust_request_chat_template": True}),
    (
        {"chat_template_kwargs": {"documents": [1]}},
        "chat_template_kwargs.documents",
        {"trust_request_chat_template": True},
    ),
    (
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "chat_template_kwargs.chat_template",
        {"trust_request_chat_template": True},
    ),
    (
        {"mm_processor_kwargs": {"max_pixels": 10**12}},
        "mm_processor_kwargs",
        {"trust_request_mm_kwargs": True},
    ),
    (
        {"media_io_kwargs": {"video": {"num_frames": -1}}},
        "media_io_kwargs",
        {"trust_request_mm_kwargs": True},
    ),
    ({"prompt_embeds": "gASV"}, "prompt_embeds", {"enable_prompt_embeds": True}),
    ({"prompt_embeds": ["gASV"]}, "prompt_embeds", {"enable_prompt_embeds": True}),
    (
        said({"type": "image_embeds", "image_embeds": "gASV"}),
        "messages",
        {"enable_mm_embeds": True},
    ),
    (said({"audio_embeds": "gASV"}), "messages", {"enable_mm_embeds": True}),
    (
        said({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}),
        "messages",
        {"allowed_media_domains": ["a.example"]},
    ),
    (
        said({"type": "image_url", "image_url": "HTTPS://x"}),
        "messages",
        {"allowed_media_domains": ["a.example"]},
    ),
    (
        said({"type": "image", "source": {"type": "url", "url": "https://x"}}),
        "messages",
        {"allowed_media_domains": ["a.example"]},
    ),
    (
        said({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}),
        "messages",
        {"allowed_local_media_path": "/media"},
    ),
]


@pytest.mark.parametrize(("body", "param", "flags"), REFUSED, ids=range(len(REFUSED)))
def test_it_is_refused_unless_the_operator_says_otherwise(body, param, flags):
    error = refused(body)
    assert error.param == param
    assert "--" in error.message
    trust(**flags).check(body)


def test_files_and_hosts_are_allowed_apart():
    file = said({"type": "image_url", "image_url": {"url": " file:///etc/passwd"}})
    assert "--allowed-local-media-path" in refused(file, trust(allowed_media_domains=["a"])).message
    host = said({"type": "image_url", "image_url": {"url": "https://x"}})
    assert "--allowed-media-domains" in refused(host, trust(allowed_local_media_path="/m")).message


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template": None, "chat_template_kwargs": None, "prompt_embeds": None},
        {"chat_template": "", "mm_processor_kwargs": {}, "media_io_kwargs": {}},
        {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}},
        {"messages": "x", "input": 5},
        said({"type": "text", "text": "see https://x and file:///y"}),
        said({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}),
        said({"type": "tool_use", "input": {"image_url": "https://x"}}),
        said({"type": "tool_result", "content": "https://x"}),
    ],
    ids=range(8),
)
def test_what_is_harmless_passes(body):
    trust().check(body)


@pytest.mark.parametrize("value", [[1], {"a": 1}, "x" * 65])
def test_arguments_of_a_template_are_small(value):
    refused({"chat_template_kwargs": {"thinking": value}})


def test_names_come_from_flags_of_ours_and_of_vllm():
    settings = Settings(allowed_chat_template_kwargs=("mine",))
    given = Trust.from_args(Namespace(default_chat_template_kwargs={"theirs": 1}), settings)
    given.check({"chat_template_kwargs": {"mine": 1, "theirs": 2}})
    error = refused({"chat_template_kwargs": {"enable_thinking": True}}, given)
    assert "mine, theirs" in error.message
