"""`trimtab doctor`: does calibration work on this server?

A check is a function that returns what it saw or raises `Failure`. All of them go over HTTP, so
that they see what clients see; receipts are written from what the workers counted, so that they
show whether the plug-in is at work there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server import own_server
from server.admission import OFF

TIMEOUT = httpx.Timeout(120, connect=5)
# Several hundred tokens fill blocks of the prefix cache, so that sharing them wrongly would show.
PROMPT = "A ship of good size is steered by a rudder, and the rudder by a small tab. " * 20
MAX_TOKENS = 8
# That a tokenizer puts around a prompt.
SPECIAL_TOKENS = 8
METHOD = "zerotuning"
STRONG = {"method": METHOD, "gamma": 0.3}
NEUTRAL = {"method": METHOD, "gamma": 1.0}
IDLE = "other requests at the same time may change rounding: check again while the server is idle"


class Failure(Exception):
    """A check that did not pass; says what was seen."""


def member(document: object, *path: str | int) -> Any:  # noqa: ANN401 - JSON
    """The value at `path` of a JSON document.

    Raises:
        Failure: there is none.
    """
    value: Any = document
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            where = ".".join(map(str, path))
            raise Failure(f"the answer has no {where}: {json.dumps(document)[:200]}") from None
    return value


@dataclass(frozen=True)
class Completion:
    """An answer of `/v1/completions`."""

    body: Any
    header: str

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Tokens and log-probabilities, exact: JSON carries all digits."""
        logprobs = member(self.body, "choices", 0, "logprobs")
        return tuple(member(logprobs, k) for k in ("tokens", "token_logprobs", "top_logprobs"))

    def usage(self, name: str) -> int:
        """A count of `usage`."""
        return int(member(self.body, "usage", name))

    def receipt(self, *path: str | int) -> Any:  # noqa: ANN401 - JSON
        """A value of the receipt's only entry."""
        return member(self.body, "calibration", "applied", 0, *path)


class Server:
    """The server that is checked.

    Args:
        http: a client with its address and key.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def get(self, path: str) -> httpx.Response:
        """Fetch a path that must answer 200."""
        return _ok(self._http.get(path))

    def post(self, calibration: object, **fields: object) -> httpx.Response:
        """Send the fixed prompt."""
        body = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "logprobs": 3,
            "ignore_eos": True,
            "calibration": calibration,
            **fields,
        }
        return self._http.post("/v1/completions", json=body)

    def complete(self, calibration: object) -> Completion:
        """The completion of the fixed prompt."""
        response = _ok(self.post(calibration))
        return Completion(_json(response), response.headers.get("X-Calibration", ""))

    def settle(self, calibration: object) -> Completion:
        """The completion once its prompt is in the prefix cache.

        A first pass over a prompt multiplies larger matrices than later ones, and rounds
        differently on some machines; among later ones every bit must agree.
        """
        self.complete(calibration)
        return self.complete(calibration)

    def sample(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where it is not exported."""
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return float(sample.value)
        return 0.0

    @cached_property
    def model(self) -> str:
        """Name of the served model."""
        return str(member(self._model, "id"))

    @cached_property
    def prompt(self) -> str:
        """The fixed prompt, shorter where a model takes little: no token is less than a letter."""
        room = int(member(self._model, "max_model_len")) - MAX_TOKENS - SPECIAL_TOKENS
        return PROMPT[: max(room, 1)]

    @cached_property
    def _model(self) -> object:
        return member(_json(self.get("/v1/models")), "data", 0)

    @cached_property
    def plain(self) -> Completion:
        """A plain answer, before anything was calibrated here."""
        return self.settle(OFF)

    @cached_property
    def calibrated(self) -> Completion:
        """A strongly calibrated answer to the same prompt."""
        return self.settle(STRONG)


def _ok(response: httpx.Response) -> httpx.Response:
    if response.status_code != HTTPStatus.OK:
        status, text = response.status_code, response.text[:200]
        raise Failure(f"{response.request.url.path} answers {status}: {text}")
    return response


def _json(response: httpx.Response) -> Any:  # noqa: ANN401 - JSON
    return _parsed(response.text, response.request.url.path)


def _parsed(text: str, source: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except ValueError:
        raise Failure(f"{source} answers no JSON: {text[:80]!r}") from None


def expect(condition: bool, failure: str) -> None:
    """Fail unless `condition`."""
    if not condition:
        raise Failure(failure)


def ready(server: Server) -> str:
    """Readiness."""
    return f"status {member(_json(server.get('/ready')), 'status')}"


def version(server: Server) -> str:
    """Versions."""
    document = _json(server.get("/version"))
    return f"Trimtab {member(document, 'version')}, vLLM {member(document, 'vllm_version')}"


def calibrators(server: Server) -> str:
    """Calibrators on offer."""
    entries = member(_json(server.get("/v1/calibrators")), "data")
    names = [member(entry, "id") for entry in entries]
    expect(METHOD in names, f"{METHOD} is not among {names}; the checks below need it")
    return ", ".join(names)


def repeats(server: Server) -> str:
    """Plain requests agree with each other."""
    again = server.complete(OFF)
    expect(again.numbers == server.plain.numbers, f"they differ; {IDLE}")
    expect("calibration" not in again.body and not again.header, "they carry a receipt")
    return f"{again.usage('prompt_tokens')} prompt tokens, every digit"


def changes(server: Server) -> str:
    """Calibration reaches the logits."""
    _, before, _ = server.plain.numbers
    _, after, _ = server.calibrated.numbers
    expect(after != before, "no log-probability changed")
    return f"first token's log-probability {before[0]:.4f} became {after[0]:.4f}"


def leaves_no_trace(server: Server) -> str:
    """A plain request after calibrated ones is as before."""
    _ = server.calibrated
    after = server.complete(OFF).numbers
    expect(after == server.plain.numbers, f"it differs from the one before; {IDLE}")
    return "every digit"


def neutral(server: Server) -> str:
    """gamma = 1 does nothing."""
    answer = server.settle(NEUTRAL)
    expect(answer.numbers == server.plain.numbers, f"it differs from a plain one; {IDLE}")
    expect(answer.receipt("prompt_tokens") > 0, "it was not calibrated at all")
    return "every digit"


def counts(server: Server) -> str:
    """The receipt counts every position that was fed to the model."""
    answer = server.calibrated
    expect(answer.receipt("method") == METHOD, f"it names {answer.receipt('method')}")
    seen = answer.receipt("prompt_tokens"), answer.receipt("completion_tokens")
    # The last sampled token is never fed back.
    wanted = answer.usage("prompt_tokens"), answer.usage("completion_tokens") - 1
    expect(seen == wanted, f"prompt and completion tokens are {seen}, usage says {wanted}")
    return f"{seen[0]} prompt and {seen[1]} completion tokens"


def statistics(server: Server) -> str:
    """The receipt's masses moved the way gamma pushes them."""
    before, after = (
        float(server.calibrated.receipt("statistics", f"key0_mass_{moment}"))
        for moment in ("before", "after")
    )
    detail = f"attention to the first token {before:.4f} before, {after:.4f} after"
    expect(0 <= after < before <= 1, detail)
    return detail


def header(server: Server) -> str:
    """Header and receipt agree."""
    answer = server.calibrated
    expected = f"{METHOD};digest={member(answer.body, 'calibration', 'digest')}"
    expect(answer.header == expected, f"X-Calibration is {answer.header!r}, not {expected!r}")
    return answer.header


def metrics(server: Server) -> str:
    """Metrics move by what the receipt says, or more where others use the server too."""

    def read() -> list[float]:
        tokens = "trimtab_calibrated_tokens_total"
        return [
            server.sample("trimtab_requests_total", calibrator=METHOD, outcome="applied"),
            server.sample(tokens, calibrator=METHOD, phase="prompt"),
            server.sample(tokens, calibrator=METHOD, phase="completion"),
        ]

    before = read()
    answer = server.complete(STRONG)
    moved = [int(now - then) for now, then in zip(read(), before, strict=True)]
    wanted = [1, answer.receipt("prompt_tokens"), answer.receipt("completion_tokens")]
    short = any(seen < least for seen, least in zip(moved, wanted, strict=True))
    detail = "requests, prompt tokens, completion tokens moved by {}, {}, {}".format(*moved)
    expect(not short, f"{detail}; the receipt says {wanted}")
    return detail if moved == wanted else f"{detail}: others use this server too"


def refuses(server: Server) -> str:
    """A calibration that makes no sense is refused."""
    response = server.post({"method": METHOD, "gamma": -1})
    status = response.status_code
    expect(status == HTTPStatus.BAD_REQUEST, f"it is answered with {status}")
    param = member(_json(response), "error", "param")
    expect(param == "calibration.gamma", f"the error names {param!r}")
    return f"400, param {param}"


def streams(server: Server) -> str:
    """A stream carries the receipt where it finishes."""
    text = _ok(server.post(STRONG, stream=True)).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    chunks = [_parsed(line, "a stream") for line in lines if line != "[DONE]"]
    stamped = [chunk for chunk in chunks if "calibration" in chunk]
    expect(len(stamped) == 1, f"{len(stamped)} of {len(chunks)} chunks carry a receipt")
    finish = member(stamped[0], "choices", 0, "finish_reason")
    expect(finish is not None, "the receipt is not in the chunk that finishes")
    digests = [
        member(body, "calibration", "digest") for body in (stamped[0], server.calibrated.body)
    ]
    expect(digests[0] == digests[1], f"digests differ: {digests}")
    return f"in the chunk that finishes with {finish!r}"


Check = Callable[[Server], str]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("the server is ready", ready),
    ("versions", version),
    ("calibrators are on offer", calibrators),
    ("a model is served", lambda server: server.model),
    ("two plain requests agree", repeats),
    ("a calibrated request changes the logits", changes),
    ("a plain request after it is as before", leaves_no_trace),
    ("gamma = 1 changes nothing", neutral),
    ("the workers calibrated every position", counts),
    ("the receipt measures the change", statistics),
    ("header and receipt agree", header),
    ("metrics and receipt agree", metrics),
    ("a bad calibration is refused", refuses),
    ("a stream carries the receipt", streams),
)


def examine(server: Server) -> bool:
    """Run every check and print one line each; whether all passed."""
    passed = True
    for title, check in CHECKS:
        try:
            verdict, detail = "ok", check(server)
        except Failure as failure:
            verdict, detail = "FAIL", str(failure)
        except httpx.HTTPError as error:
            verdict, detail = "FAIL", f"the request failed: {str(error) or type(error).__name__}"
        passed = passed and verdict == "ok"
        print(f"{verdict:<4}  {title}: {detail}", flush=True)
    return passed


def main(url: str | None, api_key: str | None) -> int:
    """Check a server and print one line per check.

    Args:
        url: of a running server; None starts one with the embedded model, and stops it.
        api_key: of that server.

    Returns:
        0 if all checks pass, 1 if one fails, 2 if there is no server to check.
    """
    try:
        if url is not None:
            return _visit(url, api_key)
        with own_server.running(_progress, api_key=api_key) as address:
            # No proxy stands between this machine and itself.
            return _visit(address, api_key, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        print(f"trimtab: no server answers at {url}: {error}", file=sys.stderr)
    except own_server.StartFailed as error:
        print(f"trimtab: {error}", file=sys.stderr)
    return 2


def _visit(url: str, api_key: str | None, *, trust_env: bool = True) -> int:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=trust_env) as http:
        # Whatever it answers is for the checks to judge; no answer at all ends here.
        http.get("/ready")
        return 0 if examine(Server(http)) else 1


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
