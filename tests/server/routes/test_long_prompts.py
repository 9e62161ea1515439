"""Prompts that are known to be too long only once vLLM has tokenised them."""

import pytest
from fastapi.testclient import TestClient

from calibrators.interface import Prefill
from server.engine.facts import StepLimit

STEP = StepLimit(64, "--max-num-batched-tokens")


@pytest.fixture
def app(make_app, make_calibrator):
    whole = make_calibrator("whole", prefill=lambda self, bound: Prefill.WHOLE)
    return make_app(more=[whole], step=STEP)


@pytest.fixture
def post(app, engine):
    client = TestClient(app, raise_server_exceptions=False)

    def send(calibration, length, **fields):
        engine.length = length
        body = {"model": "m", "prompt": "hi", "calibration": calibration, **fields}
        return client.post("/v1/completions", json=body)

    return send


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("calibration", "path"), [("whole", "calibration"), (["whole"], "calibration[0]")]
)
def test_a_prompt_too_long_for_a_step_is_refused(post, app, stream, calibration, path):
    response = post(calibration, 65, stream=stream)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_calibration")
    assert error["param"] == path
    assert "--max-num-batched-tokens" in error["message"]
    assert len(app.state.trimtab.desk) == 0
    samples = app.state.samples.get_sample_value
    assert samples("trimtab_active_requests", {"calibrator": "whole"}) == 0
    for outcome, count in {"rejected": 1, "failed": 0}.items():
        labels = {"calibrator": "whole", "outcome": outcome}
        assert samples("trimtab_requests_total", labels) == count
    assert samples("trimtab_rejections_total", {"reason": "unsupported_feature"}) == 1


def test_the_policy_travels_with_the_request(post, engine):
    assert post("whole", 64).status_code == 200
    (payload,) = engine.payloads
    assert (payload.prefill, payload.shareable) == (Prefill.WHOLE, False)
    assert post({"method": "zerotuning", "gamma": 0.5}, 1000).status_code == 200
    assert (engine.payloads[1].prefill, engine.payloads[1].shareable) == (Prefill.ANY, True)
