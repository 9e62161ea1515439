"""Questions about pictures to a server, many at a time."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from PIL import Image

ANSWER_SECONDS = 300.0
# Servers close idle connections after five seconds, just when one might be used again.
IDLE_SECONDS = 2.0
# Longer than any caption the model has learnt from.
MAX_TOKENS = 48


class AskError(RuntimeError):
    """A server did not answer as asked."""


@dataclass(frozen=True, slots=True)
class Question:
    """A picture and what is asked about it."""

    picture: Image.Image
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; `skipped` where the receipt says that a method did nothing."""

    text: str
    skipped: bool = False


class Asker:
    """A client of one server; a context manager.

    Args:
        url: base address of the server.
        model: its served name.
        api_key: None where it asks for none.
        parallel: requests on their way at a time.
        transport: in place of the network.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        parallel: int = 16,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._model = model
        self._slots = asyncio.Semaphore(parallel)
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=ANSWER_SECONDS,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS),
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def ask(self, questions: Sequence[Question], calibration: Any) -> list[Answer]:  # noqa: ANN401
        """Greedy answers in the order of the questions; plain where `calibration` is None.

        Raises:
            AskError: an answer is an error, cannot be had, or lacks the receipt it should have.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(each, calibration)) for each in questions]
        except ExceptionGroup as failed:
            # All that were on their way may fail, as a rule for one reason.
            raise failed.exceptions[0] from failed
        return [task.result() for task in tasks]

    async def _answer(self, question: Question, calibration: Any) -> Answer:  # noqa: ANN401
        async with self._slots:
            body = body_of(question, self._model, calibration)
            try:
                response = await self._client.post("/v1/chat/completions", json=body)
            except httpx.TransportError as error:
                raise AskError(f"{type(error).__name__}: {error}") from error
        if response.status_code != httpx.codes.OK:
            raise AskError(f"status {response.status_code}: {response.text[:500]}")
        return _read(response.json(), receipt=calibration is not None)


def body_of(question: Question, model: str, calibration: Any) -> dict[str, Any]:  # noqa: ANN401
    """The request body of a question, its picture in the body."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(question.picture)}},
        {"type": "text", "text": question.text},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        **({} if calibration is None else {"calibration": calibration}),
    }


def data_url(picture: Image.Image) -> str:
    """The picture as a PNG within an address."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _read(content: dict[str, Any], *, receipt: bool) -> Answer:
    applied = (content.get("calibration") or {}).get("applied", [])
    if receipt and not applied:
        raise AskError("a calibrated request came back without a receipt")
    skipped = any(method.get("skipped") for method in applied)
    return Answer(content["choices"][0]["message"]["content"], skipped)
