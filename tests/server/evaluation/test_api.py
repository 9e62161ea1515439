import asyncio

import httpx
import pytest

from server.evaluation import api
from server.evaluation.api import ApiFailure, Receipt, Refused

pytestmark = pytest.mark.anyio
GAMMA = {"method": "zerotuning", "gamma": 0.5}


async def test_what_is_known_of_a_server(connect):
    _, server = await connect()
    assert server.model == "fake"
    assert server.versions == {"version": "1.2", "vllm_version": "3.4"}
    assert server.calibrators == {"zerotuning", "act"}


async def test_a_plain_request_switches_the_servers_default_off(connect):
    fake, server = await connect()
    answer = await server.complete(None, prompt="x")
    assert answer.receipt is None
    assert fake.requests == [
        (
            "/v1/completions",
            {"model": "fake", "temperature": 0, "prompt": "x", "calibration": "none"},
        )
    ]


@pytest.mark.parametrize("calibration", ["zerotuning", GAMMA, [GAMMA]])
async def test_a_calibrated_answer_keeps_its_receipt(connect, calibration):
    fake, server = await connect(flaw="skips")
    answer = await server.chat(calibration, messages=[{"role": "user", "content": "x"}])
    assert answer.receipt == Receipt("0123456789ab", 5, ("nothing to do",))
    assert fake.requests[0][1]["calibration"] == calibration


async def test_a_name_for_others_may_be_any_method(connect):
    _, server = await connect(flaw="other method")
    assert (await server.complete("gentle", prompt="x")).receipt is not None


@pytest.mark.parametrize(
    ("calibration", "flaw", "message"),
    [
        (None, "never plain", "a plain request came back calibrated"),
        (GAMMA, "no receipt", "came back without a receipt"),
        (GAMMA, "other method", r"names the methods \['act'\], not \['zerotuning'\]"),
        (GAMMA, "no JSON", "/v1/completions answers 502: <html>"),
    ],
)
async def test_an_answer_that_is_not_as_asked_is_a_failure(connect, calibration, flaw, message):
    _, server = await connect(flaw=flaw)
    with pytest.raises(ApiFailure, match=message) as caught:
        await server.complete(calibration, prompt="x")
    assert not isinstance(caught.value, Refused)


async def test_a_refusal_is_told_apart(connect):
    _, server = await connect()
    with pytest.raises(Refused, match=r"^status 400: calibration\.gamma: gamma must be above 0$"):
        await server.complete({"method": "zerotuning", "gamma": 0}, prompt="x")


async def test_another_kind_of_server_is_a_failure():
    transport = httpx.MockTransport(lambda request: httpx.Response(404, text="<html>"))
    async with httpx.AsyncClient(transport=transport, base_url="http://other") as client:
        with pytest.raises(ApiFailure, match="/v1/models answers 404: <html>"):
            await api.acquainted(client)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", ""])
async def test_no_server_is_a_failure(url):
    with pytest.raises(ApiFailure, match=r"no server answers|is no address"):
        async with api.connected(url, trust_env=False):
            pytest.fail("it is connected")


async def test_the_key_is_sent():
    seen = []

    def handler(request):
        seen.append(request.headers["Authorization"])
        return httpx.Response(401, json={"error": {"message": "no such key", "param": None}})

    class Client(httpx.AsyncClient):
        def __init__(self, **options):
            super().__init__(**options, transport=httpx.MockTransport(handler))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.httpx, "AsyncClient", Client)
        with pytest.raises(ApiFailure, match="status 401: no such key"):
            async with api.connected("http://host", "secret"):
                pytest.fail("it is connected")
    assert seen == ["Bearer secret"]


async def test_idle_connections_are_given_up_before_the_server_closes_them(monkeypatch):
    monkeypatch.setattr(api, "IDLE_SECONDS", 0.05)
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        while (await reader.readuntil(b"\r\n\r\n")) and not writer.is_closing():
            body = b'{"data": [{"id": "x"}], "version": "1", "vllm_version": "2"}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def closed_by_the_client(reader, writer):
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async with await asyncio.start_server(closed_by_the_client, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with api.connected(f"http://127.0.0.1:{port}", trust_env=False) as server:
            before = len(connections)
            await asyncio.sleep(0.1)
            await server.http.get("/ready")
    assert (before, len(connections)) == (1, 2)
