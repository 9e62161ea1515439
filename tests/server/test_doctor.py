import json

import httpx
import pytest

from server import doctor, own_server

TITLES = [title for title, _ in doctor.CHECKS]
DIGEST = "0123456789ab"


class FakeServer:
    """Answers as a healthy server does, but for one flaw."""

    def __init__(self, flaw=None, length=8192):
        self.flaw = flaw
        self.model = {"id": "some-model", "max_model_len": length}
        self.prompts = set()
        self.plain = 0
        self.calibrated = 0

    def __call__(self, request):
        path = request.url.path
        if path == "/v1/completions":
            return self.complete(json.loads(request.content))
        if path == "/metrics":
            return httpx.Response(200, text=self.metrics())
        if self.flaw == "not ours":
            return httpx.Response(404, text="<html>")
        ready = 503 if self.flaw == "draining" else 200
        method = "act" if self.flaw == "no zerotuning" else "zerotuning"
        return {
            "/ready": httpx.Response(ready, json={"status": "ready"}),
            "/version": httpx.Response(200, json={"version": "1", "vllm_version": "2"}),
            "/v1/calibrators": httpx.Response(200, json={"data": [{"id": method}]}),
            "/v1/models": httpx.Response(200, json={"data": [self.model]}),
        }[path]

    def complete(self, body):
        assert body["model"] == "some-model"
        self.prompts.add(body["prompt"])
        calibration = body["calibration"]
        if calibration == "none":
            self.plain += 1
            return httpx.Response(200, json=self.answer(self.plain_logprob()))
        if calibration["gamma"] < 0 and self.flaw != "accepts anything":
            param = "calibration" if self.flaw == "wrong param" else "calibration.gamma"
            return httpx.Response(400, json={"error": {"param": param}})
        self.calibrated += 1
        neutral = calibration["gamma"] == 1 and self.flaw != "neutral acts"
        logprob = -1.0 if neutral or self.flaw == "no effect" else -2.0
        content = self.answer(logprob) | self.receipt()
        if body.get("stream"):
            return httpx.Response(200, text=self.stream())
        digest = "ffffffffffff" if self.flaw == "wrong header" else DIGEST
        header = {"X-Calibration": f"zerotuning;digest={digest}"}
        return httpx.Response(200, json=content, headers=header)

    def plain_logprob(self):
        if self.flaw == "noise":
            return -1.0 - self.plain
        leaked = self.flaw == "leak" and self.calibrated
        return -2.0 if leaked else -1.0

    def answer(self, logprob):
        numbers = {"tokens": ["a"], "token_logprobs": [logprob], "top_logprobs": [{"a": logprob}]}
        usage = {"prompt_tokens": 400, "completion_tokens": 8}
        return {"choices": [{"logprobs": numbers}], "usage": usage}

    def receipt(self):
        masses = {"key0_mass_before": 0.5, "key0_mass_after": 0.25}
        if self.flaw == "mass stays":
            masses["key0_mass_after"] = 0.5
        if self.flaw == "no statistics":
            masses = {}
        entry = {
            "method": "zerotuning",
            "prompt_tokens": 384 if self.flaw == "uncounted" else 400,
            "completion_tokens": 8 if self.flaw == "counts the last" else 7,
            "statistics": masses,
        }
        return {"calibration": {"digest": DIGEST, "applied": [entry]}}

    def stream(self):
        last = {"choices": [{"finish_reason": "length"}]} | self.receipt()
        if self.flaw == "stream without receipt":
            del last["calibration"]
        chunks = [{"choices": [{"finish_reason": None}]}, last]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return "".join([*lines, "data: [DONE]\n\n"])

    def metrics(self):
        count = 0 if self.flaw == "metrics stand still" else self.calibrated
        count *= 2 if self.flaw == "others too" else 1
        tokens = 'trimtab_calibrated_tokens_total{calibrator="zerotuning",phase='
        return (
            "# TYPE trimtab_requests_total counter\n"
            f'trimtab_requests_total{{calibrator="zerotuning",outcome="applied"}} {count}\n'
            "# TYPE trimtab_calibrated_tokens_total counter\n"
            f'{tokens}"prompt"}} {400 * count}\n'
            f'{tokens}"completion"}} {7 * count}\n'
        )


@pytest.fixture
def examine(capsys):
    """Examine a server with a flaw; the verdict and the lines by title."""

    def run(flaw=None):
        transport = httpx.MockTransport(FakeServer(flaw))
        with httpx.Client(transport=transport, base_url="http://server") as http:
            passed = doctor.examine(doctor.Server(http))
        lines = capsys.readouterr().out.splitlines()
        split = [line.split(maxsplit=1) for line in lines]
        return passed, {rest.split(":")[0]: verdict for verdict, rest in split}, lines

    return run


@pytest.mark.parametrize("flaw", [None, "others too"])
def test_a_healthy_server_passes_every_check(examine, flaw):
    passed, verdicts, lines = examine(flaw)
    assert passed
    assert verdicts == dict.fromkeys(TITLES, "ok")
    assert len(lines) == len(TITLES)
    assert any("others use this server" in line for line in lines) == (flaw is not None)


@pytest.mark.parametrize("length", [200, 1024])
def test_the_prompt_fits_into_a_model_that_has_a_token_for_each_letter(capsys, length):
    fake = FakeServer(length=length)
    with httpx.Client(transport=httpx.MockTransport(fake), base_url="http://server") as http:
        assert doctor.examine(doctor.Server(http))
    (prompt,) = fake.prompts
    assert length - 32 < len(prompt) < length - doctor.MAX_TOKENS


@pytest.mark.parametrize(
    ("flaw", "failing"),
    [
        ("draining", "the server is ready"),
        ("no zerotuning", "calibrators are on offer"),
        ("noise", "two plain requests agree"),
        ("no effect", "a calibrated request changes the logits"),
        ("leak", "a plain request after it is as before"),
        ("neutral acts", "gamma = 1 changes nothing"),
        ("uncounted", "the workers calibrated every position"),
        ("counts the last", "the workers calibrated every position"),
        ("mass stays", "the receipt measures the change"),
        ("no statistics", "the receipt measures the change"),
        ("wrong header", "header and receipt agree"),
        ("metrics stand still", "metrics and receipt agree"),
        ("accepts anything", "a bad calibration is refused"),
        ("wrong param", "a bad calibration is refused"),
        ("stream without receipt", "a stream carries the receipt"),
    ],
)
def test_each_flaw_fails_its_check(examine, flaw, failing):
    passed, verdicts, lines = examine(flaw)
    assert not passed
    assert verdicts[failing] == "FAIL"
    assert len(lines) == len(TITLES)


def test_some_other_server_fails_line_by_line(examine):
    passed, verdicts, lines = examine("not ours")
    assert not passed
    assert verdicts["the server is ready"] == "FAIL"
    assert "/ready answers 404" in lines[0]


def test_a_connection_that_breaks_is_a_failure_of_that_check(capsys):
    healthy = FakeServer()

    def handler(request):
        if request.url.path == "/version":
            raise httpx.ReadTimeout("too slow", request=request)
        return healthy(request)

    transport = httpx.MockTransport(handler)
    with httpx.Client(transport=transport, base_url="http://server") as http:
        assert not doctor.examine(doctor.Server(http))
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failures == ["FAIL  versions: the request failed: too slow"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", ""])
def test_no_server_is_one_line_and_status_2(monkeypatch, capsys, url):
    for variable in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    assert doctor.main(url, None) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"trimtab: no server answers at {url}: ")


def test_a_server_of_its_own_that_does_not_start_is_status_2(monkeypatch, capsys):
    def running(report, *, api_key):
        raise own_server.StartFailed("the server ended at start-up\nlast line")

    monkeypatch.setattr(own_server, "running", running)
    assert doctor.main(None, None) == 2
    assert capsys.readouterr().err == "trimtab: the server ended at start-up\nlast line\n"
