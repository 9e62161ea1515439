"""What schemathesis does not know of this server."""

from __future__ import annotations

import re
from zlib import crc32

import schemathesis

SERVED = "smollm2-135m-instruct"
LEAKS = re.compile(r"Traceback|File \\?\"|0x[0-9a-f]{6}|/site-packages/")


# What a body is about; of the many other fields a few are kept, since one odd one hides the rest.
ESSENTIAL = {
    "calibration",
    "input",
    "max_tokens",
    "messages",
    "model",
    "prompt",
    "stream",
    "tokens",
}


@schemathesis.hook
def map_body(context, body):
    """Most random model names become the served one, and most bodies smaller."""
    if not isinstance(body, dict) or len(body) % 4 == 0:
        return body
    kept = {
        name: value
        for name, value in body.items()
        if name in ESSENTIAL or crc32(f"{name}{len(body)}".encode()) % 4 == 0
    }
    return {**kept, "model": SERVED} if isinstance(body.get("model"), str) else kept


@schemathesis.check
def answers_are_told_apart_and_tell_nothing(ctx, response, case):
    assert response.headers.get("x-request-id"), "no X-Request-Id"
    if response.status_code >= 400 and case.operation.path != "/health":
        assert len(response.content) <= 4096, "an error of more than 4 KiB"
        assert not LEAKS.search(response.text), "the machine shows in an error"
