"""What an evaluation asks of a running server."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias

import httpx

from server.admission import OFF

TIMEOUT = httpx.Timeout(300, connect=10)
# Servers close idle connections, vLLM's after 5 seconds. A request on one that is being closed is
# lost, and nothing is sent twice: so they are given up here well before.
IDLE_SECONDS = 2.0

Calibration: TypeAlias = Any
Body: TypeAlias = Mapping[str, Any]


class ApiFailure(Exception):
    """The server gave no answer that can be used; says what it gave."""


class Refused(ApiFailure):
    """The server refuses the request: status 400."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an evaluation keeps of a calibrated answer's receipt.

    Attributes:
        digest: of settings and model.
        tokens: prompt and completion tokens that were calibrated, summed over the methods.
        skipped: reasons of methods that left the request alone.
        statistics: of all methods, by name.
    """

    digest: str
    tokens: int
    skipped: tuple[str, ...]
    statistics: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of one choice, and its receipt where it was calibrated."""

    choice: Any
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class Api:
    """A Trimtab server.

    Attributes:
        http: a client with its address and key.
        model: name of the served model.
        versions: of Trimtab and vLLM, as `GET /version` has them.
        calibrators: names on offer.
    """

    http: httpx.AsyncClient
    model: str
    versions: Mapping[str, str]
    calibrators: frozenset[str]

    async def chat(self, calibration: Calibration, **body: object) -> Answer:
        """A chat completion; plain where `calibration` is None."""
        return await self._answer("/v1/chat/completions", calibration, body)

    async def complete(self, calibration: Calibration, **body: object) -> Answer:
        """A completion; plain where `calibration` is None."""
        return await self._answer("/v1/completions", calibration, body)

    async def stream(
        self, path: str, calibration: Calibration, **body: object
    ) -> AsyncGenerator[Mapping[str, Any]]:
        """The chunks of a streamed answer as they come; plain where `calibration` is None.

        Raises:
            ApiFailure: it is an error, or ends in one.
        """
        whole = {**self._whole(calibration, body), "stream": True}
        try:
            async with self.http.stream("POST", path, json=whole) as response:
                if response.status_code != HTTPStatus.OK:
                    await response.aread()
                    raise _failure(response)
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _chunk(line.removeprefix("data: "))
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise ApiFailure(f"the request failed: {reason}") from None

    async def tokens(self, **body: object) -> list[int]:
        """Token ids of a `prompt` or of `messages`."""
        document = await self._post("/tokenize", {"model": self.model, **body})
        return list(member(document, "tokens"))

    async def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        """The JSON document at a path."""
        return _document(await self.http.get(path))

    async def _answer(self, path: str, calibration: Calibration, body: Body) -> Answer:
        document = await self._post(path, self._whole(calibration, body))
        receipt = document.get("calibration") if isinstance(document, dict) else None
        return Answer(member(document, "choices", 0), self.checked(receipt, calibration))

    def _whole(self, calibration: Calibration, body: Body) -> dict[str, Any]:
        field = OFF if calibration is None else calibration
        return {"model": self.model, "temperature": 0, **body, "calibration": field}

    def checked(self, receipt: object, calibration: Calibration) -> Receipt | None:
        """The receipt of an answer, None for a plain one, once it is what was asked for.

        Args:
            receipt: what the answer has under `calibration`, None where it has nothing.
            calibration: that was asked for.

        Raises:
            ApiFailure: it is missing, names other methods, or is there on a plain answer.
        """
        if calibration is None or calibration == OFF:
            if receipt is not None:
                raise ApiFailure("a plain request came back calibrated")
            return None
        if receipt is None:
            raise ApiFailure("a calibrated request came back without a receipt")
        return self._read(receipt, calibration)

    def _read(self, receipt: object, calibration: Calibration) -> Receipt:
        """The receipt, once it names the methods that were asked for."""
        applied = member(receipt, "applied")
        named = [str(member(entry, "method")) for entry in applied]
        wanted = self._methods(calibration)
        if not named or (wanted is not None and named != wanted):
            raise ApiFailure(f"the receipt names the methods {named}, not {wanted}")
        return Receipt(
            digest=str(member(receipt, "digest")),
            tokens=sum(
                entry.get(count) or 0
                for entry in applied
                for count in ("prompt_tokens", "completion_tokens")
            ),
            skipped=tuple(entry["skipped"] for entry in applied if entry.get("skipped")),
            statistics={
                name: value
                for entry in applied
                for name, value in (entry.get("statistics") or {}).items()
            },
        )

    def _methods(self, calibration: Calibration) -> list[str] | None:
        """Methods a calibration asks for; None where it is a name that stands for others."""
        names = names_of(calibration)
        return names if self.calibrators.issuperset(names) else None

    async def _post(self, path: str, body: Body) -> Any:  # noqa: ANN401 - JSON
        return _document(await self.http.post(path, json=body))


def names_of(calibration: Calibration) -> list[str]:
    """What a calibration names: methods, or in their place what stands for some."""
    entries = calibration if isinstance(calibration, list) else [calibration]
    return [str(e.get("method") if isinstance(e, dict) else e) for e in entries]


@asynccontextmanager
async def connected(
    url: str, api_key: str | None = None, *, trust_env: bool = True
) -> AsyncIterator[Api]:
    """A client for the server at `url`, with what has to be known of it.

    Raises:
        ApiFailure: no Trimtab server answers there.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS)
    try:
        client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=TIMEOUT, limits=limits, trust_env=trust_env
        )
    except httpx.InvalidURL as error:
        raise ApiFailure(f"{url!r} is no address: {error}") from None
    async with client as http:
        yield await acquainted(http)


async def acquainted(http: httpx.AsyncClient) -> Api:
    """The server behind a client, asked for its model, versions and calibrators.

    Raises:
        ApiFailure: it is no Trimtab server.
    """
    try:
        models, versions, calibrators = [
            _document(await http.get(path))
            for path in ("/v1/models", "/version", "/v1/calibrators")
        ]
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        reason = str(error) or type(error).__name__
        raise ApiFailure(f"no server answers at {http.base_url}: {reason}") from None
    return Api(
        http,
        str(member(models, "data", 0, "id")),
        {name: str(member(versions, name)) for name in ("version", "vllm_version")},
        frozenset(str(member(entry, "id")) for entry in member(calibrators, "data")),
    )


def member(document: object, *path: str | int) -> Any:  # noqa: ANN401 - JSON
    """The value at `path` of a JSON document.

    Raises:
        ApiFailure: there is none.
    """
    value: Any = document
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            where = ".".join(map(str, path))
            raise ApiFailure(f"the answer has no {where}: {json.dumps(document)[:200]}") from None
    return value


def _document(response: httpx.Response) -> Any:  # noqa: ANN401 - JSON
    try:
        document = response.json()
    except ValueError:
        document = None
    if response.status_code != HTTPStatus.OK or document is None:
        raise _failure(response)
    return document


def _chunk(text: str) -> Mapping[str, Any]:
    try:
        chunk = json.loads(text)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ApiFailure(f"a stream has a chunk that is no JSON object: {text[:200]}")
    if "error" in chunk:
        raise ApiFailure(f"the stream ends with an error: {member(chunk, 'error', 'message')}")
    return chunk


def _failure(response: httpx.Response) -> ApiFailure:
    refused = response.status_code == HTTPStatus.BAD_REQUEST
    return (Refused if refused else ApiFailure)(_complaint(response))


def _complaint(response: httpx.Response) -> str:
    try:
        document = response.json()
    except ValueError:
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict) and error.get("message"):
        param = f"{error['param']}: " if error.get("param") else ""
        return f"status {response.status_code}: {param}{error['message']}"
    path = response.request.url.path
    return f"{path} answers {response.status_code}: {response.text[:200]}"
