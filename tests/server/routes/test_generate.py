import asyncio
import json
import re

import pytest
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

from server.admission import REASONS
from server.middleware.keys import TENANT
from server.middleware.request_id import RequestIdMiddleware
from server.routes import generate

ZERO = {"method": "zerotuning", "gamma": 0.5}
PATHS = ["/v1/chat/completions", "/v1/completions"]
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}
HEADER = re.compile("zerotuning;digest=([0-9a-f]{12})")


@pytest.fixture(params=PATHS, ids=["chat", "text"])
def post(request, client):
    """Send a request to one of the two routes."""

    def send(headers=None, **fields):
        body = {"model": "m", **BODIES[request.param], **fields}
        content = json.dumps(body).encode()
        json_headers = {"Content-Type": "application/json", **(headers or {})}
        return client.post(request.param, content=content, headers=json_headers)

    return send


@pytest.fixture
def value(app):
    """The value of one of the application's metrics."""

    def read(name, **labels):
        return app.state.samples.get_sample_value(name, labels)

    return read


@pytest.fixture
def outcomes(value):
    def read():
        found = {
            outcome: value("trimtab_requests_total", calibrator="zerotuning", outcome=outcome)
            for outcome in ("applied", "rejected", "failed")
        }
        return {outcome: count for outcome, count in found.items() if count}

    return read


@pytest.fixture
def assert_closed(app, value):
    def check():
        assert len(app.state.trimtab.desk) == 0
        assert value("trimtab_active_requests", calibrator="zerotuning") == 0

    return check


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines if "[DONE]" not in line]


@pytest.mark.parametrize("field", [{}, {"calibration": None}, {"calibration": "none"}])
def test_plain_requests_pass_untouched(post, engine, outcomes, field):
    response = post(cache_salt="mine", **field)
    assert response.json() == {"choices": [{"index": 0, "finish_reason": "length"}]}
    assert "X-Calibration" not in response.headers
    assert engine.payloads == [None]
    assert engine.requests[0].cache_salt == "mine"
    assert outcomes() == {}


@pytest.mark.parametrize("calibration", [None, ZERO], ids=["plain", "calibrated"])
@pytest.mark.parametrize(
    ("header", "own", "expected"),
    [(None, "own", "own"), ("given", "own", "given"), ("a b", "own", "own"), (None, None, None)],
)
def test_one_id_counts(app, engine, calibration, header, own, expected):
    client = TestClient(RequestIdMiddleware(app))
    body = {"prompt": "hi", "calibration": calibration, **({"request_id": own} if own else {})}
    headers = {"X-Request-Id": header} if header else {}
    response = client.post("/v1/completions", json=body, headers=headers)
    identity = response.headers["X-Request-Id"]
    assert expected is None or identity == expected
    # As vLLM takes it.
    (handled,) = engine.identities
    assert handled == identity


def test_a_plain_stream_passes_untouched(post, engine, make_chunk):
    engine.chunks = [make_chunk(0, None), make_chunk(0, "stop")]
    response = post(stream=True)
    assert response.text == "".join([*engine.chunks, "data: [DONE]\n\n"])
    assert "X-Calibration" not in response.headers


def test_a_calibrated_answer_has_header_and_receipt(post, engine, outcomes, value, assert_closed):
    response = post(calibration=ZERO)
    assert response.status_code == 200
    body = response.json()
    assert body["choices"] == [{"index": 0, "finish_reason": "length"}]
    entry = body["calibration"]["applied"][0]
    assert entry["params"] == {"gamma": 0.5, "layers": "all", "heads": "all"}
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (5, 3)
    assert entry["statistics"] == {"key0_mass_before": 0.5}
    match = HEADER.fullmatch(response.headers["X-Calibration"])
    assert match.group(1) == body["calibration"]["digest"]
    assert response.headers["X-Load"] == "3"
    assert outcomes() == {"applied": 1}
    tokens = "trimtab_calibrated_tokens_total"
    assert value(tokens, calibrator="zerotuning", phase="prompt") == 5
    assert value("trimtab_calibration_seconds_count", calibrator="zerotuning") == 1
    assert_closed()


def test_the_engine_gets_settings_ticket_and_salt(post, engine):
    for user_salt in (None, "mine", "mine"):
        post(calibration=ZERO, cache_salt=user_salt)
    post(calibration=ZERO | {"gamma": 0.6}, cache_salt="mine")
    post(calibration=ZERO, cache_salt="mine", headers={"Authorization": "Bearer other"})
    assert engine.payloads[0].calibrations[0].params["gamma"] == 0.5
    assert len({payload.ticket for payload in engine.payloads}) == 5
    salts = [request.cache_salt for request in engine.requests]
    assert all(re.fullmatch("[0-9a-f]{64}", salt) for salt in salts)
    assert salts[1] == salts[2]
    assert len(set(salts)) == 4


def test_other_extra_arguments_are_kept(post, engine):
    post(calibration=ZERO, vllm_xargs={"mine": 1})
    params = engine.requests[0].to_sampling_params(16, {})
    assert params.extra_args["mine"] == 1
    assert "trimtab" in params.extra_args


def test_every_choice_of_every_prompt_is_in_the_receipt(post, engine):
    engine.prompts = 2
    receipt = post(calibration=ZERO, n=3).json()["calibration"]["applied"][0]
    assert [choice["index"] for choice in receipt["choices"]] == list(range(6))
    assert (receipt["prompt_tokens"], receipt["completion_tokens"]) == (30, 18)


def test_the_servers_default_and_the_way_out(make_app, engine):
    client = TestClient(make_app(default=ZERO))
    body = {"model": "m", "prompt": "hi"}
    assert "calibration" in client.post("/v1/completions", json=body).json()
    plain = client.post("/v1/completions", json=body | {"calibration": "none"})
    assert "calibration" not in plain.json()


def test_a_stream_has_the_receipt_where_it_finishes(
    post, engine, make_chunk, outcomes, assert_closed
):
    engine.chunks = [make_chunk(0, None), ": keep-alive\n\n", make_chunk(0, "stop"), "data: {}\n\n"]
    response = post(calibration=ZERO, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[0] + "\n\n" == engine.chunks[0]
    assert parts[1] == ": keep-alive"
    assert parts[3:] == ["data: {}", "data: [DONE]", ""]
    stamped = json.loads(parts[2].removeprefix("data: "))
    receipt = stamped.pop("calibration")
    assert stamped == json.loads(engine.chunks[2].removeprefix("data: "))
    match = HEADER.fullmatch(response.headers["X-Calibration"])
    assert match.group(1) == receipt["digest"]
    assert receipt["applied"][0]["completion_tokens"] == 3
    assert outcomes() == {"applied": 1}
    assert_closed()


@pytest.mark.parametrize("together", [False, True])
def test_of_many_choices_the_last_to_finish_carries_the_receipt(post, engine, make_chunk, together):
    if together:
        choices = [{"index": i, "finish_reason": "stop"} for i in range(4)]
        last = json.dumps({"choices": choices}, separators=(",", ":"))
        engine.chunks = [make_chunk(0, None), f"data: {last}\n\n"]
    else:
        engine.chunks = [make_chunk(i, "stop") for i in (2, 0, 3, 1)]
    engine.prompts = 2
    found = events(post(calibration=ZERO, n=2, stream=True))
    assert ["calibration" in event for event in found] == [False] * (len(found) - 1) + [True]
    assert len(found[-1]["calibration"]["applied"][0]["choices"]) == 4


@pytest.mark.parametrize("text", ['"finish_reason":"stop"', 'a "finish_reason":"', "\\"])
def test_text_that_looks_like_a_finish_is_text(post, engine, make_chunk, text):
    engine.chunks = [make_chunk(0, None, text), make_chunk(0, "stop", text)]
    first, last = events(post(calibration=ZERO, stream=True))
    assert "calibration" not in first
    assert "calibration" in last
    assert first["choices"][0]["text"] == last["choices"][0]["text"] == text


def test_an_uncalibrated_answer_does_not_go_out(post, engine, outcomes, assert_closed):
    engine.silent = {(0, 1)}
    response = post(calibration=ZERO, n=2)
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "calibration_not_applied")
    assert "choices" not in response.text
    assert outcomes() == {"failed": 1}
    assert_closed()


def test_an_uncalibrated_stream_ends_in_an_error(post, engine, make_chunk, outcomes, assert_closed):
    engine.silent = {(0, 0)}
    engine.chunks = [make_chunk(0, None), make_chunk(0, "stop"), make_chunk(0, None)]
    response = post(calibration=ZERO, stream=True)
    _, last = events(response)
    assert last["error"]["code"] == "calibration_not_applied"
    assert response.text.endswith("data: [DONE]\n\n")
    assert outcomes() == {"failed": 1}
    assert_closed()


@pytest.mark.parametrize(
    ("calibration", "param", "reason"),
    [
        (float("nan"), "calibration", "malformed"),
        (True, "calibration", "malformed"),
        ("zero", "calibration", "unknown_method"),
        ({"method": "zero"}, "calibration.method", "unknown_method"),
        (ZERO | {"gamma": float("nan")}, "calibration.gamma", "invalid_parameter"),
        (ZERO | {"gamma": float("inf")}, "calibration.gamma", "invalid_parameter"),
        (ZERO | {"gamma": True}, "calibration.gamma", "invalid_parameter"),
        (ZERO | {"gama": 1}, "calibration.gama", "invalid_parameter"),
        (ZERO | {"\ud800": 1}, "calibration", "invalid_parameter"),
        (ZERO | {"layers": [99]}, "calibration.layers", "invalid_parameter"),
        ([ZERO, ZERO], "calibration", "combination"),
        ([ZERO | {"heads": []}], "calibration[0].heads", "invalid_parameter"),
    ],
)
def test_bad_calibrations_never_reach_the_engine(
    post, engine, value, assert_closed, calibration, param, reason
):
    response = post(calibration=calibration)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_calibration")
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert engine.requests == []
    assert reason in REASONS
    assert value("trimtab_rejections_total", reason=reason) == 1
    assert_closed()
    assert post(calibration=ZERO).status_code == 200


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity"])
def test_numbers_beyond_json_are_refused(client, engine, number):
    body = f'{{"prompt": "hi", "calibration": {{"method": "zerotuning", "gamma": {number}}}}}'
    response = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "calibration.gamma"
    assert engine.requests == []


@pytest.mark.parametrize("depth", [100, *range(860, 1000, 5), 5000])
def test_deep_nesting_is_a_client_error(client, engine, depth):
    layers = "[" * depth + "]" * depth
    body = f'{{"prompt": "hi", "calibration": {{"method": "zerotuning", "layers": {layers}}}}}'
    response = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
        ({"vllm_xargs": {"trimtab": "x"}}, "vllm_xargs.trimtab"),
    ],
)
def test_what_calibration_cannot_go_with(post, engine, value, outcomes, fields, param):
    response = post(calibration=ZERO, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert value("trimtab_rejections_total", reason="unsupported_feature") == 1
    assert engine.requests == []
    if not param.startswith("vllm_xargs"):
        assert post(**fields).status_code == 200


def test_our_key_is_refused_in_plain_requests_too(post, engine):
    response = post(vllm_xargs={"trimtab": "x"})
    assert (response.status_code, engine.requests) == (400, [])


@pytest.mark.parametrize("status", [400, 404, 500])
def test_errors_of_the_engine_pass_without_a_receipt(post, engine, outcomes, assert_closed, status):
    engine.status = status
    response = post(calibration=ZERO)
    assert response.status_code == status
    assert response.json()["error"]["message"] == "vLLM's own"
    assert "X-Calibration" not in response.headers
    assert response.headers["X-Load"] == "3"
    assert outcomes() == {"failed": 1}
    assert_closed()


@pytest.mark.parametrize("calibration", ["none", ZERO], ids=["plain", "calibrated"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("silent", [set(), {(0, 0)}], ids=["", "uncalibrated"])
def test_vllm_learns_that_an_answer_is_out(post, engine, calibration, stream, status, silent):
    engine.status, engine.silent = status, silent
    post(calibration=calibration, stream=stream)
    assert engine.ended == 1


def test_a_handler_that_breaks_closes_the_receipt(post, engine, outcomes, assert_closed):
    engine.prompts = None
    assert post(calibration=ZERO).status_code == 500
    assert outcomes() == {"failed": 1}
    assert_closed()


def test_a_stream_that_breaks_closes_the_receipt(app, engine, outcomes, assert_closed):
    async def fail():
        raise RuntimeError("engine died")

    engine.before_chunk = fail
    body = {"model": "m", "prompt": "hi", "calibration": ZERO, "stream": True}
    with pytest.raises(RuntimeError, match="engine died"):
        TestClient(app).post("/v1/completions", json=body)
    assert outcomes() == {"failed": 1}
    assert_closed()


def scope_of(path, spec_version="2.3"):
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }


def receiving(path, hung_up):
    """The client's side: one body, then nothing until it hangs up."""
    body = {"model": "m", **BODIES[path], "calibration": ZERO, "stream": True}
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    return receive


async def exchange(app, path, hang_up_after, spec_version):
    """Talk to the application and hang up after some messages; how many were sent."""
    hung_up = asyncio.Event()
    sent = 0

    async def send(message):
        nonlocal sent
        if hung_up.is_set() and spec_version == "2.4":
            raise OSError("gone")
        # A server under an older version of the protocol swallows what is sent from here on.
        sent += not hung_up.is_set()
        if sent >= hang_up_after:
            hung_up.set()
            await asyncio.sleep(0.05)

    if not hang_up_after:
        hung_up.set()
    call = app(scope_of(path, spec_version), receiving(path, hung_up), send)
    if spec_version == "2.4":
        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(call, 10)
    else:
        await asyncio.wait_for(call, 10)
    return sent


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("hang_up_after", [0, 1, 2, 3])
@pytest.mark.parametrize("path", PATHS, ids=["chat", "text"])
def test_a_client_that_hangs_up_closes_the_receipt(
    app, engine, make_chunk, outcomes, assert_closed, path, hang_up_after, spec_version
):
    engine.chunks = [*[make_chunk(0, None)] * 5, make_chunk(0, "stop")]
    engine.before_chunk = lambda: asyncio.sleep(0.01)
    assert asyncio.run(exchange(app, path, hang_up_after, spec_version)) == hang_up_after
    assert len(engine.requests) == 1
    assert outcomes() == {"failed": 1}
    assert_closed()


def test_a_request_that_is_cancelled_closes_the_receipt(
    app, engine, monkeypatch, outcomes, assert_closed
):
    async def run():
        working = asyncio.Event()

        async def hang(request, raw_request):
            await engine.handle(request, raw_request)
            working.set()
            await asyncio.sleep(60)

        monkeypatch.setattr(generate.completion, "create_completion", hang)
        path = "/v1/completions"
        receive = receiving(path, asyncio.Event())
        task = asyncio.create_task(app(scope_of(path), receive, lambda message: None))
        await asyncio.wait_for(working.wait(), 10)
        assert len(app.state.trimtab.desk) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert outcomes() == {"failed": 1}
    assert_closed()


def test_a_handler_that_gives_up_closes_the_receipt(
    client, engine, monkeypatch, outcomes, assert_closed
):
    """vLLM's handlers return None where the client is gone."""

    async def give_up(request, raw_request):
        await engine.handle(request, raw_request)

    monkeypatch.setattr(generate.completion, "create_completion", give_up)
    client.post("/v1/completions", json={"prompt": "hi", "calibration": ZERO})
    assert outcomes() == {"failed": 1}
    assert_closed()


def test_the_salt_goes_by_the_key_that_let_the_request_in(app, engine):
    salts = []
    for header, tenant in [("Bearer a", "1"), ("bearer  a", "1"), ("Bearer a", "2"), ("", None)]:

        async def named(scope, receive, send, tenant=tenant):
            await app({**scope, **({TENANT: tenant} if tenant else {})}, receive, send)

        client = TestClient(named)
        body = {"prompt": "Hi", "calibration": ZERO, "cache_salt": "mine"}
        client.post("/v1/completions", json=body, headers={"Authorization": header})
        salts.append(engine.requests[-1].cache_salt)
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3
