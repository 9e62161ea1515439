"""What a real server writes: one JSON object per request, and nothing that was sent."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engine")]
SECRET = "wombat"
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg"
)


def test_requests_are_told_by_id_and_calibration_and_not_by_content(server):
    headers = {"Authorization": f"Bearer {SECRET}-key", "X-Request-Id": "logged-1"}
    setting = {"method": "zerotuning", "gamma": 0.5}
    body = {"prompt": f"my {SECRET}", "max_tokens": 2, "calibration": setting}
    image = {"type": "image_url", "image_url": {"url": f"data:image/gif;base64,{PIXEL}"}}
    chat = {"messages": [{"role": "user", "content": [image]}]}
    before = len(server.log.read_text(errors="replace"))
    with server.client() as client:
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert client.post("/v1/completions", json={**body, "n": SECRET}).status_code == 400
        assert client.post("/v1/chat/completions", json=chat).status_code == 400
    written = server.log.read_text(errors="replace")[before:]
    lines = [json.loads(line) for line in written.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "logged-1"]
    assert line["digest"] == answer.json()["calibration"]["digest"]
    assert (line["status"], line["outcome"], line["calibration"]) == (200, "applied", "zerotuning")
    assert line["path"] == "/v1/completions"
    assert SECRET not in written
    assert PIXEL not in written
