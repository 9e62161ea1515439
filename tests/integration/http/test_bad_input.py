"""Bad calibrations: a 400 that names the field, and the engine hears nothing of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

METHOD = '"method": "zerotuning"'
HUGE = json.dumps(list(range(100_000)))
# Body of `calibration` as raw JSON, and the `param` of the answer.
BAD = [
    ('"nothing"', "calibration"),
    ("5", "calibration"),
    ("true", "calibration"),
    ("[]", "calibration"),
    ("{}", "calibration.method"),
    ('{"gamma": 2}', "calibration.method"),
    ('{"method": "nothing"}', "calibration.method"),
    ('{"method": 3}', "calibration.method"),
    (f"{{{METHOD}}}", "calibration.gamma"),
    (f'{{{METHOD}, "gamma": null}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": NaN}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": Infinity}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": 1e400}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": -1e400}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": true}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": "2"}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": [2]}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": 0}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": -1}}', "calibration.gamma"),
    (f'{{{METHOD}, "gamma": 100.001}}', "calibration.gamma"),
    (f'{{{METHOD}, "gama": 2}}', "calibration.gama"),
    (f'{{{METHOD}, "gamma": 2, "layers": [30]}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "layers": [-1]}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "layers": []}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "layers": [1, 1]}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "layers": [true]}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "layers": [1.0]}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "layers": "some"}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "layers": {HUGE}}}', "calibration.layers"),
    (f'{{{METHOD}, "gamma": 2, "heads": [9]}}', "calibration.heads"),
    (f'{{{METHOD}, "gamma": 2, "heads": {{"30": [1]}}}}', "calibration.heads"),
    (f'{{{METHOD}, "gamma": 2, "heads": {{"-1": [1]}}}}', "calibration.heads"),
    (f'{{{METHOD}, "gamma": 2, "heads": {{"one": [1]}}}}', "calibration.heads"),
    (f'{{{METHOD}, "gamma": 2, "heads": {{"1": [9]}}}}', "calibration.heads"),
    (f'{{{METHOD}, "gamma": 2, "layers": [1], "heads": {{"2": [1]}}}}', "calibration.heads"),
    (f'{{{METHOD}, "gamma": 2, "heads": {HUGE}}}', "calibration.heads"),
    (f'[{{{METHOD}, "gamma": 2}}, {{{METHOD}, "gamma": 3}}]', "calibration"),
    (f'[{{{METHOD}, "gamma": 2}}, {{{METHOD}, "gamma": NaN}}]', "calibration[1].gamma"),
]
PATHS = ["/v1/chat/completions", "/v1/completions"]


def post(server: Any, path: str, calibration: str) -> Any:
    prompt = (
        '"prompt": "Hi"'
        if path == "/v1/completions"
        else '"messages": [{"role": "user", "content": "Hi"}]'
    )
    body = f'{{{prompt}, "max_tokens": 4, "temperature": 0, "calibration": {calibration}}}'
    with server.client() as client:
        return client.post(path, content=body, headers={"Content-Type": "application/json"})


def engine_work(server: Any) -> tuple[float, ...]:
    """What grows when the engine is given anything to do."""
    names = ("vllm:prompt_tokens_total", "vllm:request_success_total")
    return tuple(server.metric(name) for name in names)


@pytest.mark.parametrize("path", PATHS)
def test_refused_before_the_engine(server, path):
    before = engine_work(server)
    rejections = server.metric("trimtab_rejections_total")
    for calibration, param in BAD:
        response = post(server, path, calibration)
        shown = calibration[:80]
        assert response.status_code == 400, (shown, response.text)
        error = response.json()["error"]
        assert error["param"] == param, (shown, error)
        assert error["code"] == "invalid_calibration", shown
        assert error["type"] == "invalid_request_error", shown
        assert len(response.content) < 4096, shown
    assert engine_work(server) == before
    assert server.metric("trimtab_rejections_total") == rejections + len(BAD)
    good = post(server, path, f'{{{METHOD}, "gamma": 2}}')
    assert good.status_code == 200
    assert good.json()["calibration"]["applied"][0]["prompt_tokens"] > 0
    assert engine_work(server) > before


def test_reserved_and_unsupported_fields(server):
    body = {"prompt": "Hi", "max_tokens": 2, "calibration": {"method": "zerotuning", "gamma": 2}}
    others = {
        "use_beam_search": True,
        "kv_transfer_params": {"do_remote_prefill": True},
        "vllm_xargs": {"trimtab": "forged"},
    }
    before = engine_work(server)
    with server.client() as client:
        for name, value in others.items():
            error = client.post("/v1/completions", json={**body, name: value})
            assert error.status_code == 400, name
            assert error.json()["error"]["param"].startswith(name)
    assert engine_work(server) == before


def test_other_errors_have_the_same_envelope(server):
    with server.client() as client:
        answers = {
            404: client.get("/v1/nothing"),
            405: client.get("/v1/chat/completions"),
            400: client.post(
                "/v1/completions", content=b"{", headers={"Content-Type": "application/json"}
            ),
        }
        unknown = client.get("/v1/calibrators/nothing")
        model = client.post("/v1/completions", json={"model": "another", "prompt": "Hi"})
        range_ = client.post("/v1/completions", json={"prompt": "Hi", "temperature": -1})
        kind = client.post("/v1/completions", json={"prompt": 5})
    for status, response in answers.items():
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert answers[400].json()["error"]["param"] is None
    assert unknown.status_code == 404
    found = [response.json()["error"] for response in (model, range_, kind)]
    assert [(e["type"], e["param"]) for e in found] == [
        ("not_found_error", "model"),
        ("invalid_request_error", "temperature"),
        ("invalid_request_error", "prompt"),
    ]
    assert [e["code"] for e in found] == ["not_found", "bad_request", "invalid_request"]
